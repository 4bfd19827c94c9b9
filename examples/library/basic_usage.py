"""A cache within one process, used by prefix and by position."""

import torch

from tiered_kv import BaseKVCache, CacheMode, CacheStrategy, KVCacheConfig

config = KVCacheConfig(max_tokens=4096, cache_strategy=CacheStrategy.ADAPTIVE, cache_mode=CacheMode.INFERENCE)
with BaseKVCache(config) as cache:
    # By prefix: the KV of a prompt has the shape (layers, 2, KV heads, tokens, head dim). Whole blocks of 16 tokens are stored.
    prompt = list(range(100))
    kv = torch.randn(4, 2, 2, len(prompt), 64)
    print("stored:", cache.store(prompt, kv))
    fetched = cache.fetch([*prompt[:70], 7, 7, 7])
    print(f"a prompt that shares 70 tokens finds {fetched.tokens} of them")
    assert torch.equal(fetched.kv, kv[..., : fetched.tokens, :])

    # By position: a key and a value of shape (batch, heads, tokens, head dim) are stored under a number.
    key, value = torch.randn(2, 1, 8, 16, 64)
    cache.put(3, key, value)
    assert torch.equal(cache.get(3)[0], key)
    print("hit rate:", cache.get_stats()["hit_rate"])
