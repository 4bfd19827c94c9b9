"""Shows the time of each stage of the cache, with blocks that are quantized when memory is full."""

import torch

from tiered_kv import BaseKVCache, KVCacheConfig

with BaseKVCache(KVCacheConfig(max_tokens=4096, use_quantization=True, enable_profiling=True)) as cache:
    for prompt in range(24):
        ids = range(1000 * prompt, 1000 * prompt + 256)
        cache.store(ids, torch.randn(4, 2, 2, 256, 32))
        cache.fetch(ids)
    cache.fetch(range(256))
    print(cache.profile_table())
