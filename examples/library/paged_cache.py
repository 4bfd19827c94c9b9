"""Sequences as block tables: two answers to one prompt share its pages, and each copies only a page to which it writes."""

import torch

from tiered_kv import KVCacheConfig, PagedKVCache


def kv(tokens: int) -> torch.Tensor:
    return torch.randn(4, 2, 2, tokens, 64)


with PagedKVCache(KVCacheConfig(max_tokens=1024)) as cache:
    first = cache.create()
    cache.append(first, range(40), kv(40))  # the prompt: two pages of 16 tokens, and one with 8
    second = cache.fork(first)
    cache.append(first, [100, 101], kv(2))
    cache.append(second, [200], kv(1))
    for name, sequence in (("first", first), ("second", second)):
        print(f"{name}: {cache.length(sequence)} tokens in pages {[(page.offset, page.tokens) for page in cache.block_table(sequence)]}")
    assert torch.equal(cache.gather(first)[..., :40, :], cache.gather(second)[..., :40, :])
    cache.free(first)
    cache.free(second)
    print("another prompt reuses", cache.length(cache.create(range(36))), "of its tokens from the freed pages")
