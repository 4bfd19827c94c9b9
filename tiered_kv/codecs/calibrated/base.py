"""Shared base of codecs with tables fitted to a model: table lookup, quantization step, and fallback when the tables do not fit.

Numbers are rounded along axes that are scaled so that a step on any of them changes the next tokens' distribution equally.
The KL divergence grows with the square of the step. The codes are packed by `row_packing`.

The payload: the tokens stored unchanged ("exact", see `block`) | packed codes.
"""

import math
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
import torch

from tiered_kv.codecs.base import Encoded
from tiered_kv.codecs.block import BlockCodec
from tiered_kv.codecs.calibrated.row_packing import Alphabet, pack
from tiered_kv.codecs.calibrated.tables import FINGERPRINT_BYTES, Calibration, calibration_of, register
from tiered_kv.codecs.grouped import GroupedCodec
from tiered_kv.codecs.integer import Int4Codec, Int6Codec, Int8Codec
from tiered_kv.codecs.rotation import turning
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout, Layout

STEP_LEAST, STEP_GREATEST = 1e-7, 1e-1
FINISH_ELEMENTS = 1 << 18
"""`_finish` decodes whole layers of about this many numbers at a time, so that intermediate results stay in the processor's cache."""
_of_thread = threading.local()


@dataclass(frozen=True)
class CalibratedCodec(BlockCodec):
    """A `BlockCodec` that quantizes with the tables of the calibration `fingerprint`.

    `step` is the quantization step. `tail_step`, if given, is the step for the last block of a chain. The calibration
    gives the bound on the error (`Calibration.bound`), unless `max_error` is given.

    A block whose error would exceed the bound falls back to int8 ("error"). A block falls back to an integer codec ("domain")
    if that codec makes the block at least as small at the same quality: int4, int6 or int8, depending on the step. Decoding
    raises (kind `corrupt`) if the calibration is not registered.
    """

    needs_calibration: ClassVar[bool] = True
    step_default: ClassVar[float]

    step: float | None = None
    tail_step: float | None = None
    fingerprint: bytes = b""

    def __post_init__(self) -> None:
        if self.step is None:
            object.__setattr__(self, "step", self.step_default)
        super().__post_init__()
        for name in ("step", "tail_step"):
            value = getattr(self, name)
            if not (isinstance(value, float) and STEP_LEAST <= value <= STEP_GREATEST) and (value is not None or name == "step"):
                raise self._invalid(name, f"a float from {STEP_LEAST:g} to {STEP_GREATEST:g}")
        if not isinstance(self.fingerprint, bytes) or len(self.fingerprint) not in (0, FINGERPRINT_BYTES):
            raise self._invalid("fingerprint", f"{FINGERPRINT_BYTES} bytes")

    @classmethod
    def for_layout(
        cls,
        layout: Layout | None,
        *,
        rope: bytes | None = None,
        rope_halves: bool = True,
        calibration: Calibration | None = None,
        **parameters: Any,
    ) -> Self:
        """Returns the codec for a layout (see `Codec.for_layout`) and registers the calibration. RoPE comes from the calibration."""
        if not isinstance(layout, KVLayout) or calibration is None:
            return cls(**parameters)
        if (layout.layers, layout.kv_heads, layout.head_dim) != (calibration.layers, calibration.kv_heads, calibration.head_dim):
            made_for = f"{calibration.layers} layers of {calibration.kv_heads} KV heads of {calibration.head_dim}"
            message = f"{cls.name}: the calibration of {calibration.model} is for {made_for}, got a layout of {layout.spec}"
            raise TieredKVError(Kind.CONFIG, message, codec=cls.name, setting="calibration")
        shape = (layout.layers, layout.kv_heads, layout.block_tokens, layout.head_dim)
        return cls(shape, layout.dtype, fingerprint=bytes.fromhex(register(calibration)), **parameters)

    @classmethod
    def parameters_of(cls, text: str) -> dict[str, Any]:
        """Parses `STEP` or `STEP:STEP_OF_LAST_BLOCK`, the second for the last block of a chain. Raises (kind `config`) for other texts."""
        try:
            steps = [float(part) for part in text.split(":")]
        except ValueError:
            steps = []
        if not 1 <= len(steps) <= 2 or not all(STEP_LEAST <= step <= STEP_GREATEST for step in steps):
            allowed = (
                f"{cls.name}, {cls.name}:STEP or {cls.name}:STEP:STEP OF THE LAST BLOCK, steps from {STEP_LEAST:g} to {STEP_GREATEST:g}"
            )
            raise TieredKVError(Kind.CONFIG, f"codec must be {allowed}, got '{cls.name}:{text}'", codec=cls.name)
        return dict(zip(("step", "tail_step"), steps, strict=False))

    def at(self, start: int, is_last_block: bool = False) -> Self:
        return replace(self, start=start, step=self.tail_step if is_last_block and self.tail_step else self.step)

    def encode(self, raw: torch.Tensor, carried_error: float = 0.0) -> Encoded:
        encoded = super().encode(raw, carried_error)
        if encoded.codec is self and encoded.payload.nbytes >= self._simple().payload_bytes:
            return self._fall_back(raw, carried_error, "domain")
        return encoded

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return self.raw_bytes if self.shape else 0

    def _calibration(self) -> Calibration:
        calibration = calibration_of(self.fingerprint.hex())
        if (calibration.layers, calibration.kv_heads, calibration.head_dim) != (self._dims[0], self._dims[1], self._dims[3]):
            raise self._corrupt(
                f"blocks of shape {self.shape} do not fit a calibration of {calibration.layers} layers of {calibration.kv_heads} KV heads"
            )
        return calibration

    @property
    def _step(self) -> float:
        return self.step_default if self.step is None else self.step

    def _bound(self) -> float:
        return self._calibration().bound(self.name, self._step) if self.max_error is None else self.max_error

    def most_error(self) -> float:
        if not self.fingerprint:
            return math.inf
        steps = (self.step, self.tail_step or self.step)
        own = [replace(self, step=step) for step in steps]
        return max(*(each._bound() for each in own), *(each._simple().most_error() for each in own), self._as(Int8Codec).most_error())

    def _simple(self) -> GroupedCodec:
        """Returns the integer codec that is about as exact as this codec at its step, or more exact."""
        cls = Int4Codec if self._step >= 1.5e-4 else Int6Codec if self._step >= 2.5e-5 else Int8Codec
        return self._as(cls)

    def _as(self, cls: type[GroupedCodec]) -> GroupedCodec:
        calibration = self._calibration()
        return cls(self.shape, self.dtype, self.start, self.sinks, rope=calibration.rope, rope_halves=calibration.rope_halves)

    def _fall_back(self, raw: torch.Tensor, carried_error: float, why: str) -> Encoded:
        if why == "opaque":
            return super()._fall_back(raw, carried_error, why)
        other = self._as(Int8Codec) if why == "error" else self._simple()
        return replace(other.encode(raw, carried_error), fell_back="error" if why == "error" else "domain")

    def _fingerprint(self) -> str:
        return self.fingerprint.hex()

    @abstractmethod
    def _quantized(self, kv: torch.Tensor) -> np.ndarray:
        """Quantizes the tokens after the exact ones. Returns codes as rows (R, T) of int16, those of the greatest deviation first."""

    @abstractmethod
    def _restored(self, data: memoryview, tokens: int, kv: torch.Tensor) -> None:
        """Decodes packed codes into the last `tokens` tokens of `kv`, which follow the exact ones."""

    def _payload(self, kv: torch.Tensor) -> np.ndarray:
        exact = self._exact_of(kv)
        if self._exact == self._dims[2]:
            return exact
        return np.concatenate([exact, np.frombuffer(pack(self._quantized(kv)), np.uint8)])

    def _fill(self, payload: memoryview, kv: torch.Tensor) -> None:
        data = self._opened(payload, kv)
        tokens = self._dims[2] - self._exact
        if tokens:
            self._restored(data, tokens, kv)

    def _opened(self, payload: memoryview, kv: torch.Tensor) -> memoryview:
        """Copies the exact tokens of a payload into `kv`. Returns the packed codes. Raises (kind `corrupt`) for an invalid payload."""
        if self.shape is None:
            raise self._corrupt("shape must be known to decode a payload, got None")
        self._layout.check_kv(kv, self.shape[2])
        self._calibration()
        if payload.nbytes < self._exact_bytes or (payload.nbytes > self._exact_bytes) is (self._exact == self.shape[2]):
            raise self._corrupt(f"payload of {payload.nbytes} bytes does not fit blocks of shape {self.shape}")
        self._put_exact(np.frombuffer(payload, np.uint8), kv)
        return payload[self._exact_bytes :]

    def _unpacked(self, unpack: Callable[[], np.ndarray]) -> np.ndarray:
        try:
            return unpack()
        except ValueError as error:
            raise self._corrupt(f"payload cannot be unpacked: {error}") from error

    def _channels(self, kv: torch.Tensor) -> torch.Tensor:
        """Returns the block (L, 2, H, T, D) without the exact tokens as float32 (L, 2, H, D, T). K is rotated back by RoPE."""
        calibration = self._calibration()
        x = kv[..., self._exact :, :].float()
        if calibration.rope:
            turn = turning(calibration.rope, calibration.rope_halves, self.start + self._exact, *x.shape[3:]).to(x.device)
            x = torch.stack([turn.turn(x[:, 0], torch.empty_like(x[:, 0]), back=True), x[:, 1]], 1)
        return x.transpose(-1, -2).contiguous()

    def _finish(self, x: torch.Tensor, mean: torch.Tensor, width: torch.Tensor | None, kv: torch.Tensor) -> None:
        """Fills the tokens of `kv` (L, 2, H, T, D) after the exact ones from `x` (L, 2, H, D, T), of any dtype and strides.

        Multiplies by `width` and adds `mean`, both (L, 2, H, 1, D), and rotates K by RoPE.
        """
        calibration = self._calibration()
        kv = kv[..., self._exact :, :]
        turn = turning(calibration.rope, calibration.rope_halves, self.start + self._exact, *kv.shape[3:])
        step = max(FINISH_ELEMENTS // kv[0].numel(), 1)
        memory = thread_buffer("finish", (3, step * kv[0, 0].numel()), np.float32)
        for first in range(0, len(kv), step):
            layers = slice(first, first + step)
            shape = kv[layers, 0].shape
            work, turned = memory[:2].reshape(-1), memory[2, : shape.numel()]
            plain = torch.from_numpy(work[: 2 * shape.numel()]).view(shape[0], 2, *shape[1:])
            plain.copy_(x[layers].transpose(-1, -2))
            if width is not None:
                plain.mul_(width[layers])
            plain.add_(mean[layers])
            k = turn.turn(plain[:, 0], torch.from_numpy(turned).view(shape)) if calibration.rope else plain[:, 0]
            kv[layers, 0], kv[layers, 1] = k, plain[:, 1]


def thread_buffer(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns an array whose contents are undefined. Each thread reuses its memory for all arrays of one `name`.

    Allocating new memory of this size may cost more than all the arithmetic.
    """
    count = math.prod(shape)
    memory = getattr(_of_thread, name, None)
    if memory is None or len(memory) < count or memory.dtype != dtype:
        memory = np.empty(count, dtype)
        setattr(_of_thread, name, memory)
    return memory[:count].reshape(shape)


@lru_cache(maxsize=2)
def alphabet(dtype: torch.dtype) -> Alphabet:
    """Returns the tables that unpack codes to numbers of a dtype, float32 or bf16.

    bf16 numbers are stored as u16 words. bf16 rounds codes whose absolute value is above 256.
    """
    if dtype is torch.float32:
        return Alphabet.of(lambda codes: codes.astype(np.float32))
    return Alphabet.of(lambda codes: torch.from_numpy(codes).to(torch.bfloat16).view(torch.uint16).numpy())


def descending_order(spread: torch.Tensor) -> np.ndarray:
    """Returns the indices into the flattened table `spread`, those of the greatest numbers first."""
    return np.argsort(-spread.reshape(-1).numpy(), kind="stable")


def as_codes(x: torch.Tensor) -> torch.Tensor:
    """Rounds numbers to whole ones in the range of int16. The result for numbers that are not finite does not matter."""
    return x.round().nan_to_num_(0, 0, 0).clamp_(-32767, 32767)
