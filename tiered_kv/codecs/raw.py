"""The codec that changes nothing: the payload is the block."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tiered_kv.codecs.base import Codec, byte_view, check_raw
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RawCodec(Codec):
    """Bit-identical, as large as the block. Encoding host memory is free (a view); decoding is one copy."""

    id: ClassVar[int] = 0
    name: ClassVar[str] = "raw"

    def encode(self, raw: "torch.Tensor") -> memoryview:
        check_raw(raw)
        return byte_view(raw.detach().cpu())

    def decode(self, payload: memoryview, out: "torch.Tensor") -> None:
        check_raw(out, "out")
        source = np.frombuffer(payload, np.uint8)
        if source.nbytes != out.numel():
            raise TieredKVError(Kind.CORRUPT, f"raw payload of {source.nbytes} bytes for a block of {out.numel()}", codec=self.name)
        if out.device.type == "cpu":
            np.copyto(out.numpy(), source)
        else:
            _copy_to_device(source, out)

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes


def _copy_to_device(source: np.ndarray, out: "torch.Tensor") -> None:
    import torch

    # torch has no read-only tensors and warns of sharing such memory.
    out.copy_(torch.from_numpy(source if source.flags.writeable else source.copy()))
