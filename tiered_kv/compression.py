"""Public access to the codecs `lowrank` and `sparse`: compresses keys and values, for code that keeps its own tensors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from tiered_kv.codecs.pairs import CodedTensor, decode_pair, encode_pair
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.quantization import QuantizedTensor

if TYPE_CHECKING:
    import torch

CODECS = {"svd": "lowrank", "lowrank": "lowrank", "sparse": "sparse"}
MAX_ERROR = 1.0
"""The largest allowed relative mean squared error. Restoring only zeros would have this error."""


@dataclass(frozen=True, repr=False)
class CompressedTensor(CodedTensor):
    """A compressed key or value: the factors of a low-rank matrix, or the kept numbers of a sparse matrix."""


@dataclass(frozen=True)
class Compressor:
    """Compresses keys and values to at most `ratio` (above 0, at most 1) of their bytes. Keeps at least one component or number per head.

    `method`: "svd" (also called "lowrank") keeps the largest singular components of each sequence's key and value. "sparse" keeps the
    numbers of each head that are farthest from the mean of their token. No setting bounds the error; it is measured and recorded.
    Tensors are kept exactly, and the records say so, if their relative mean squared error would be above 1, if they do not shrink, or
    if they have numbers that are not finite. For normally distributed numbers, neither method saves anything. At equal bytes,
    `Quantizer` has a smaller error, also on real KV.

    Raises `TieredKVError` of kind `config` for an invalid `ratio` or `method`.
    """

    ratio: float = 0.5
    method: str = "svd"

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or not 0 < self.ratio <= 1:
            raise TieredKVError(Kind.CONFIG, f"ratio must be a number above 0 and at most 1, got {self.ratio!r}", setting="ratio")
        if not isinstance(self.method, str) or self.method not in CODECS:
            raise TieredKVError(Kind.CONFIG, f"method must be one of {', '.join(CODECS)}, got {self.method!r}", setting="method")

    def compress(
        self, key: "torch.Tensor | QuantizedTensor", value: "torch.Tensor | QuantizedTensor"
    ) -> tuple[CompressedTensor, CompressedTensor]:
        """Returns the records of a key and a value (batch, heads, tokens, head_dim). The key and the value are not changed.

        Both must have the same shape, floating dtype and device. They may also be records of a `Quantizer`. These are dequantized
        first, because components are computed from numbers, not from codes, and are kept in 8 bits anyway. `ratio` then refers to the
        dequantized tensor's bytes, and the new records' error includes that of the quantizer. Raises `TieredKVError` (kind `layout`)
        that names the argument for anything else.
        """
        carried_error = 0.0
        if isinstance(key, QuantizedTensor) and isinstance(value, QuantizedTensor):
            carried_error = max(key.error, value.error)
            pair = decode_pair(key, value)
        else:
            pair = cast("tuple[torch.Tensor, torch.Tensor]", (key, value))  # encode_pair raises for anything else
        return encode_pair(CompressedTensor, CODECS[self.method], *pair, carried_error, keep=float(self.ratio), max_error=MAX_ERROR)

    def decompress(self, key: CompressedTensor, value: CompressedTensor) -> tuple["torch.Tensor", "torch.Tensor"]:
        """Returns the key and the value restored from records of any `ratio` and `method`, with their shape, dtype and device.

        Raises `TieredKVError` (kind `layout`) for anything that `compress` did not return.
        """
        for name, each in (("key", key), ("value", value)):
            if not isinstance(each, CompressedTensor):
                raise TieredKVError(
                    Kind.LAYOUT, f"{name} must be a record that compress returned, got {type(each).__name__}", argument=name
                )
        return decode_pair(key, value)
