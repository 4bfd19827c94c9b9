"""What `lowrank` and `sparse` share: they keep a given part of a block's bytes, and less of what is in it.

Both are dominated: int8 and int4 are nearer to the block at the same size (docs/design/015). They are here for those who ask
for them by name.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from tiered_kv.codecs.parts import PartsCodec
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES


@dataclass(frozen=True)
class ReducedCodec(PartsCodec):
    """`keep`, above 0 and at most 1, is the part of the bytes of tokens that do not stay exact; a payload takes at most that, all side
    information counted, but never less than one component or number. The rest as of `PartsCodec`.
    """

    bits: ClassVar[int] = 8
    max_error_default: ClassVar[float] = 0.2

    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise self._refused("keep", "a number above 0 and at most 1")
        object.__setattr__(self, "keep", float(self.keep))

    @classmethod
    def parameters_of(cls, text: str) -> dict[str, Any]:
        """`keep`, as people write it behind the name and a colon; raises (kind `config`) for what is no number above 0 and at most 1."""
        try:
            return {"keep": cls(keep=float(text)).keep}
        except ValueError:
            message = f"{cls.name}: keep must be a number above 0 and at most 1, not {text!r}"
            raise TieredKVError(Kind.CONFIG, message, setting="keep") from None

    def _budget_bytes(self, numbers: int) -> float:
        """What so many numbers of the block may take."""
        return self.keep * numbers * ITEM_BYTES[self.dtype]
