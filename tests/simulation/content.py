"""The blocks of a simulation: small ones, whose bytes follow from their key."""

from functools import lru_cache
from hashlib import shake_128

import numpy as np
import torch

from tests.simulation.plan import BLOCKS, DOCUMENTS
from tiered_kv.keys import BlockKey, Namespace, as_token_ids
from tiered_kv.layout import KVLayout

LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=64, dtype="float32", block_tokens=4)  # blocks of 2 KiB
T, BLOCK_BYTES = LAYOUT.block_tokens, LAYOUT.block_bytes


def namespace(epoch: int = 0) -> Namespace:
    """Returns the namespace of an epoch."""
    return Namespace(weights="made up for simulations", epoch=epoch)


@lru_cache(maxsize=DOCUMENTS)
def tokens_of(document: int) -> list[int]:
    """Returns the prompt of a document. Documents 2n and 2n + 1 share their first half."""
    half = BLOCKS * T // 2
    return [document // 2 * half + at for at in range(half)] + [1000 + document * half + at for at in range(half)]


@lru_cache(maxsize=64)
def keys_of(document: int, epoch: int) -> list[BlockKey]:
    """Returns the keys of a document's blocks."""
    return namespace(epoch).chain(LAYOUT).keys(as_token_ids(tokens_of(document)))


@lru_cache(maxsize=1024)
def bytes_of(key: BlockKey) -> bytes:
    """Returns the bytes of a block. For half of the keys the bytes can be compressed."""
    if key[0] % 2:
        return shake_128(key).digest(BLOCK_BYTES)
    return shake_128(key).digest(BLOCK_BYTES // 16) * 16


def kv_of(keys: list[BlockKey]) -> torch.Tensor:
    """Returns the KV (L, 2, H, N, D) of consecutive blocks."""
    blocks = [np.frombuffer(bytes_of(key), np.float32).reshape(LAYOUT.block_shape) for key in keys]
    return torch.from_numpy(np.concatenate(blocks, axis=-2))


def bytes_in(kv: torch.Tensor, block: int) -> bytes:
    """Returns the bytes of one block of a fetched KV."""
    return kv[..., block * T : (block + 1) * T, :].numpy().tobytes()
