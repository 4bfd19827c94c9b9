"""What codecs share that code a block as two parts, K and V, by themselves.

K is turned back by the model's RoPE first, where that is known and the block is long enough for channels to pay; what has no rotation
of its own is multiplied by a fixed matrix below 8 bits (see `rotation`).

The payload: the exact tokens (L, 2, H, sinks, D) | for K, then for V: scales bf16 | codes

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
from tiered_kv.codecs.rotation import Turning, check_rope, spreading_matrix, turning
from tiered_kv.layout import KVLayout

CHANNEL_TOKENS_MIN = 16
_of_thread = threading.local()


class Part(NamedTuple):
    """Where K or V lies in a payload, and the space in which it was coded."""

    which: int
    per_channel: bool
    rope: bytes
    is_spread: bool
    scales: slice
    codes: slice


@dataclass(frozen=True)
class PartsCodec(BlockCodec):
    """As `BlockCodec`; gives way to the lossless codec. The size of the payload is exact.

    `rope`: the inverse frequencies (see `rotation`), b"" for a model without, None if unknown; `rope_halves` says how channels are paired.
    """

    bits: ClassVar[int]
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

    def _bound(self) -> float:
        return self.max_error_default if self.max_error is None else self.max_error

    @abstractmethod
    def _sizes(self, tokens: int, per_channel: bool) -> tuple[int, int]:
        """Bytes of the scales and of the codes of a part of so many tokens."""

    @abstractmethod
    def _write(self, part: Part, kv: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Scales (bf16) and codes (1-D u8, as they are kept) of a part in the block's dtype, strided as it may be.

        What comes of numbers that are not finite does not matter, but it must not raise.
        """

    @abstractmethod
    def _read(self, part: Part, scales: torch.Tensor, codes: np.ndarray, out: torch.Tensor) -> None:
        """Fill `out` (L, H, T, D) of the block's dtype, strided as it may be, from what `_write` made; scales are 1-D float32 there.

        Raises (kind `corrupt`) for codes that cannot be.
        """

    def _fill(self, payload: memoryview, kv: torch.Tensor) -> None:
        if self.shape is not None:
            self._layout.check_kv(kv, self.shape[2])
        if self.shape is None or payload.nbytes != self.payload_bytes:
            raise self._corrupt(f"payload of {payload.nbytes} bytes for blocks of {self.shape}")
        data = np.frombuffer(payload, np.uint8)
        self._put_exact(data, kv)
        for part in self._parts():
            scales = torch.from_numpy(data[part.scales].copy()).view(torch.bfloat16).to(kv.device).float()
            self._read(part, scales, data[part.codes], kv[:, part.which, :, self._exact :])

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return self.payload_bytes if self.shape else 0

    @property
    def payload_bytes(self) -> int:
        """Exact size of a payload, all side information counted."""
        parts = self._parts()
        return parts[-1].codes.stop if parts else self._exact_bytes

    def _parts(self) -> list[Part]:
        """K and V in the order of the payload; none if all tokens are exact."""
        tokens = self._dims[2] - self._exact
        end = self._exact_bytes
        parts: list[Part] = []
        for which in (0, 1) if tokens else ():
            per_channel = which == 0 and self.rope is not None and tokens >= CHANNEL_TOKENS_MIN
            scales_end, codes_end = (end + size for size in np.cumsum(self._sizes(tokens, per_channel)).tolist())
            is_spread = not per_channel and self.bits < 8
            rope = self.rope if per_channel and self.rope is not None else b""
            parts.append(Part(which, per_channel, rope, is_spread, slice(end, scales_end), slice(scales_end, codes_end)))
            end = codes_end
        return parts

    def _payload(self, kv: torch.Tensor) -> np.ndarray:
        payload = np.empty(self.payload_bytes, np.uint8)
        payload[: self._exact_bytes] = self._exact_of(kv)
        for part in self._parts():
            scales, payload[part.codes] = self._write(part, kv[:, part.which, :, self._exact :])
            payload[part.scales] = scales.view(-1).view(torch.uint8).cpu().numpy()
        return payload

    def _in_space(self, part: Part, x: torch.Tensor) -> torch.Tensor:
        """Some layers of a part, rotated to where they are quantized."""
        if part.rope:
            return self._turning(part, x).turn(x, torch.empty_like(x), back=True)
        return x @ spreading_matrix(x.shape[-1]).to(x.device).T if part.is_spread else x

    def _rotated(self, part: Part, out: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The inverse of `_in_space`: (x, memory like x) -> the numbers of the block, in either memory."""
        if part.rope:
            return self._turning(part, out).turn
        if not part.is_spread:
            return lambda x, spare: x
        matrix = self._spreading(out)
        if matrix.dtype is torch.float32:
            return lambda x, spare: torch.matmul(x, matrix, out=spare)
        return lambda x, spare: _narrow(spare, matrix.dtype).copy_(x) @ matrix

    def _spreading(self, out: torch.Tensor) -> torch.Tensor:
        """What a part that is spread is multiplied by to have the numbers of the block again."""
        return spreading_matrix(out.shape[-1]).to(out.device, product_dtype(out))

    def _turning(self, part: Part, like: torch.Tensor) -> Turning:
        start = self.start + self._exact
        return turning(part.rope, self.rope_halves, start, *like.shape[2:]).to(like.device)


def product_dtype(out: torch.Tensor) -> torch.dtype:
    """bf16 for blocks of bf16 where that is fast: its rounding is small beside that of the codes, which are of less than 8 bits."""
    is_fast = out.device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if out.dtype is torch.bfloat16 and is_fast else torch.float32


def _narrow(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The first half of contiguous float32 memory as as many numbers of a dtype of half the width."""
    return memory.view(-1).view(dtype)[: memory.numel()].view(memory.shape)


def chunks_of(part: torch.Tensor, elements: int) -> list[slice]:
    """The layers of a part, as many at a time as have so many elements, but at least one."""
    step = max(elements // part[0].numel(), 1)
    return [slice(first, first + step) for first in range(0, len(part), step)]


def scratch_of(elements: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice that many float32; on the CPU this thread's own, kept: new memory of this size may cost more than all the arithmetic."""
    if device.type != "cpu":
        return torch.empty(elements, device=device), torch.empty(elements, device=device)
    memory = getattr(_of_thread, "memory", None)
    if memory is None or memory.shape[1] < elements:
        memory = _of_thread.memory = np.empty((2, elements), np.float32)
    return torch.from_numpy(memory[0, :elements]), torch.from_numpy(memory[1, :elements])
