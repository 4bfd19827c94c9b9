"""Shared base of the codecs that store 8 bits or fewer for each number, with scales for each group of numbers.

A group is a channel of K over the block's tokens, or a token of V over a head's channels (KIVI, Liu et al. 2024; KVQuant, Hooper et
al. 2024; QuaRot, Ashkboos et al. 2024). K is grouped like V if its rotation is unknown, and in blocks too short
for a scale for each channel to pay off. Module `parts` covers exact tokens and rotations, and module `block` the bound on the error.

A part (K or V without the exact tokens) has scales (S, L, H, n) bf16 and packed codes (L, H, T, D).
n = D if groups are channels, n = T if they are tokens.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from tiered_kv.codecs.packing import pack, packed_bytes, unpack
from tiered_kv.codecs.parts import Part, PartsCodec, chunks_of, scratch_of

ENCODE_ELEMENTS = 1 << 17
"""Whole layers of about this many numbers are encoded at a time, so that intermediate results stay in the processor's cache."""
DECODE_ELEMENTS = 1 << 19
"""Whole layers of about this many numbers are decoded at a time, in 4 MiB of scratch memory that each thread reuses.

A block of a small model then decodes in few steps.
"""


@dataclass(frozen=True)
class GroupedCodec(PartsCodec):
    """A `PartsCodec` with codes of `bits` bits for each number, and `scales_of_group` scales for each group."""

    scales_of_group: ClassVar[int]

    @abstractmethod
    def _quantized(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantizes a part in groups along `axis`. Returns scales (S, L, H, 1 or T, D or 1) that bf16 can represent, and codes (u8).

        The result for numbers that are not finite does not matter.
        """

    @abstractmethod
    def _dequantize(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """Decodes codes and scales, as `_quantized` returned them, into `out`, contiguous float32."""

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """Packs the codes of a part into the bytes to store. `_unpack` is the inverse, and returns new memory."""
        return pack(codes, self.bits)

    def _unpack(self, packed: np.ndarray, codes: int) -> np.ndarray:
        return unpack(packed, codes, self.bits)

    def _packed_bytes(self, tokens: int, per_channel: bool) -> int:
        layers, heads, _, dim = self._dims
        return packed_bytes(layers * heads * tokens * dim, self.bits)

    def _sizes(self, tokens: int, per_channel: bool) -> tuple[int, int]:
        layers, heads, _, dim = self._dims
        return 2 * self.scales_of_group * layers * heads * (dim if per_channel else tokens), self._packed_bytes(tokens, per_channel)

    def _write(self, part: Part, kv: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        axis = -2 if part.per_channel else -1
        scales_shape = (self.scales_of_group, *kv.shape[:2], kv.shape[3 if part.per_channel else 2])
        scales = torch.empty(scales_shape, dtype=torch.bfloat16, device=kv.device)
        codes = torch.empty(kv.shape, dtype=torch.uint8, device=kv.device)
        for layers in chunks_of(kv, ENCODE_ELEMENTS):
            scale, codes[layers] = self._quantized(self._to_code_space(part, kv[layers].float()), axis)
            scales[:, layers] = scale.squeeze(axis)
        return scales, self._pack(codes.view(-1).cpu().numpy())

    def _read(self, part: Part, scales: torch.Tensor, codes: np.ndarray, out: torch.Tensor) -> None:
        whole = torch.from_numpy(self._unpack(codes, out.numel())).to(out.device).view(out.shape)
        scales = scales.view(self.scales_of_group, *out.shape[:2], -1).unsqueeze(-2 if part.per_channel else -1)
        rotated = self._from_code_space(part, out)
        chunks = chunks_of(out, DECODE_ELEMENTS)
        scratch = scratch_of(out[chunks[0]].numel(), out.device)
        for layers in chunks:
            x, spare = (memory[: whole[layers].numel()].view(whole[layers].shape) for memory in scratch)
            self._dequantize(whole[layers], scales[:, layers], x)
            out[layers] = rotated(x, spare)


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Converts float32 numbers that are whole and below 256 to u8. Converts through int32, which is four times faster on CPUs."""
    return codes.to(torch.int32).to(torch.uint8)


def round_to_bf16(x: torch.Tensor, up: bool) -> torch.Tensor:
    """Rounds float32 numbers up or down to numbers that bf16 can represent, so that scales cover a group's span.

    Numbers that are not finite stay so.
    """
    bits = x.contiguous().view(torch.int32)
    away = (x > 0) if up else (x < 0)
    return ((bits + away.to(torch.int32) * 0xFFFF) & ~0xFFFF).view(torch.float32)
