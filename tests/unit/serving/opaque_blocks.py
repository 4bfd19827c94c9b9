"""Blocks as an engine packs them: bytes of bf16 numbers, in an order that only the engine knows."""

from functools import lru_cache
from hashlib import blake2b

import torch

from tests.unit.serving.prompts import Path, tokens_of
from tiered_kv import OpaqueLayout

OPAQUE = OpaqueLayout(32 << 10, 16, "pages (2, blocks, 16, heads, 64) of bfloat16 in a test", 2)
"""Blocks of 32 KiB: 30 fill the arena of a 1 MiB host tier."""
T = OPAQUE.block_tokens


@lru_cache(maxsize=4096)
def block_of(path: Path, engine: str = "") -> torch.Tensor:
    """Returns the last block of a path, as a tensor of `OPAQUE`. `engine`: engines with different names compute different numbers."""
    seed = int.from_bytes(blake2b(f"{path}{engine}".encode(), digest_size=7).digest(), "big")
    numbers = torch.randn(OPAQUE.block_bytes // 2, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return numbers.view(torch.uint8).view(OPAQUE.block_shape)


def bytes_of(path: Path, engine: str = "") -> torch.Tensor:
    """Returns all blocks of a path, as a tensor of `OPAQUE`."""
    return torch.cat([block_of(path[:end], engine) for end in range(1, len(path) + 1)], dim=-2)


def store(client, *paths: Path, engine: str = "") -> None:
    for path in paths:
        assert client.store(tokens_of(path, client.layout), bytes_of(path, engine)).refused == 0


def fetch(client, path: Path, engine: str = "") -> dict[str, int]:
    """Returns the fetched blocks by tier. Asserts that they are those that were stored, bit for bit."""
    fetched = client.fetch(tokens_of(path, client.layout))
    assert fetched.kv.shape == client.layout.kv_shape(fetched.tokens)
    assert torch.equal(fetched.kv, bytes_of(path, engine)[..., : fetched.tokens, :])
    return {tier: tokens // T for tier, tokens in fetched.tokens_by_tier.items()}
