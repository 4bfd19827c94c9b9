"""Shared base of the codecs that encode a block of known shape and measure the error they cause.

Shapes: kv (L, 2, H, T, D): layers, K and V, heads, tokens, head dim. The first tokens of a sequence are stored unchanged,
because all later tokens attend to them strongly (Xiao et al. 2023). They are at the start of the payload: (L, 2, H, sinks, D).
"""

import math
import threading
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch

from tiered_kv.codecs.base import Codec, Encoded, check_raw
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.codecs.lossless import LosslessCodec
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES, KVLayout

_of_thread = threading.local()


@dataclass(frozen=True)
class BlockCodec(Codec):
    """A lossy codec with a bound on the error of each block.

    The relative mean squared error of any layer's K or V, together with the error that the block had before, is within the bound.
    A block that would break the bound, or has numbers that are not finite, is encoded by a more exact codec (`fell_back` is "error").
    The codec also falls back for a block that would not shrink ("no gain"), and for an unknown or opaque layout ("opaque").

    `shape` is (L, H, T, D). `start` is the position of the first token. The first `sinks` tokens of a sequence stay exact.
    `max_error` is the bound; None means the codec's default.
    """

    is_lossy: ClassVar[bool] = True

    shape: tuple[int, int, int, int] | None = None
    dtype: str = "bfloat16"
    start: int = 0
    sinks: int = 4
    max_error: float | None = None

    def __post_init__(self) -> None:
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
            if len(self.shape) != 4:
                raise self._invalid("shape", "four whole numbers (L, H, T, D)")
            object.__setattr__(self, "dtype", self._layout.dtype)  # raises for an invalid shape or dtype
        for name in ("start", "sinks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise self._invalid(name, "a whole number of at least 0")
        if self.max_error is not None and not (isinstance(self.max_error, float) and 0 <= self.max_error < math.inf):
            raise self._invalid("max_error", "a float of at least 0")

    def at(self, start: int, is_last_block: bool = False) -> Self:
        return replace(self, start=start)

    @abstractmethod
    def _payload(self, kv: torch.Tensor) -> np.ndarray:
        """Encodes a block. Returns its payload (u8)."""

    @abstractmethod
    def _fill(self, payload: memoryview, kv: torch.Tensor) -> None:
        """Decodes a payload into `kv`, of any strides. Raises (kind `corrupt`) if the payload does not fit a block of this shape."""

    @abstractmethod
    def _bound(self) -> float:
        """Returns the greatest relative error that a block may have."""

    def most_error(self) -> float:
        return self._bound()

    def encode(self, raw: torch.Tensor, carried_error: float = 0.0) -> Encoded:
        """Encodes a block (see `Codec.encode`). Decodes the payload again to measure the error."""
        check_raw(raw)
        if self.shape is None:
            return self._fall_back(raw, carried_error, "opaque")
        if raw.numel() != self.raw_bytes:
            message = f"{self.name}: raw must be a block of {self.raw_bytes} bytes, got {raw.numel()}"
            raise TieredKVError(Kind.LAYOUT, message, codec=self.name)
        kv = self._typed(raw.detach() if self._is_aligned(raw) else raw.clone())
        with _without_autocast(kv.device):
            payload = memoryview(self._payload(kv))
        if payload.nbytes >= self.raw_bytes:
            return self._fall_back(raw, carried_error, "no gain")
        error = carried_error + self._distance(kv, payload)
        if not error <= self._bound():  # also true for NaN
            return self._fall_back(raw, carried_error, "error")
        return Encoded(self, payload, error)

    def distance(self, raw: torch.Tensor) -> float:
        """Returns the relative error that this codec alone causes in a block, even if it is above the bound."""
        kv = self._typed(raw)
        with _without_autocast(kv.device):
            payload = memoryview(self._payload(kv))
        return self._distance(kv, payload)

    def _distance(self, kv: torch.Tensor, payload: memoryview) -> float:
        again = _thread_buffer_like(kv)
        self.decode_kv(payload, again)
        return relative_error(kv, again)

    def decode(self, payload: memoryview, out: torch.Tensor) -> None:
        check_raw(out, "out")
        if self.shape is None or out.numel() != self.raw_bytes:
            raise self._corrupt(f"out of {out.numel()} bytes does not fit blocks of shape {self.shape} and dtype {self.dtype}")
        target = out if self._is_aligned(out) else torch.empty_like(out)
        self.decode_kv(payload, self._typed(target))
        if target is not out:
            out.copy_(target)

    def decode_kv(self, payload: memoryview, kv: torch.Tensor) -> None:
        with _without_autocast(kv.device):
            self._fill(payload, kv)

    @property
    def raw_bytes(self) -> int:
        """Size of the block in bytes."""
        return self._layout.block_bytes

    @property
    def _dims(self) -> tuple[int, int, int, int]:
        """The block's (L, H, T, D); raises (kind `corrupt`) for a codec without a shape."""
        if self.shape is None:
            raise self._corrupt("without a shape nothing can be read")
        return self.shape

    @property
    def _layout(self) -> KVLayout:
        layers, heads, tokens, dim = self._dims
        return KVLayout(layers, heads, dim, self.dtype, tokens)

    @property
    def _exact(self) -> int:
        """The number of tokens of the block that are stored unchanged, because they are among the first `sinks` of the sequence."""
        return min(max(self.sinks - self.start, 0), self._dims[2])

    @property
    def _exact_bytes(self) -> int:
        return self.raw_bytes // self._dims[2] * self._exact

    def _exact_of(self, kv: torch.Tensor) -> np.ndarray:
        """Returns the bytes of the block's tokens that are stored unchanged."""
        return kv[..., : self._exact, :].contiguous().view(-1).view(torch.uint8).cpu().numpy()

    def _put_exact(self, data: np.ndarray, kv: torch.Tensor) -> None:
        """Copies the tokens that are stored unchanged from the start of a payload into `kv`."""
        if self._exact:
            exact = torch.from_numpy(data[: self._exact_bytes].copy()).view(kv.dtype)
            kv[..., : self._exact, :] = exact.view(*kv.shape[:3], self._exact, kv.shape[4]).to(kv.device)

    def _typed(self, flat: torch.Tensor) -> torch.Tensor:
        layers, heads, tokens, dim = self._dims
        return flat.view(getattr(torch, self.dtype)).view(layers, 2, heads, tokens, dim)

    def _is_aligned(self, flat: torch.Tensor) -> bool:
        return not flat.storage_offset() % ITEM_BYTES[self.dtype]

    def _fall_back(self, raw: torch.Tensor, carried_error: float, why: str) -> Encoded:
        lossless = LosslessCodec(ITEM_BYTES[self.dtype] if self.shape else 1)
        return replace(lossless.encode(raw, carried_error), fell_back=why)

    def _invalid(self, name: str, needed: str) -> TieredKVError:
        return TieredKVError(Kind.CONFIG, f"{self.name}: {name} must be {needed}, got {getattr(self, name)!r}", setting=name)

    def _corrupt(self, what: str) -> TieredKVError:
        return TieredKVError(Kind.CORRUPT, f"{self.name}: {what}", codec=self.name)


def _thread_buffer_like(kv: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of the shape, dtype and device of `kv`. Its contents are undefined.

    On the CPU, every call of the same thread reuses one memory: allocating new memory costs as much as filling it twice.
    """
    if kv.device.type != "cpu":
        return torch.empty_like(kv)
    memory = getattr(_of_thread, "memory", None)
    if memory is None or memory.nbytes < kv.nbytes:
        memory = _of_thread.memory = np.empty(kv.nbytes, np.uint8)
    return torch.from_numpy(memory[: kv.nbytes]).view(kv.dtype).view(kv.shape)


def _without_autocast(device: torch.device) -> torch.autocast:
    """Returns a context without autocast. Products then have the dtype of their factors even inside a caller's autocast region."""
    return torch.autocast(device.type, enabled=False)
