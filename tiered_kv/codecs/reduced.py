"""Shared base of `lowrank` and `sparse`, which keep a given fraction of a block's bytes and drop the rest of its content.

At the same size, int8 and int4 are closer to the block than both (docs/design/015). `lowrank` and `sparse` exist for
users who ask for them by name.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from tiered_kv.codecs.parts import PartsCodec
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES


@dataclass(frozen=True)
class ReducedCodec(PartsCodec):
    """A `PartsCodec` whose encoded tokens take at most the fraction `keep` of their raw bytes.

    `keep` is above 0 and at most 1. It covers scales and other side information as well. A payload has at least one component
    (lowrank) or one number of each head (sparse), even if that exceeds `keep`.
    """

    bits: ClassVar[int] = 8
    max_error_default: ClassVar[float] = 0.2

    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise self._invalid("keep", "a number above 0 and at most 1")
        object.__setattr__(self, "keep", float(self.keep))

    @classmethod
    def parameters_of(cls, text: str) -> dict[str, Any]:
        """Parses `keep`, written after the codec's name and a colon. Raises (kind `config`) unless it is above 0 and at most 1."""
        try:
            return {"keep": cls(keep=float(text)).keep}
        except ValueError:
            message = f"{cls.name}: keep must be a number above 0 and at most 1, got {text!r}"
            raise TieredKVError(Kind.CONFIG, message, setting="keep") from None

    def _budget_bytes(self, numbers: int) -> float:
        """Returns the bytes that `numbers` numbers of the block may take when encoded."""
        return self.keep * numbers * ITEM_BYTES[self.dtype]
