"""What lossy codecs of blocks with a known layout share: parts, exact tokens, and an error that is measured.

A block is coded as two parts, K and V. K is turned back by the model's RoPE first, where that is known and the block is long enough
for channels to pay; what has no rotation of its own is multiplied by a fixed matrix below 8 bits (see `rotation`). The first tokens
of a sequence, on which all later ones lean (Xiao et al. 2023), stay exact.

The payload: the exact tokens (L, 2, H, sinks, D) | for K, then for V: scales bf16 | codes

Shapes: kv (L, 2, H, T, D); a part, K or V, is (L, H, T, D) without the exact tokens, float32 while it is worked on.
"""

import math
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from tiered_kv.codecs.base import Codec, Encoded, check_raw
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.codecs.lossless import LosslessCodec
from tiered_kv.codecs.rotation import Turning, check_rope, spreading_matrix, turning
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES, KVLayout

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
class MeasuredCodec(Codec):
    """The relative mean squared error of any layer's K or V is at most `max_error`, together with what the block carried before, and
    every number is finite: a block for which that would not hold is kept losslessly (`fell_back` says "error"), as is one that
    would not shrink ("no gain") and one without a layout ("opaque"). The size of the payload is exact.

    `shape` is (L, H, T, D); `start` the position of the first token; `sinks` of a sequence's first tokens stay exact; `rope` the inverse
    frequencies (see `rotation`), b"" for a model without, None if unknown; `rope_halves` says how channels are paired.
    """

    is_lossy: ClassVar[bool] = True
    bits: ClassVar[int]
    max_error_default: ClassVar[float]

    shape: tuple[int, int, int, int] | None = None
    dtype: str = "bfloat16"
    start: int = 0
    sinks: int = 4
    rope: bytes | None = None
    rope_halves: bool = True
    max_error: float | None = None

    def __post_init__(self) -> None:
        if self.max_error is None:
            object.__setattr__(self, "max_error", self.max_error_default)
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
            if len(self.shape) != 4:
                raise self._refused("shape", "four whole numbers (L, H, T, D)")
            object.__setattr__(self, "dtype", self._layout.dtype)  # raises for what is none
            check_rope(self.rope, self.shape[3])
        for name in ("start", "sinks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise self._refused(name, "a whole number of at least 0")
        if not isinstance(self.rope_halves, bool):
            raise self._refused("rope_halves", "True or False")
        if not isinstance(self.max_error, float) or not 0 <= self.max_error < math.inf:
            raise self._refused("max_error", "a float of at least 0")

    @classmethod
    def for_layout(cls, layout: KVLayout | None, *, rope: bytes | None = None, rope_halves: bool = True, **parameters: Any) -> Self:
        if layout is None:
            return cls(**parameters)
        shape = (layout.layers, layout.kv_heads, layout.block_tokens, layout.head_dim)
        return cls(shape, layout.dtype, rope=rope, rope_halves=rope_halves, **parameters)

    def at(self, start: int) -> Self:
        return replace(self, start=start)

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

    def encode(self, raw: torch.Tensor, carried_error: float = 0.0) -> Encoded:
        """As of every codec. Decodes what it made, to measure the error."""
        check_raw(raw)
        if self.shape is None:
            return self._give_way(raw, carried_error, "opaque")
        if raw.numel() != self.raw_bytes:
            raise TieredKVError(Kind.LAYOUT, f"{self.name}: a block of {raw.numel()} bytes; {self.raw_bytes} are needed", codec=self.name)
        if self.payload_bytes >= self.raw_bytes:
            return self._give_way(raw, carried_error, "no gain")
        kv = self._typed(raw.detach() if self._is_aligned(raw) else raw.clone())
        with as_written(kv.device):
            payload = memoryview(self._payload(kv))
        again = torch.empty_like(kv)
        self.decode_kv(payload, again)
        error = carried_error + relative_error(kv, again)
        if not error <= self.max_error:  # nor if it is no number
            return self._give_way(raw, carried_error, "error")
        return Encoded(self, payload, error)

    def decode(self, payload: memoryview, out: torch.Tensor) -> None:
        check_raw(out, "out")
        if self.shape is None or out.numel() != self.raw_bytes:
            raise self._corrupt(f"a block of {out.numel()} bytes cannot be what {self.shape} of {self.dtype} is")
        target = out if self._is_aligned(out) else torch.empty_like(out)
        self.decode_kv(payload, self._typed(target))
        if target is not out:
            out.copy_(target)

    def decode_kv(self, payload: memoryview, kv: torch.Tensor) -> None:
        if self.shape is not None:
            self._layout.check_kv(kv, self.shape[2])
        if self.shape is None or payload.nbytes != self.payload_bytes:
            raise self._corrupt(f"payload of {payload.nbytes} bytes for blocks of {self.shape}")
        data = np.frombuffer(payload, np.uint8)
        if self._exact:
            exact = torch.from_numpy(data[: self._exact_bytes].copy()).view(kv.dtype)
            kv[..., : self._exact, :] = exact.view(*kv.shape[:3], self._exact, kv.shape[4]).to(kv.device)
        with as_written(kv.device):
            for part in self._parts():
                scales = torch.from_numpy(data[part.scales].copy()).view(torch.bfloat16).to(kv.device).float()
                self._read(part, scales, data[part.codes], kv[:, part.which, :, self._exact :])

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return self.payload_bytes if self.shape else 0

    @property
    def raw_bytes(self) -> int:
        """Bytes of the block."""
        return self._layout.block_bytes

    @property
    def _layout(self) -> KVLayout:
        layers, heads, tokens, dim = self.shape
        return KVLayout(layers, heads, dim, self.dtype, tokens)

    @property
    def payload_bytes(self) -> int:
        """Exact size of a payload, all side information counted."""
        parts = self._parts()
        return parts[-1].codes.stop if parts else self._exact_bytes

    @property
    def _exact(self) -> int:
        """How many of the block's tokens are among the first of the sequence."""
        return min(max(self.sinks - self.start, 0), self.shape[2])

    @property
    def _exact_bytes(self) -> int:
        return self.raw_bytes // self.shape[2] * self._exact

    def _parts(self) -> list[Part]:
        """K and V in the order of the payload; none if all tokens are exact."""
        tokens = self.shape[2] - self._exact
        end, parts = self._exact_bytes, []
        for which in (0, 1) if tokens else ():
            per_channel = which == 0 and self.rope is not None and tokens >= CHANNEL_TOKENS_MIN
            scales_end, codes_end = (end + size for size in np.cumsum(self._sizes(tokens, per_channel)).tolist())
            is_spread = not per_channel and self.bits < 8
            rope = self.rope if per_channel else b""
            parts.append(Part(which, per_channel, rope, is_spread, slice(end, scales_end), slice(scales_end, codes_end)))
            end = codes_end
        return parts

    def _typed(self, flat: torch.Tensor) -> torch.Tensor:
        layers, heads, tokens, dim = self.shape
        return flat.view(getattr(torch, self.dtype)).view(layers, 2, heads, tokens, dim)

    def _is_aligned(self, flat: torch.Tensor) -> bool:
        return not flat.storage_offset() % ITEM_BYTES[self.dtype]

    def _payload(self, kv: torch.Tensor) -> np.ndarray:
        payload = np.empty(self.payload_bytes, np.uint8)
        exact = kv[..., : self._exact, :].contiguous().view(-1).view(torch.uint8)
        payload[: self._exact_bytes] = exact.cpu().numpy()
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

    def _give_way(self, raw: torch.Tensor, carried_error: float, why: str) -> Encoded:
        lossless = LosslessCodec(ITEM_BYTES[self.dtype] if self.shape else 1)
        return replace(lossless.encode(raw, carried_error), fell_back=why)

    def _refused(self, name: str, needed: str) -> TieredKVError:
        return TieredKVError(Kind.CONFIG, f"{self.name}: {name} must be {needed}, not {getattr(self, name)!r}", setting=name)

    def _corrupt(self, what: str) -> TieredKVError:
        return TieredKVError(Kind.CORRUPT, f"{self.name}: {what}", codec=self.name)


def product_dtype(out: torch.Tensor) -> torch.dtype:
    """bf16 for blocks of bf16 where that is fast: its rounding is small beside that of the codes, which are of less than 8 bits."""
    is_fast = out.device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if out.dtype is torch.bfloat16 and is_fast else torch.float32


def _narrow(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The first half of contiguous float32 memory as as many numbers of a dtype of half the width."""
    return memory.view(-1).view(dtype)[: memory.numel()].view(memory.shape)


def as_written(device: torch.device) -> torch.autocast:
    """Where products are computed in the dtype of their factors, though a caller's autocast region says otherwise."""
    return torch.autocast(device.type, enabled=False)


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
