"""A door to the integer codecs: keys and values in 8 or 4 bits and back, for those who hold the tensors themselves."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiered_kv.codecs.pairs import CodedTensor, check_pair, decode_pair, encode_pair
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    import torch

CODECS = {8: "int8", 4: "int4"}


@dataclass(frozen=True, repr=False)
class QuantizedTensor(CodedTensor):
    """A key or a value in codes of 8 or 4 bits."""


@dataclass(frozen=True)
class Quantizer:
    """Keys and values as codes of `bits` (8 or 4) a number, with a least number and a step for each token of a head.

    A finite number x of a token that spans [a, b] comes back as x ± (b - a) / (2 (2 ** bits - 1)), for 4 bits after a rotation of the
    head's channels, which keeps the mean squared error; of normally distributed numbers that is 3e-5 of their mean square for
    8 bits, 1e-2 for 4.
    A pair whose relative mean squared error would be above 4e-4 (8 bits) or 4e-2 (4 bits), or that has numbers which are not finite, is
    kept exactly and its records say so. With a head dim of 64 the codes take 0.53 (8 bits) or 0.28 (4 bits) of the bytes of bf16.

    `use_amp`: within a `torch.autocast` region of the tensor's device, float32 tensors come back in the region's dtype, as from the
    region's own operations, unless a number is beyond its range. Everywhere else, and in any other dtype, tensors come back in the
    dtype they had; codes and errors are the same with and without, for they are computed in float32 whatever the region says.

    Raises `TieredKVError` of kind `config` for other `bits`.
    """

    bits: int = 8
    use_amp: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in CODECS:
            raise TieredKVError(Kind.CONFIG, f"bits must be {' or '.join(map(str, CODECS))}, not {self.bits!r}", setting="bits")
        if not isinstance(self.use_amp, bool):
            raise TieredKVError(Kind.CONFIG, f"use_amp must be True or False, not {self.use_amp!r}", setting="use_amp")

    def quantize(self, key: "torch.Tensor", value: "torch.Tensor") -> tuple[QuantizedTensor, QuantizedTensor]:
        """The records of a key and a value (batch, heads, tokens, head_dim), alike in shape, floating dtype and device; changes neither.

        Raises `TieredKVError` of kind `layout` that names the argument for anything else.
        """
        return encode_pair(QuantizedTensor, CODECS[self.bits], key, value)

    def dequantize(
        self, key: "QuantizedTensor | torch.Tensor", value: "QuantizedTensor | torch.Tensor"
    ) -> tuple["torch.Tensor", "torch.Tensor"]:
        """The key and the value again, of whatever `bits`; tensors, as a compressor has restored them from records, are what they are.

        Raises `TieredKVError` of kind `layout` for anything else.
        """
        if isinstance(key, QuantizedTensor) and isinstance(value, QuantizedTensor):
            key, value = decode_pair(key, value)
        check_pair(key, value)
        return (_as_region(key), _as_region(value)) if self.use_amp else (key, value)


def _as_region(x: "torch.Tensor") -> "torch.Tensor":
    """The tensor in the dtype of the autocast region it is in, if it is one that such a region changes and holds every number of it."""
    import torch

    if x.dtype is not torch.float32 or not torch.is_autocast_enabled(x.device.type):
        return x
    narrow = x.to(torch.get_autocast_dtype(x.device.type))
    return narrow if bool((narrow.isfinite() == x.isfinite()).all()) else x
