"""A cache that starts with the blocks of another one: saved under a name, and as numbered steps."""

import torch

from tiered_kv import BaseKVCache, CachePersistence, KVCacheConfig, load_cache_checkpoint, save_cache_checkpoint

config, prompt = KVCacheConfig(max_tokens=1024), range(100)
with BaseKVCache(config) as cache, BaseKVCache(config) as new_cache, BaseKVCache(config) as latest:
    cache.store(prompt, torch.randn(4, 2, 2, 100, 64))
    persistence = CachePersistence("./cache_checkpoints")
    print(persistence.save_cache(cache, "cache_state.tkv"))
    print(persistence.load_cache(new_cache, "cache_state.tkv"))
    assert torch.equal(new_cache.fetch(prompt).kv, cache.fetch(prompt).kv)

    for step in (1000, 2000):
        save_cache_checkpoint(cache, "./checkpoints", step=step)
    print("the latest step is", load_cache_checkpoint(latest, "./checkpoints", step=None))
    assert latest.match(prompt).tokens == 96
