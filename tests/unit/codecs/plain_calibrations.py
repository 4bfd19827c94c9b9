"""Plain calibration tables for blocks of any shape, so that tests can run calibrated codecs without a model."""

from functools import lru_cache

import torch

from tiered_kv.codecs.calibrated.tables import Calibration, EcuqTables, XlayerTables
from tiered_kv.layout import KVLayout


def plain_calibration(layout: KVLayout, rope: bytes = b"") -> Calibration:
    """Returns tables with means of zero, steps of 1e-2 at the default step for numbers of size 1, and no prediction across layers."""
    return _plain(layout.layers, layout.kv_heads, layout.head_dim, rope)


@lru_cache(maxsize=64)
def _plain(layers: int, kv_heads: int, head_dim: int, rope: bytes) -> Calibration:
    channels = 2 * kv_heads * head_dim
    zeros, ones = torch.zeros(layers, channels), torch.ones(layers, channels)
    unit = torch.eye(channels).expand(layers, 1, channels, channels)
    matrix = torch.cat([torch.zeros(layers, 1, channels, 2 * channels), 100 * unit], -1).bfloat16()
    return Calibration(
        model="none",
        weights=(),
        layers=layers,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope,
        rope_halves=True,
        tokens=100_000,
        ecuq=EcuqTables(zeros, 200 * ones, ones),
        xlayer=XlayerTables(zeros, ones, matrix),
        errors={"ecuq": ((6e-5, 1e-2),), "xlayer": ((1e-4, 1e-2),)},
    )
