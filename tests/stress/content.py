"""The documents of the stress test: what their tokens are, and what the KV of each must be, to the last byte.

Axes: L layers, 2 (key, value), H KV heads, N tokens, D head dim. The content under one key never differs, so every
element is a function of its document and its place: no element of one document equals that of another.
"""

import torch

from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout

LAYOUT = KVLayout(layers=8, kv_heads=8, head_dim=64, dtype="float32", block_tokens=64)  # blocks of 2 MiB
NAMESPACE = Namespace.of("stress")
BLOCKS = 4
TOKENS = BLOCKS * LAYOUT.block_tokens
DOCUMENTS = 24

_PLACES = 4093  # a prime: equal places of two blocks, rows or heads differ as well
_STEP = 4096


def tokens_of(document: int) -> list[int]:
    """The prompt of a document; no two share a block."""
    return [document * TOKENS + position for position in range(TOKENS)]


def places_L2HND() -> torch.Tensor:
    """The part of the content that says where an element belongs."""
    shape = LAYOUT.kv_shape(TOKENS)
    return (torch.arange(torch.Size(shape).numel()) % _PLACES).reshape(shape).to(torch.float32)


def mark_of(document: int) -> float:
    """The part of the content that says to whom an element belongs; added to its place, exact in float32."""
    return float(document * _STEP)
