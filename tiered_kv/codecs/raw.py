"""The raw codec, which changes nothing: the payload is the block."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tiered_kv.codecs.base import Codec, Encoded, byte_view, check_raw
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RawCodec(Codec):
    """The codec that stores a block unchanged. Encoding a block in host memory is free: the payload is a view. Decoding is one copy."""

    id: ClassVar[int] = 0
    name: ClassVar[str] = "raw"

    def encode(self, raw: "torch.Tensor", carried_error: float = 0.0) -> Encoded:
        check_raw(raw)
        return Encoded(self, byte_view(raw.detach().cpu()), carried_error)

    def decode(self, payload: memoryview, out: "torch.Tensor") -> None:
        check_raw(out, "out")
        source = np.frombuffer(payload, np.uint8)
        if source.nbytes != out.numel():
            raise TieredKVError(Kind.CORRUPT, f"raw: payload of {out.numel()} bytes expected, got {source.nbytes}", codec=self.name)
        fill(out, source)

    def decode_kv(self, payload: memoryview, kv: "torch.Tensor") -> None:
        """Decodes by one strided copy (see `Codec.decode_kv`)."""
        import torch

        source = np.frombuffer(payload, np.uint8)
        if source.nbytes != kv.nbytes:
            raise TieredKVError(Kind.CORRUPT, f"raw: payload of {kv.nbytes} bytes expected, got {source.nbytes}", codec=self.name)
        if not source.nbytes:
            return
        block = torch.from_numpy(source if source.flags.writeable else source.copy())  # torch has no read-only tensors
        kv.detach().copy_(block.view(kv.dtype).view(kv.shape))

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes


def fill(out: "torch.Tensor", source: np.ndarray) -> None:
    """Copies `source`, which may be read-only, into a uint8 tensor of the same size on any device."""
    import torch

    if out.device.type == "cpu":
        np.copyto(out.numpy(), source)
    else:  # torch has no read-only tensors and warns about sharing read-only memory
        out.copy_(torch.from_numpy(source if source.flags.writeable else source.copy()))
