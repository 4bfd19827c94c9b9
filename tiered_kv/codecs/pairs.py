"""Encodes a key and a value tensor of a library user. The codec encodes both as one block. The user gets one record for each.

Key and value are (B, H, T, D): batch, heads, tokens, head dim. The codec gets a block (B, 2, H, T, D), in which each sequence of
the batch takes the place of a layer. Positions and rotation are unknown: K is encoded like V, and no token is stored unchanged.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tiered_kv.codecs import codec_for
from tiered_kv.codecs.base import Codec
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES, KVLayout

AXES = "(batch, heads, tokens, head_dim)"


@dataclass(frozen=True)
class CodedTensor:
    """The encoded key (`which` 0) or value (`which` 1) of a pair. It can be pickled and copied, and holds no GPU memory.

    `shape`, `dtype` and `device` are those of the tensor. `error` is the relative mean squared error of the pair, measured when it
    was encoded, plus the error that it had before. It is the greatest error of any sequence's key or value.
    `fell_back` is empty, or says why the pair is stored exactly: "error" (numbers that are not finite, or an error above the
    codec's bound) or "no gain". Both records of a pair share `payload`.
    """

    codec: Codec
    payload: bytes
    which: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    error: float
    fell_back: str = ""

    @property
    def nbytes(self) -> int:
        """Half of the payload's bytes. The two records of a pair add up to exactly the payload."""
        return (len(self.payload) + 1 - self.which) // 2

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.codec.name}, {tuple(self.shape)}, {self.dtype}, {self.nbytes} bytes, error {self.error:.2g})"


CodedT = TypeVar("CodedT", bound=CodedTensor)


def check_pair(key: object, value: object) -> None:
    """Raises (kind `layout`) unless both are dense floating-point tensors (B, H, T, D) of the same shape, dtype and device."""
    for name, each in (("key", key), ("value", value)):
        if not isinstance(each, torch.Tensor):
            raise TieredKVError(Kind.LAYOUT, f"{name} must be a torch tensor {AXES}, got {type(each).__name__}", argument=name)
        if each.dim() != 4 or not each.numel():
            message = f"{name} must be {AXES}, each at least 1, got shape {tuple(each.shape)}"
            raise TieredKVError(Kind.LAYOUT, message, argument=name)
        if str(each.dtype).removeprefix("torch.") not in ITEM_BYTES:
            message = f"{name} must be of a floating-point dtype ({', '.join(ITEM_BYTES)}), got {each.dtype}"
            raise TieredKVError(Kind.LAYOUT, message, argument=name)
    for what in ("shape", "dtype", "device"):
        if (of_value := getattr(value, what)) != (of_key := getattr(key, what)):
            message = f"value must have the {what} of key, {tuple(of_key) if what == 'shape' else of_key}, got "
            raise TieredKVError(Kind.LAYOUT, message + str(tuple(of_value) if what == "shape" else of_value), argument="value")


def encode_pair(
    kind: type[CodedT], codec: str, key: torch.Tensor, value: torch.Tensor, carried_error: float = 0.0, **parameters: Any
) -> tuple[CodedT, CodedT]:
    """Encodes a pair with the lossy codec of this name. Returns the records of key and value. Raises as `check_pair`.

    Neither tensor is changed or kept.
    """
    check_pair(key, value)
    batch, heads, tokens, dim = key.shape
    chosen = codec_for(codec, KVLayout(batch, heads, dim, str(key.dtype), tokens), sinks=0, **parameters)
    with torch.autocast(key.device.type, enabled=False):  # stacking fails inside an autocast region of another dtype
        block = torch.stack([key.detach(), value.detach()], 1)
    encoded = chosen.encode(block.view(-1).view(torch.uint8), carried_error)
    payload = bytes(encoded.payload)
    of_key, of_value = (
        kind(encoded.codec, payload, which, key.shape, key.dtype, key.device, encoded.error, encoded.fell_back) for which in (0, 1)
    )
    return of_key, of_value


def decode_pair(key: CodedTensor, value: CodedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decodes two records. Returns key and value in their shapes and dtypes, on their devices. Decodes a shared payload once."""
    of_key = _decoded(key)
    of_value = of_key if value.payload is key.payload else _decoded(value)
    return of_key[:, key.which], of_value[:, value.which]


def _decoded(coded: CodedTensor) -> torch.Tensor:
    batch, heads, tokens, dim = coded.shape
    kv = torch.empty((batch, 2, heads, tokens, dim), dtype=coded.dtype, device=coded.device)
    coded.codec.decode_kv(memoryview(coded.payload), kv)
    return kv
