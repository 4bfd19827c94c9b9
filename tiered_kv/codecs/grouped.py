"""What codecs share that keep a block as 8 bits or less a number, in groups with their own scale.

A group is a channel of K over the block's tokens, or a token of V over a head's channels (KIVI, Liu et al. 2024; KVQuant, Hooper et
al. 2024; QuaRot, Ashkboos et al. 2024). K is treated as V where its rotation is unknown, and in blocks too short to pay for a
channel's scale. Exact tokens, rotations and the bound: see `parts`.

Of a part, with n = D for groups that are channels and T for tokens: scales (S, L, H, n) bf16, packed codes (L, H, T, D).
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from tiered_kv.codecs.packing import pack, packed_bytes, unpack
from tiered_kv.codecs.parts import Part, PartsCodec, chunks_of, scratch_of

ENCODE_ELEMENTS = 1 << 17
"""As many numbers are encoded at a time as whole layers have: what comes in between stays in the processor's cache."""
DECODE_ELEMENTS = 1 << 19
"""As many are decoded at a time, in 4 MiB of a thread's memory that is kept: few calls for the blocks of small models."""


@dataclass(frozen=True)
class GroupedCodec(PartsCodec):
    """`bits` a number and `scales_of_group` numbers a group; the rest as of `PartsCodec`."""

    scales_of_group: ClassVar[int]

    @abstractmethod
    def _coded(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (S, L, H, 1 or T, D or 1), which bf16 holds exactly, and codes (u8) of a part whose groups lie along `axis`.

        What comes of numbers that are not finite does not matter.
        """

    @abstractmethod
    def _numbers(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """Write the numbers of codes and scales, as `_coded` made them, to `out`, contiguous float32."""

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        """The codes of a part as they are kept, and `_unpack` the codes again, in new memory."""
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
            scale, codes[layers] = self._coded(self._in_space(part, kv[layers].float()), axis)
            scales[:, layers] = scale.squeeze(axis)
        return scales, self._pack(codes.view(-1).cpu().numpy())

    def _read(self, part: Part, scales: torch.Tensor, codes: np.ndarray, out: torch.Tensor) -> None:
        whole = torch.from_numpy(self._unpack(codes, out.numel())).to(out.device).view(out.shape)
        scales = scales.view(self.scales_of_group, *out.shape[:2], -1).unsqueeze(-2 if part.per_channel else -1)
        rotated = self._rotated(part, out)
        chunks = chunks_of(out, DECODE_ELEMENTS)
        scratch = scratch_of(out[chunks[0]].numel(), out.device)
        for layers in chunks:
            x, spare = (memory[: whole[layers].numel()].view(whole[layers].shape) for memory in scratch)
            self._numbers(whole[layers], scales[:, layers], x)
            out[layers] = rotated(x, spare)


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """Float32 numbers that are whole and below 256 as u8; by way of int32, which processors convert to and from four times faster."""
    return codes.to(torch.int32).to(torch.uint8)


def towards_bf16(x: torch.Tensor, up: bool) -> torch.Tensor:
    """Float32 numbers rounded up or down to what bf16 can hold, so that a group's span is covered; those that are not finite stay so."""
    bits = x.contiguous().view(torch.int32)
    away = (x > 0) if up else (x < 0)
    return ((bits + away.to(torch.int32) * 0xFFFF) & ~0xFFFF).view(torch.float32)
