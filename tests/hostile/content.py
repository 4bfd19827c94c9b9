"""The expected KV of each block: a function of its key, so that a block under another key is always detected.

Axes: L layers, 2 (key, value), H KV heads, N tokens, T tokens of a block, D head dim.
"""

from functools import lru_cache

import torch

from tiered_kv.keys import BlockKey, Namespace, as_token_ids
from tiered_kv.layout import KVLayout

LAYOUT = KVLayout(layers=4, kv_heads=4, head_dim=64, dtype="float32", block_tokens=16)  # blocks of 128 KiB
BLOCKS = 6
TOKENS = BLOCKS * LAYOUT.block_tokens
LOSSY_ERROR_MAX = 0.05
"""Relative error that a lossy codec may leave. Blocks of two keys differ by more than 1."""


def namespace(tenant: str = "default") -> Namespace:
    """The namespace that all hostile workers of one tenant share."""
    return Namespace(weights="made up for the hostile tests", tenant=tenant)


def tokens_of(document: int) -> list[int]:
    """Returns the prompt of a document. Documents 2n and 2n + 1 share their first half."""
    half = TOKENS // 2
    own = [1_000_000 + document * half + at for at in range(half)]
    return [document // 2 * half + at for at in range(half)] + own


def keys_of(document: int, tenant: str = "default", layout: KVLayout = LAYOUT) -> list[BlockKey]:
    """Returns the keys of a document's blocks, the first block first."""
    return namespace(tenant).chain(layout).keys(as_token_ids(tokens_of(document)))


@lru_cache(maxsize=8)
def _noise(layout: KVLayout) -> torch.Tensor:
    return torch.rand(layout.block_shape, generator=torch.Generator().manual_seed(7))


def block_of(key: BlockKey, layout: KVLayout = LAYOUT) -> torch.Tensor:
    """Returns the KV (L, 2, H, T, D) of a key."""
    scale, shift = (1 + int.from_bytes(key[at : at + 4]) / 2**32 for at in (0, 4))
    return ((_noise(layout) * (97 * scale) + shift).frac() - 0.5).to(layout.torch_dtype)


def kv_of(keys: list[BlockKey], layout: KVLayout = LAYOUT) -> torch.Tensor:
    """Returns the KV (L, 2, H, N, D) of consecutive blocks."""
    return torch.cat([block_of(key, layout) for key in keys], dim=-2)


def is_right(block: torch.Tensor, key: BlockKey, *, exactly: bool, layout: KVLayout = LAYOUT) -> bool:
    """Returns whether a block (L, 2, H, T, D) is that of its key: bit for bit, or within the error of a lossy codec."""
    expected = block_of(key, layout)
    if exactly:
        return torch.equal(block, expected)
    return bool((block.float() - expected.float()).norm() <= LOSSY_ERROR_MAX * expected.float().norm())
