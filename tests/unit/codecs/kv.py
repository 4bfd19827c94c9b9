"""Random KV for the tests of this folder, with the statistics of a model's KV."""

import torch

from tiered_kv.layout import KVLayout


def kv_of(layout: KVLayout, seed: int = 0) -> torch.Tensor:
    """Returns KV (L, 2, H, T, D). The channels of K have different means and sizes, those of V do not."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(layout.block_shape, generator=generator)
    sizes = torch.rand(layout.layers, layout.kv_heads, 1, layout.head_dim, generator=generator)
    kv[:, 0] = kv[:, 0] * sizes + 8 * (sizes - 0.5)
    return kv.to(layout.torch_dtype)


def as_bytes(kv: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's bytes as 1-D uint8. The result is a view if the tensor is contiguous."""
    return kv.contiguous().view(-1).view(torch.uint8)
