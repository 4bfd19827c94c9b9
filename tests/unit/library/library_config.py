"""Constants that the tests of attached models share."""

from tiered_kv import CacheStrategy, KVCacheConfig

BLOCK = 8
GREEDY = dict(do_sample=False, max_new_tokens=5)
CONFIG = KVCacheConfig(max_tokens=2048, block_tokens=BLOCK, cache_strategy=CacheStrategy.LRU)
