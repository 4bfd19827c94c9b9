"""The interface of a codec: a frozen record of parameters that encodes a block's bytes as a payload and decodes them again."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, Union

import numpy as np

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import Layout

if TYPE_CHECKING:
    import torch

Buffer = Union[bytes, bytearray, memoryview, np.ndarray, "torch.Tensor"]
"""Contiguous bytes in host memory, of any of these types."""


def byte_view(buffer: Buffer) -> memoryview:
    """Returns the bytes of a contiguous buffer in host memory as a 1-D view of u8. Never copies.

    A torch tensor must be uint8 on the CPU. Raises TypeError or ValueError for a buffer that has no such view.
    """
    view = memoryview(buffer.numpy() if hasattr(buffer, "numpy") else buffer)
    if not view.nbytes:
        return memoryview(b"")
    return view if view.format == "B" and view.ndim == 1 and view.c_contiguous else view.cast("B")


@dataclass(frozen=True)
class Encoded:
    """The result of encoding a block: a payload, and the codec that decodes it.

    A codec may fall back to another one. `codec` is then that other codec, and `fell_back` gives the reason:
    "opaque" (unknown layout), "error" (error above the bound), "no gain" (payload not smaller than the block), or
    "domain" (a codec without tables makes the block at least as small). Without a fallback, `fell_back` is empty.
    `error` is the block's total relative mean squared error, including that of earlier lossy codecs.
    """

    codec: "Codec"
    payload: memoryview
    error: float = 0.0
    fell_back: str = ""


@dataclass(frozen=True)
class Codec(ABC):
    """One way to store a block. Two codecs are equal when they have the same type and parameters.

    `id` (u8) is stored in the shared index and `name` in frames. Ids, names and the meanings of parameters never change.
    A parameter is a dataclass field that msgpack can serialize, and is not called `error` or `codec`.
    `__post_init__` rejects invalid values. `is_lossy`: whether a decoded block may differ from the original.
    `needs_calibration`: whether `for_layout` needs a calibration of the model.
    """

    id: ClassVar[int]
    name: ClassVar[str]
    is_lossy: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False

    @abstractmethod
    def encode(self, raw: "torch.Tensor", carried_error: float = 0.0) -> Encoded:
        """Encodes `raw`, a 1-D contiguous uint8 tensor on any device. Never changes `raw`, but the payload may share its memory.

        `carried_error` is the relative error that `raw` already has from earlier lossy codecs. Raises (kind `layout`) unless `raw` is
        such a tensor.
        """

    @abstractmethod
    def decode(self, payload: memoryview, out: "torch.Tensor") -> None:
        """Decodes a payload into `out`, a 1-D contiguous uint8 tensor on any device, as large as the block.

        Raises (kind `corrupt`) when the payload does not decode to that many bytes. The contents of `out` are then undefined.
        """

    def decode_kv(self, payload: memoryview, kv: "torch.Tensor") -> None:
        """Decodes a payload into `kv` (layers, K and V, heads, tokens, head dim), of any strides. Raises as `decode`."""
        import torch

        flat = kv if kv.is_contiguous() else torch.empty(kv.shape, dtype=kv.dtype, device=kv.device)
        self.decode(payload, flat.view(-1).view(torch.uint8))
        if flat is not kv:
            kv.copy_(flat)

    def most_error(self) -> float:
        """Returns the largest relative error that encoding can cause in a block without earlier errors, fallbacks included.

        Returns infinity if the error depends on a calibration that is not loaded.
        """
        return 0.0

    @abstractmethod
    def max_payload_bytes(self, raw_bytes: int) -> int:
        """Returns the size in bytes of the largest payload that `encode` makes from `raw_bytes` bytes if it does not fall back."""

    @classmethod
    def for_layout(cls, layout: Layout | None, *, rope: bytes | None = None, rope_halves: bool = True, **parameters: Any) -> Self:
        """Returns the codec for blocks of `layout`. None means that the layout is unknown.

        A lossy codec treats an `OpaqueLayout` as unknown: it encodes every block without loss, for the reason "opaque".
        `rope` and `rope_halves` describe the model's RoPE (see `rotation`). Codecs that do not rotate ignore them.
        """
        return cls(**parameters)

    @classmethod
    def parameters_of(cls, text: str) -> dict[str, Any]:
        """Parses the text after a codec's name and colon. Returns the parameters. Raises (kind `config`) if the codec takes none."""
        raise TieredKVError(Kind.CONFIG, f"codec {cls.name!r} takes no parameters after its name, got {text!r}", codec=cls.name)

    def at(self, start: int, is_last_block: bool = False) -> Self:
        """Returns the codec for the block whose first token has position `start`. `is_last_block`: the block is the last of its chain."""
        return self

    def spec(self) -> dict[str, Any]:
        """Returns the name and the parameters, as frames store them. `codec_from_spec` is the inverse."""
        return {"codec": self.name} | asdict(self)

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """Returns the codec of a spec. Raises (kind `config`) unless the spec has exactly this codec's parameters."""
        given = {name: value for name, value in spec.items() if name != "codec"}
        known = [field.name for field in fields(cls)]
        if sorted(given, key=str) != sorted(known):
            raise TieredKVError(Kind.CONFIG, f"codec {cls.name!r} needs exactly the parameters {known}, got {list(given)}", codec=cls.name)
        return cls(**given)


def check_raw(raw: "torch.Tensor", name: str = "raw") -> None:
    """Raises (kind `layout`) unless `raw` is a 1-D contiguous uint8 tensor."""
    import torch

    if not isinstance(raw, torch.Tensor) or raw.dtype is not torch.uint8 or raw.dim() != 1 or not raw.is_contiguous():
        is_a = f"{raw.dtype} of shape {tuple(raw.shape)}" if isinstance(raw, torch.Tensor) else type(raw).__name__
        raise TieredKVError(Kind.LAYOUT, f"{name} must be a 1-D contiguous uint8 tensor, got {is_a}")
