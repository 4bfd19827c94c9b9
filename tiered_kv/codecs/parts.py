"""Shared base of the codecs that encode K and V of a block as two independent parts.

A part is K or V of a block, without the tokens that are stored unchanged (the exact tokens). K is rotated back by the model's
RoPE before it is quantized, if RoPE is known and the block is long enough for channel-wise scales. A part that is not rotated
back is multiplied by a fixed matrix if its codes have fewer than 8 bits. This is called spreading (see `rotation`).

The payload: the exact tokens (L, 2, H, sinks, D) | for K, then for V: scales bf16 | codes

Shapes: kv (L, 2, H, T, D). A part is (L, H, T, D), and float32 during computation.
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
from tiered_kv.layout import KVLayout, Layout

CHANNEL_TOKENS_MIN = 16
_of_thread = threading.local()


class Part(NamedTuple):
    """K or V of a block: its position in a payload, and the space in which it is quantized.

    `which`: 0 for K, 1 for V. `per_channel`: the groups are channels, not tokens. `rope`: the inverse frequencies by which the part is
    rotated back, or b"" if it is not. `is_spread`: the part is multiplied by the spreading matrix. `scales`, `codes`: where these
    are in the payload.
    """

    which: int
    per_channel: bool
    rope: bytes
    is_spread: bool
    scales: slice
    codes: slice


@dataclass(frozen=True)
class PartsCodec(BlockCodec):
    """A `BlockCodec` that encodes K and V as two parts, and falls back to the lossless codec.

    The size of a payload is known before encoding.

    `rope`: the inverse frequencies (see `rotation`), b"" for a model without RoPE, None if unknown.
    `rope_halves`: how channels are paired (see `turning`).
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
            raise self._invalid("rope_halves", "True or False")

    @classmethod
    def for_layout(cls, layout: Layout | None, *, rope: bytes | None = None, rope_halves: bool = True, **parameters: Any) -> Self:
        if not isinstance(layout, KVLayout):
            return cls(**parameters)
        shape = (layout.layers, layout.kv_heads, layout.block_tokens, layout.head_dim)
        return cls(shape, layout.dtype, rope=rope, rope_halves=rope_halves, **parameters)

    def _bound(self) -> float:
        return self.max_error_default if self.max_error is None else self.max_error

    @abstractmethod
    def _sizes(self, tokens: int, per_channel: bool) -> tuple[int, int]:
        """Returns the bytes of the scales and of the codes of a part with this many tokens."""

    @abstractmethod
    def _write(self, part: Part, kv: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Encodes the part `kv`, in the block's dtype and of any strides. Returns scales (bf16) and codes (1-D u8, as stored).

        The result for numbers that are not finite does not matter, but such numbers must not raise an error.
        """

    @abstractmethod
    def _read(self, part: Part, scales: torch.Tensor, codes: np.ndarray, out: torch.Tensor) -> None:
        """Decodes what `_write` returned into `out` (L, H, T, D) of the block's dtype, with any strides. `scales` are 1-D float32.

        Raises (kind `corrupt`) for invalid codes.
        """

    def _fill(self, payload: memoryview, kv: torch.Tensor) -> None:
        if self.shape is not None:
            self._layout.check_kv(kv, self.shape[2])
        if self.shape is None or payload.nbytes != self.payload_bytes:
            raise self._corrupt(f"payload of {payload.nbytes} bytes does not fit blocks of shape {self.shape}")
        data = np.frombuffer(payload, np.uint8)
        self._put_exact(data, kv)
        for part in self._parts():
            scales = torch.from_numpy(data[part.scales].copy()).view(torch.bfloat16).to(kv.device).float()
            self._read(part, scales, data[part.codes], kv[:, part.which, :, self._exact :])

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return self.payload_bytes if self.shape else 0

    @property
    def payload_bytes(self) -> int:
        """Exact size of a payload in bytes, scales and other side information included."""
        parts = self._parts()
        return parts[-1].codes.stop if parts else self._exact_bytes

    def _parts(self) -> list[Part]:
        """Returns K and V in the order of the payload, or an empty list if all tokens are exact."""
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

    def _to_code_space(self, part: Part, x: torch.Tensor) -> torch.Tensor:
        """Returns some layers `x` of a part as they are to be quantized: rotated back by RoPE, or spread, or unchanged."""
        if part.rope:
            return self._turning(part, x).turn(x, torch.empty_like(x), back=True)
        return x @ spreading_matrix(x.shape[-1]).to(x.device).T if part.is_spread else x

    def _from_code_space(self, part: Part, out: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Returns a function f(x, spare) that undoes `_to_code_space` and returns the layers.

        `spare` is scratch memory of the shape and dtype of `x`. The function may overwrite both.
        """
        if part.rope:
            return self._turning(part, out).turn
        if not part.is_spread:
            return lambda x, spare: x
        matrix = self._spreading(out)
        if matrix.dtype is torch.float32:
            return lambda x, spare: torch.matmul(x, matrix, out=spare)
        return lambda x, spare: _narrow(spare, matrix.dtype).copy_(x) @ matrix

    def _spreading(self, out: torch.Tensor) -> torch.Tensor:
        """Returns the matrix (D, D) that multiplies a decoded part, K or V, to undo its spreading.

        Spreading multiplied the part by the transpose before it was quantized (see `rotation.spreading_matrix`).
        """
        return spreading_matrix(out.shape[-1]).to(out.device, product_dtype(out))

    def _turning(self, part: Part, like: torch.Tensor) -> Turning:
        start = self.start + self._exact
        return turning(part.rope, self.rope_halves, start, *like.shape[2:]).to(like.device)


def product_dtype(out: torch.Tensor) -> torch.dtype:
    """Returns the dtype in which to multiply by the spreading matrix: bf16 for bf16 blocks on fast hardware, else float32.

    Only parts with codes of fewer than 8 bits are multiplied. The error of bf16 products is small compared to that of the codes.
    """
    is_fast = out.device.type == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.bfloat16 if out.dtype is torch.bfloat16 and is_fast else torch.float32


def _narrow(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a view of the first half of `memory` (contiguous float32), in the same shape and a dtype of half the width."""
    return memory.view(-1).view(dtype)[: memory.numel()].view(memory.shape)


def chunks_of(part: torch.Tensor, elements: int) -> list[slice]:
    """Splits the layers of a part into slices of about `elements` numbers, but of at least one layer."""
    step = max(elements // part[0].numel(), 1)
    return [slice(first, first + step) for first in range(0, len(part), step)]


def scratch_of(elements: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns two float32 scratch tensors of `elements` numbers each. Their contents are undefined.

    On the CPU they are reused by every call of the same thread: allocating memory of this size may cost more than the arithmetic.
    """
    if device.type != "cpu":
        return torch.empty(elements, device=device), torch.empty(elements, device=device)
    memory = getattr(_of_thread, "memory", None)
    if memory is None or memory.shape[1] < elements:
        memory = _of_thread.memory = np.empty((2, elements), np.float32)
    return torch.from_numpy(memory[0, :elements]), torch.from_numpy(memory[1, :elements])
