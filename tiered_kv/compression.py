"""A door to the codecs `lowrank` and `sparse`: keys and values in a part of their bytes, for those who hold the tensors themselves."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiered_kv.codecs.pairs import CodedTensor, decode_pair, encode_pair
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.quantization import QuantizedTensor

if TYPE_CHECKING:
    import torch

CODECS = {"svd": "lowrank", "lowrank": "lowrank", "sparse": "sparse"}
MAX_ERROR = 1.0
"""Above it nothing would be left of the tensors."""


@dataclass(frozen=True, repr=False)
class CompressedTensor(CodedTensor):
    """A key or a value as the factors of a matrix of low rank, or as the numbers that stay of it."""


@dataclass(frozen=True)
class Compressor:
    """Keys and values in at most `ratio` (above 0, at most 1) of their bytes, but never less than one component or number a head.

    `method`: "svd" (also called "lowrank") keeps the greatest singular components of each sequence's key and value, "sparse" the numbers
    of each head that are farthest from the mean of their token. The error is whatever that leaves: it is measured, and stands in the
    records. What would have a relative mean squared error above 1, does not shrink, or has numbers that are not finite is kept exactly,
    and says so.
    Of normally distributed numbers neither method has anything to gain; at equal bytes the quantizer is nearer on real KV too.

    Raises `TieredKVError` of kind `config` for another `ratio` or `method`.
    """

    ratio: float = 0.5
    method: str = "svd"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise TieredKVError(Kind.CONFIG, f"ratio must be a number above 0 and at most 1, not {self.ratio!r}", setting="ratio")
        if not isinstance(self.method, str) or self.method not in CODECS:
            raise TieredKVError(Kind.CONFIG, f"method must be one of {', '.join(CODECS)}, not {self.method!r}", setting="method")

    def compress(
        self, key: "torch.Tensor | QuantizedTensor", value: "torch.Tensor | QuantizedTensor"
    ) -> tuple[CompressedTensor, CompressedTensor]:
        """The records of a key and a value (batch, heads, tokens, head_dim), alike in shape, floating dtype and device; changes neither.

        What a quantizer returned is compressed as the numbers that its codes stand for: components are of numbers, not of codes, and
        are kept in 8 bits anyway. `ratio` is then of the bytes of the tensor, and the quantizer's error is part of the records'.
        Raises `TieredKVError` of kind `layout` that names the argument for anything else.
        """
        carried_error = 0.0
        if isinstance(key, QuantizedTensor) and isinstance(value, QuantizedTensor):
            carried_error = max(key.error, value.error)
            key, value = decode_pair(key, value)
        return encode_pair(CompressedTensor, CODECS[self.method], key, value, carried_error, keep=float(self.ratio), max_error=MAX_ERROR)

    def decompress(self, key: CompressedTensor, value: CompressedTensor) -> tuple["torch.Tensor", "torch.Tensor"]:
        """The key and the value again as tensors of their shape, dtype and device, of whatever `ratio` and `method`.

        Raises `TieredKVError` of kind `layout` for what no compressor returned.
        """
        for name, each in (("key", key), ("value", value)):
            if not isinstance(each, CompressedTensor):
                raise TieredKVError(Kind.LAYOUT, f"{name} must be what compress returned, not {type(each).__name__}", argument=name)
        return decode_pair(key, value)
