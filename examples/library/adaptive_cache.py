"""A cache that learns which prefixes are used again: one prompt is repeated between many that occur only once."""

import torch

from tiered_kv import AdaptiveKVCache, BaseKVCache, CacheStrategy, KVCacheConfig
from tiered_kv.clock import ManualClock

SHAPE = (2, 2, 1, 64, 32)  # layers, key and value, KV heads, tokens, head dim
config = KVCacheConfig(max_tokens=1024, cache_strategy=CacheStrategy.LRU)
hits = {}
for cls in (BaseKVCache, AdaptiveKVCache):
    clock, hits[cls.__name__] = ManualClock(), 0
    with cls(config, clock=clock) as cache:
        for request in range(400):
            clock.advance(1.0)
            again = request % 20 == 0
            prompt = range(64) if again else range(1000 * request, 1000 * request + 64)
            found = cache.fetch(prompt).tokens if cache.layout else 0
            hits[cls.__name__] += found // 64 if again else 0
            cache.store(prompt, torch.zeros(SHAPE))
print(f"of 20 requests for the same prompt, LRU had {hits['BaseKVCache']} hits, adaptive {hits['AdaptiveKVCache']}")
