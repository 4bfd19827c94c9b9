"""What every codec is: a frozen record of parameters that turns a block's bytes into a payload and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, Union

import numpy as np

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

if TYPE_CHECKING:
    import torch

Buffer = Union[bytes, bytearray, memoryview, np.ndarray, "torch.Tensor"]
"""Contiguous bytes in host memory, of whatever owner."""


def byte_view(buffer: Buffer) -> memoryview:
    """The bytes of a contiguous buffer in host memory as a 1-D view of u8; never copies.

    A torch tensor must be uint8 on the CPU. Raises TypeError or ValueError for what has no such view.
    """
    view = memoryview(buffer.numpy() if hasattr(buffer, "numpy") else buffer)
    if not view.nbytes:
        return memoryview(b"")
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


@dataclass(frozen=True)
class Encoded:
    """What became of a block: a payload, and the codec that reads it, which is another one if the first gave way.

    `error` is the relative mean squared error that the block carries by now, with that of its former codecs;
    `fell_back` says in a word why the codec gave way ("opaque", "error", "no gain"), and is empty if it did not.
    """

    codec: "Codec"
    payload: memoryview
    error: float = 0.0
    fell_back: str = ""


@dataclass(frozen=True)
class Codec(ABC):
    """One way to keep a block. Two codecs are equal when they have the same parameters.

    `id` (u8) stands in the shared index and `name` in frames; both are for ever, as is the meaning of the parameters.
    A parameter is a field of the dataclass that msgpack can carry, and is not called `error` or `codec`;
    `__post_init__` refuses values that cannot be. `is_lossy`: whether what comes back may differ;
    `needs_calibration`: whether `for_layout` needs to be given what was learned of the model.
    """

    id: ClassVar[int]
    name: ClassVar[str]
    is_lossy: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False

    @abstractmethod
    def encode(self, raw: "torch.Tensor", carried_error: float = 0.0) -> Encoded:
        """`raw`, a 1-D contiguous uint8 tensor on any device, as a payload; may share its memory, never changes it.

        `carried_error` is that of the block as it is given. Raises (kind `layout`) for a tensor of another kind.
        """

    @abstractmethod
    def decode(self, payload: memoryview, out: "torch.Tensor") -> None:
        """Fill `out`, a 1-D contiguous uint8 tensor on any device of exactly the block's raw bytes, from a payload.

        Raises (kind `corrupt`) when the payload does not give that many bytes; `out` is then undefined.
        """

    def decode_kv(self, payload: memoryview, kv: "torch.Tensor") -> None:
        """Fill `kv` (L, 2, H, T, D), which may be a strided part of a larger tensor; else as `decode`."""
        import torch

        flat = kv if kv.is_contiguous() else torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
        self.decode(payload, flat.view(-1).view(torch.uint8))
        if flat is not kv:
            kv.copy_(flat)

    def most_error(self) -> float:
        """The greatest error that a block carries which this codec, or the one that it gives way to, made of an exact one.

        Infinity if that depends on a calibration that is not there.
        """
        return 0.0

    @abstractmethod
    def max_payload_bytes(self, raw_bytes: int) -> int:
        """The largest payload that `encode` can make of `raw_bytes` bytes, if the codec does not give way to another."""

    @classmethod
    def for_layout(cls, layout: KVLayout | None, *, rope: bytes | None = None, rope_halves: bool = True, **parameters: Any) -> Self:
        """The codec for blocks of a layout (None: bytes of which nothing is known), with what it needs of the model's RoPE."""
        return cls(**parameters)

    @classmethod
    def parameters_of(cls, text: str) -> dict[str, Any]:
        """The parameters that people write behind a codec's name and a colon; raises (kind `config`) where none are allowed."""
        raise TieredKVError(Kind.CONFIG, f"codec {cls.name!r} takes nothing behind its name, not {text!r}", codec=cls.name)

    def at(self, start: int, is_tail: bool = False) -> Self:
        """The codec for the block whose first token has the position `start` in its sequence; `is_tail`: it is the last of its chain."""
        return self

    def spec(self) -> dict[str, Any]:
        """Name and parameters, as frames carry them; `codec_from_spec` is the inverse."""
        return {"codec": self.name} | asdict(self)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The codec of a spec; raises (kind `config`) unless it names exactly this codec's parameters."""
        given = {name: value for name, value in spec.items() if name != "codec"}
        known = [field.name for field in fields(cls)]
        if sorted(given, key=str) != sorted(known):
            raise TieredKVError(Kind.CONFIG, f"codec {cls.name!r} has the parameters {known}, not {list(given)}", codec=cls.name)
        return cls(**given)


def check_raw(raw: "torch.Tensor", name: str = "raw") -> None:
    """Raise (kind `layout`) unless `raw` is a 1-D contiguous uint8 tensor."""
    import torch

    if not isinstance(raw, torch.Tensor) or raw.dtype is not torch.uint8 or raw.dim() != 1 or not raw.is_contiguous():
        is_a = f"{raw.dtype} of shape {tuple(raw.shape)}" if isinstance(raw, torch.Tensor) else type(raw).__name__
        raise TieredKVError(Kind.LAYOUT, f"{name} must be a 1-D contiguous uint8 tensor, not {is_a}")
