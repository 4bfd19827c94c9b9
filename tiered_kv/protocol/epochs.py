"""Weight epochs: for each family of namespaces, the number of its present weights, raised at run time on all nodes (docs/design/029).

The number is part of the root of every block (`Namespace.weight_epoch`). So blocks of former weights have other keys. Each node and the
coordinator hold an `EpochBook`. They exchange their books, and keep the larger numbers.
"""

import reprlib
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES

EVERY = bytes(KEY_BYTES)
"""The name of a family that stands for all families."""
FAMILIES_MAX = 128
EPOCH_MAX = (1 << 63) - 1


class Epoch(NamedTuple):
    """The present weight epoch of a family (or of EVERY). Blocks of an epoch below `floor` have ended: no node shows them any more."""

    family: bytes
    number: int
    floor: int

    @classmethod
    def of_message(cls, message: Any) -> Self:
        """Returns the epoch in a message. Raises (kind `transport`) if the message is not one."""
        try:
            family, number, floor = message
            is_valid = type(family) is bytes and len(family) == KEY_BYTES and type(number) is int and type(floor) is int
            is_valid = is_valid and 0 <= floor <= number <= EPOCH_MAX
        except (TypeError, ValueError) as error:
            raise TieredKVError(Kind.TRANSPORT, f"expected a weight epoch of three fields, got {type(message).__name__}") from error
        if not is_valid:
            raise TieredKVError(Kind.TRANSPORT, f"expected a family, and two numbers in ascending order, got {reprlib.repr(message)}")
        return cls(family, number, floor)

    def merged(self, other: "Epoch") -> "Epoch":
        """Returns the epoch of the same family with the larger numbers of both."""
        return Epoch(self.family, max(self.number, other.number), max(self.floor, other.floor))


class EpochBook:
    """The epochs of at most FAMILIES_MAX families. All others have the epoch of EVERY, at first 0. Numbers only grow. Thread-safe.

    If there are more families, the one with the lowest number is dropped, and its numbers are merged into those of EVERY. The only harm
    is that some blocks become unreachable.
    """

    def __init__(self) -> None:
        self._epochs: dict[bytes, Epoch] = {}
        self._lock = threading.Lock()

    def number(self, family: bytes) -> int:
        """Returns the present epoch of a family."""
        with self._lock:
            return max((each.number for each in self._of(family)), default=0)

    def floor(self, family: bytes) -> int:
        """Returns the first epoch of a family that has not ended."""
        with self._lock:
            return max((each.floor for each in self._of(family)), default=0)

    def raised(self, families: Sequence[bytes], now_ms: int, *, keep: bool) -> list[Epoch]:
        """Raise the epochs of families, or of all families (`EVERY`), to one new number. Returns the new epochs.

        With `keep`, nodes do not drop the blocks of the former epochs, but evict them in time. `now_ms`: the Unix time. The new number is
        at least this, which makes it larger than all numbers that other clusters have used so far.
        """
        with self._lock:
            known = [each for family in families for each in ([*self._epochs.values()] if family == EVERY else self._of(family))]
            number = max(now_ms, *(each.number + 1 for each in known), 1)
            floors = [max((each.floor for each in self._of(family)), default=0) if keep else number for family in families]
            return [self._adopt(Epoch(family, number, floor)) for family, floor in zip(families, floors, strict=True)]

    def adopt(self, epochs: Iterable[Epoch]) -> bool:
        """Merge the epochs that another process knows. Returns whether this book has changed."""
        with self._lock:
            before = dict(self._epochs)
            for each in epochs:
                self._adopt(each)
            return self._epochs != before

    def everything(self) -> list[Epoch]:
        """Returns all epochs that were ever raised."""
        with self._lock:
            return sorted(self._epochs.values())

    def _of(self, family: bytes) -> list[Epoch]:
        return [self._epochs[name] for name in {family, EVERY} if name in self._epochs]

    def _adopt(self, epoch: Epoch) -> Epoch:
        known = self._epochs.get(epoch.family)
        self._epochs[epoch.family] = epoch = known.merged(epoch) if known else epoch
        every = self._epochs.get(EVERY, Epoch(EVERY, 0, 0))
        for name, each in [*self._epochs.items()]:
            if name != EVERY and each.number <= every.number and each.floor <= every.floor:
                del self._epochs[name]
        others = [each for name, each in self._epochs.items() if name != EVERY]
        if len(others) > FAMILIES_MAX:
            lowest = min(others, key=lambda each: (each.number, each.family))
            del self._epochs[lowest.family]
            self._adopt(lowest._replace(family=EVERY))
        return epoch
