"""What codecs share that keep a block as 8 bits or less a number, in groups with their own scale.

A group is a channel of K over the block's tokens, K being turned back by the model's RoPE first, or a token of V over a head's
channels, below 8 bits after a fixed rotation (KIVI, Liu et al. 2024; KVQuant, Hooper et al. 2024; QuaRot, Ashkboos et al. 2024).
K is treated as V where its rotation is unknown, and in blocks too short to pay for a channel's scale.

The payload, with n = D for groups that are channels and T for tokens:

    the exact tokens (L, 2, H, sinks, D) | for K, then for V: scales (S, L, H, n) bf16 | packed codes (L, H, T, D)

Shapes: kv (L, 2, H, T, D); a part, K or V, is (L, H, T, D) without the exact tokens, float32 while it is worked on.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from tiered_kv.codecs.block import BlockCodec
from tiered_kv.codecs.packing import pack, packed_bytes, unpack
from tiered_kv.codecs.rotation import Turning, check_rope, spreading_matrix, turning
from tiered_kv.layout import KVLayout

CHANNEL_TOKENS_MIN = 16
ENCODE_ELEMENTS = 1 << 17
"""As many numbers are encoded at a time as whole layers have: what comes in between stays in the processor's cache."""
DECODE_ELEMENTS = 1 << 19
"""As many are decoded at a time, in 4 MiB of a thread's memory that is kept: few calls for the blocks of small models."""
_of_thread = threading.local()


class Part(NamedTuple):
    """Where K or V lies in a payload, and how it was quantized."""

    which: int
    per_channel: bool
    rope: bytes
    is_spread: bool
    scales: slice
    codes: slice


@dataclass(frozen=True)
class GroupedCodec(BlockCodec):
    """As `BlockCodec`; gives way to the lossless codec. The size of the payload is exact.

    `rope`: the inverse frequencies (see `rotation`), b"" for a model without, None if unknown; `rope_halves` says how channels are paired.
    """

    bits: ClassVar[int]
    scales_of_group: ClassVar[int]
    max_error_default: ClassVar[float]

    rope: bytes | None = None
    rope_halves: bool = True

    def __post_init__(self) -> None:
        if self.max_error is None:
            object.__setattr__(self, "max_error", self.max_error_default)
        super().__post_init__()
        if self.shape is not None:
            check_rope(self.rope, self.shape[3])
        if not isinstance(self.rope_halves, bool):
            raise self._refused("rope_halves", "True or False")

    @classmethod
    def for_layout(cls, layout: KVLayout | None, *, rope: bytes | None = None, rope_halves: bool = True, **parameters: Any) -> Self:
        if layout is None:
            return cls(**parameters)
        shape = (layout.layers, layout.kv_heads, layout.block_tokens, layout.head_dim)
        return cls(shape, layout.dtype, rope=rope, rope_halves=rope_halves, **parameters)

    @abstractmethod
    def _coded(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (S, L, H, 1 or T, D or 1), which bf16 holds exactly, and codes (u8) of a part whose groups lie along `axis`.

        What comes of numbers that are not finite does not matter.
        """

    @abstractmethod
    def _numbers(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        """Write the numbers of codes and scales, as `_coded` made them, to `out`, contiguous float32."""

    def _bound(self) -> float:
        return self.max_error

    def decode_kv(self, payload: memoryview, kv: torch.Tensor) -> None:
        if self.shape is not None:
            self._layout.check_kv(kv, self.shape[2])
        if self.shape is None or payload.nbytes != self.payload_bytes:
            raise self._corrupt(f"payload of {payload.nbytes} bytes for blocks of {self.shape}")
        data = np.frombuffer(payload, np.uint8)
        self._put_exact(data, kv)
        for part in self._parts():
            self._restore(part, data, kv[:, part.which, :, self._exact :])

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return self.payload_bytes if self.shape else 0

    @property
    def payload_bytes(self) -> int:
        """Exact size of a payload, all side information counted."""
        parts = self._parts()
        return parts[-1].codes.stop if parts else self._exact_bytes

    def _parts(self) -> list[Part]:
        """K and V in the order of the payload; none if all tokens are exact."""
        layers, heads, tokens, dim = self.shape
        tokens -= self._exact
        end, parts = self._exact_bytes, []
        for which in (0, 1) if tokens else ():
            per_channel = which == 0 and self.rope is not None and tokens >= CHANNEL_TOKENS_MIN
            scales_end = end + 2 * self.scales_of_group * layers * heads * (dim if per_channel else tokens)
            codes_end = scales_end + packed_bytes(layers * heads * tokens * dim, self.bits)
            is_spread = not per_channel and self.bits < 8
            rope = self.rope if per_channel else b""
            parts.append(Part(which, per_channel, rope, is_spread, slice(end, scales_end), slice(scales_end, codes_end)))
            end = codes_end
        return parts

    def _payload(self, kv: torch.Tensor) -> np.ndarray:
        payload = np.empty(self.payload_bytes, np.uint8)
        payload[: self._exact_bytes] = self._exact_of(kv)
        for part in self._parts():
            scales, codes = self._quantized(part, kv[:, part.which, :, self._exact :])
            payload[part.scales] = scales.view(-1).view(torch.uint8).cpu().numpy()
            payload[part.codes] = pack(codes.view(-1).cpu().numpy(), self.bits)
        return payload

    def _quantized(self, part: Part, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (S, L, H, n) in bf16, and codes (L, H, T, D) in u8, of a part in the block's dtype."""
        axis = -2 if part.per_channel else -1
        scales_shape = (self.scales_of_group, *kv.shape[:2], kv.shape[3 if part.per_channel else 2])
        scales = torch.empty(scales_shape, dtype=torch.bfloat16, device=kv.device)
        codes = torch.empty(kv.shape, dtype=torch.uint8, device=kv.device)
        for layers in _chunks(kv, ENCODE_ELEMENTS):
            scale, codes[layers] = self._coded(self._in_space(part, kv[layers].float()), axis)
            scales[:, layers] = scale.squeeze(axis)
        return scales, codes

    def _in_space(self, part: Part, x: torch.Tensor) -> torch.Tensor:
        """Some layers of a part, rotated to where they are quantized."""
        if part.rope:
            return self._turning(part, x).turn(x, torch.empty_like(x), back=True)
        return x @ spreading_matrix(x.shape[-1]).to(x.device).T if part.is_spread else x

    def _restore(self, part: Part, data: np.ndarray, out: torch.Tensor) -> None:
        """Fill `out` (L, H, T, D) of the block's dtype, strided as it may be."""
        codes = torch.from_numpy(unpack(data[part.codes], out.numel(), self.bits)).to(out.device).view(out.shape)
        scales = torch.from_numpy(data[part.scales].copy()).view(torch.bfloat16).to(out.device).float()
        scales = scales.view(self.scales_of_group, *out.shape[:2], -1).unsqueeze(-2 if part.per_channel else -1)
        rotated = self._rotated(part, out)
        chunks = _chunks(out, DECODE_ELEMENTS)
        scratch = _scratch(out[chunks[0]].numel(), out.device)
        for layers in chunks:
            x, spare = (memory[: codes[layers].numel()].view(codes[layers].shape) for memory in scratch)
            self._numbers(codes[layers], scales[:, layers], x)
            out[layers] = rotated(x, spare)

    def _rotated(self, part: Part, out: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The inverse of `_in_space`: (x, memory like x) -> the numbers of the block, in either memory."""
        if part.rope:
            return self._turning(part, out).turn
        if not part.is_spread:
            return lambda x, spare: x
        matrix = spreading_matrix(out.shape[-1]).to(out.device, _product_dtype(out))
        if matrix.dtype is torch.float32:
            return lambda x, spare: torch.matmul(x, matrix, out=spare)
        return lambda x, spare: _narrow(spare, matrix.dtype).copy_(x) @ matrix

    def _turning(self, part: Part, like: torch.Tensor) -> Turning:
        start = self.start + self._exact
        return turning(part.rope, self.rope_halves, start, *like.shape[2:]).to(like.device)


def _product_dtype(out: torch.Tensor) -> torch.dtype:
    """bf16 for blocks of bf16 where that is fast: its rounding is small beside that of the codes, which are of less than 8 bits."""
    is_fast = out.device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if out.dtype is torch.bfloat16 and is_fast else torch.float32


def _narrow(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The first half of contiguous float32 memory as as many numbers of a dtype of half the width."""
    return memory.view(-1).view(dtype)[: memory.numel()].view(memory.shape)


def _chunks(part: torch.Tensor, elements: int) -> list[slice]:
    """The layers of a part, as many at a time as have so many elements, but at least one."""
    step = max(elements // part[0].numel(), 1)
    return [slice(first, first + step) for first in range(0, len(part), step)]


def _scratch(elements: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice that many float32; on the CPU this thread's own, kept: new memory of this size may cost more than all the arithmetic."""
    if device.type != "cpu":
        return torch.empty(elements, device=device), torch.empty(elements, device=device)
    memory = getattr(_of_thread, "memory", None)
    if memory is None or memory.shape[1] < elements:
        memory = _of_thread.memory = np.empty((2, elements), np.float32)
    return torch.from_numpy(memory[0, :elements]), torch.from_numpy(memory[1, :elements])


def towards_bf16(x: torch.Tensor, up: bool) -> torch.Tensor:
    """Float32 numbers rounded up or down to what bf16 can hold, so that a group's span is covered; those that are not finite stay so."""
    bits = x.contiguous().view(torch.int32)
    away = (x > 0) if up else (x < 0)
    return ((bits + away.to(torch.int32) * 0xFFFF) & ~0xFFFF).view(torch.float32)
