"""A small synthetic calibration, and KV that fits it: each layer is predicted from the two previous ones."""

import torch

from tiered_kv.codecs.calibrated.tables import Calibration, EcuqTables, XlayerTables
from tiered_kv.codecs.rotation import rope_of_theta, turning
from tiered_kv.layout import KVLayout

LAYERS, HEADS, DIM = 3, 2, 8
ROPE = rope_of_theta(10_000, DIM)
CHANNELS = 2 * HEADS * DIM
NOISE = 0.05


def layout_of(tokens: int = 32, dtype: str = "bfloat16") -> KVLayout:
    """Returns the layout of blocks of the calibration's model."""
    return KVLayout(LAYERS, HEADS, DIM, dtype, tokens)


def calibration(groups: int = 1, rope: bytes = ROPE, seed: int = 0) -> Calibration:
    """Returns tables with orthogonal axes. A step of 1e-3 is about a hundredth of a deviation of the KV that `kv_of` makes."""
    generator = torch.Generator().manual_seed(seed)
    size = CHANNELS // groups
    mean = 2 * torch.randn(LAYERS, CHANNELS, generator=generator)
    axes = torch.linalg.qr(torch.randn(LAYERS, groups, size, size, generator=generator)).Q
    predictor = torch.randn(LAYERS, groups, size, 2 * size, generator=generator) * (0.5 / size) ** 0.5
    spread = torch.linspace(1, 0.05, size).repeat(LAYERS, groups)
    tables = XlayerTables(mean, spread, torch.cat([predictor, axes], -1).bfloat16())
    width = torch.rand(LAYERS, CHANNELS, generator=generator) + 0.5
    return Calibration(
        model="tiny",
        weights=("a", "b"),
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=DIM,
        rope=rope,
        rope_halves=True,
        tokens=50_000,
        ecuq=EcuqTables(_plain(mean, groups), width, 1 / width),
        xlayer=tables,
        errors={name: ((1e-3, 1e-4), (1e-1, 0.2)) for name in ("ecuq", "xlayer")},
    )


def kv_of(made: Calibration, layout: KVLayout, start: int = 0, seed: int = 0) -> torch.Tensor:
    """Returns KV (L, 2, H, T, D) at position `start`, drawn from the distribution that the xlayer tables describe."""
    generator = torch.Generator().manual_seed(seed)
    groups, size = made.xlayer.groups, CHANNELS // made.xlayer.groups
    matrix, spread = made.xlayer.matrix.float(), made.xlayer.spread.view(LAYERS, groups, size)
    x = torch.zeros(LAYERS + 2, groups, size, layout.block_tokens)
    for layer in range(LAYERS):
        codes = torch.randn(groups, size, layout.block_tokens, generator=generator) * spread[layer, :, :, None]
        x[layer + 2] = matrix[layer] @ torch.cat([x[layer], x[layer + 1], codes], 1)
    x = x[2:].reshape(LAYERS, CHANNELS, -1) + made.xlayer.mean[..., None]
    x = x.view(LAYERS, groups, 2, HEADS // groups, DIM, -1).transpose(1, 2).reshape(LAYERS, 2, HEADS, DIM, -1).transpose(-1, -2)
    kv = x.contiguous()
    if made.rope:
        kv[:, 0] = turning(made.rope, True, start, layout.block_tokens, DIM).turn(kv[:, 0].clone(), torch.empty_like(kv[:, 0]))
    return kv.to(layout.torch_dtype)


def _plain(mean: torch.Tensor, groups: int) -> torch.Tensor:
    return mean.view(LAYERS, groups, 2, -1).transpose(1, 2).reshape(LAYERS, -1).contiguous()
