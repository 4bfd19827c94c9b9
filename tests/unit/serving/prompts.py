"""Prompts as paths in a tree, and their KV. The same path always has the same tokens and content."""

from functools import lru_cache
from hashlib import blake2b

import torch

from tiered_kv import KVLayout, Namespace

NAMESPACE = Namespace(weights="made up for the tests of the service")
LAYOUT = KVLayout(2, 2, 16, "float32", 16)
"""Blocks of 8 KiB."""

Path = tuple[int, ...]


def tokens_of(path: Path, layout: KVLayout = LAYOUT) -> list[int]:
    """Returns one block of tokens for each turn of the path."""
    return [1000 * turn + at for turn in path for at in range(layout.block_tokens)]


@lru_cache(maxsize=4096)
def block_of(path: Path, layout: KVLayout = LAYOUT) -> torch.Tensor:
    """Returns the KV (L, 2, H, T, D) of the last block of a path. It depends on the whole path."""
    seed = int.from_bytes(blake2b(repr(path).encode(), digest_size=7).digest(), "big")
    return torch.randn(layout.block_shape, generator=torch.Generator().manual_seed(seed)).to(layout.torch_dtype)


def kv_of(path: Path, layout: KVLayout = LAYOUT, first: int = 0) -> torch.Tensor:
    """Returns the KV (L, 2, H, N, D) of the path's blocks from `first` on."""
    return torch.cat([block_of(path[:end], layout) for end in range(first + 1, len(path) + 1)], dim=-2)


def assert_is_prefix(fetched, path: Path, layout: KVLayout = LAYOUT) -> int:
    """Assert that the fetched KV is that of a prefix of the path, bit for bit. Returns its number of blocks."""
    blocks, rest = divmod(fetched.tokens, layout.block_tokens)
    assert not rest
    assert fetched.kv.shape == layout.kv_shape(fetched.tokens)
    assert sum(fetched.tokens_by_tier.values()) == fetched.tokens
    if blocks:
        assert torch.equal(fetched.kv, kv_of(path[:blocks], layout))
    return blocks
