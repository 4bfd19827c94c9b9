"""KV for the tests of this folder: random, but shaped as a model's is."""

import torch

from tiered_kv.layout import KVLayout


def kv_of(layout: KVLayout, seed: int = 0) -> torch.Tensor:
    """(L, 2, H, T, D): channels of K with means and sizes of their own, V without."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(layout.block_shape, generator=generator)
    sizes = torch.rand(layout.layers, layout.kv_heads, 1, layout.head_dim, generator=generator)
    kv[:, 0] = kv[:, 0] * sizes + 8 * (sizes - 0.5)
    return kv.to(layout.torch_dtype)


def as_bytes(kv: torch.Tensor) -> torch.Tensor:
    """The 1-D bytes of a tensor, a view if it is contiguous."""
    return kv.contiguous().view(-1).view(torch.uint8)
