"""Integer codecs: each number as one of 2 ** bits steps between the least and the greatest of its group (see `grouped`).

A group's scales are its least number and its step.
"""

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch

from tiered_kv.codecs.grouped import GroupedCodec, as_bytes, towards_bf16
from tiered_kv.codecs.parts import Part


@dataclass(frozen=True)
class IntegerCodec(GroupedCodec):
    """A finite number x of a group that spans [a, b] comes back as x ± (b - a) / (2 (2 ** bits - 1)), up to the rounding of the
    scales to bf16 (the span may be 1/64 of |a| + |b| wider) and of the dtype; in the rotated space where there is a rotation,
    which keeps the mean squared error. For the whole block the bound of `GroupedCodec` holds.
    """

    scales_of_group: ClassVar[int] = 2

    def _coded(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        return in_steps(x, axis, self.bits)

    def _numbers(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        numbers_of_steps(codes, scales, out)

    def _read(self, part: Part, scales: torch.Tensor, codes: np.ndarray, out: torch.Tensor) -> None:
        kernels = kernels_of(out.device)
        if kernels is None or self.bits not in kernels.BITS or out.dtype not in kernels.DTYPES:
            super()._read(part, scales, codes, out)
            return
        kernels.restore(
            torch.from_numpy(codes.copy()).to(out.device),
            scales.view(self.scales_of_group, *out.shape[:2], -1),
            out,
            bits=self.bits,
            per_channel=part.per_channel,
            turn=self._turning(part, out) if part.rope else None,
            is_halves=self.rope_halves,
            matrix=self._spreading(out) if part.is_spread else None,
        )


@lru_cache
def kernels_of(device: torch.device) -> ModuleType | None:
    """The module of kernels, where they decode for a device: on CUDA, if triton is there and its kernels answer rightly."""
    if device.type != "cuda":
        return None
    try:
        from tiered_kv.codecs import kernels
    except ImportError:
        return None
    return kernels if kernels.works_on(device) else None


def in_steps(x: torch.Tensor, axis: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least numbers and steps (2, …) that bf16 can hold, and codes (u8) below 2 ** bits, of float32 numbers in groups along `axis`."""
    levels = 2**bits - 1
    least = towards_bf16(x.amin(axis, keepdim=True), up=False)
    step = towards_bf16((x.amax(axis, keepdim=True) - least) / levels, up=True)
    codes = (x - least).div_(torch.where(step > 0, step, 1)).round_()  # from 0 to `levels`, for least and step cover the span
    return torch.stack([least, step]), as_bytes(codes)


def numbers_of_steps(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write the numbers of what `in_steps` made to `out`, contiguous float32, and return that."""
    least, step = scales
    return out.copy_(codes).mul_(step).add_(least)


@dataclass(frozen=True)
class Int8Codec(IntegerCodec):
    """8 bits: 1.87 times less than bf16. `near_exact`: on the demo's model a sixtieth of the noise of bf16 arithmetic."""

    id: ClassVar[int] = 2
    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    max_error_default: ClassVar[float] = 4e-4


@dataclass(frozen=True)
class Int6Codec(IntegerCodec):
    """6 bits: 2.4 times less than bf16."""

    id: ClassVar[int] = 3
    name: ClassVar[str] = "int6"
    bits: ClassVar[int] = 6
    max_error_default: ClassVar[float] = 2.5e-3


@dataclass(frozen=True)
class Int4Codec(IntegerCodec):
    """4 bits: 3.5 times less than bf16. `balanced`, without calibration."""

    id: ClassVar[int] = 4
    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
    max_error_default: ClassVar[float] = 4e-2
