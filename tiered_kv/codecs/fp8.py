"""The fp8 codec: each number as an e4m3 float (Micikevicius et al., FP8 Formats for Deep Learning, 2022) times its group's scale.

For hardware that computes in it; at the same size int8 is seventy times nearer in KL (docs/design/013).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from tiered_kv.codecs.grouped import GroupedCodec, towards_bf16

GREATEST = 448.0


@dataclass(frozen=True)
class Fp8Codec(GroupedCodec):
    """A finite number x comes back as x ± |x| / 16, or ± 2 ** -10 of the scale where that is more, up to the rounding of the dtype.

    The scale brings a group's greatest number to 448, the greatest of e4m3. For the whole block the bound of `GroupedCodec` holds.
    """

    id: ClassVar[int] = 5
    name: ClassVar[str] = "fp8"
    bits: ClassVar[int] = 8
    scales_of_group: ClassVar[int] = 1
    max_error_default: ClassVar[float] = 4e-3

    def _coded(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = towards_bf16(x.abs().amax(axis, keepdim=True) / GREATEST, up=True)
        floats = torch.where(scale > 0, x / scale, 0).clamp_(-GREATEST, GREATEST).to(torch.float8_e4m3fn)
        return scale[None], floats.view(torch.uint8)

    def _numbers(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        # Sign, exponent and mantissa shifted to where float32 has them are the number times 2 ** -120, subnormal ones
        # included; converting by dtype is ten times slower on CPUs. The sign fills the bits above it, as of an int8.
        out.view(torch.int32).copy_(codes.view(torch.int8)).bitwise_left_shift_(20).bitwise_and_(-0x78100000)
        out.mul_(2.0**120).mul_(scales[0])
