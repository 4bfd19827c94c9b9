"""Which blocks in host memory should take fewer bytes there: the books. When and how is said by the machine and the mover.

A worker stores blocks as they are, which costs it one copy. Where host memory has a codec of its own they are coded in the
background once memory fills up, the least recently used first, and before any block is given up for room.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tiered_kv.keys import BlockKey

FULL_SHARE = 3 / 4
"""Of host memory: up to here all blocks may stay as they were stored, which is what is read fastest."""
STAGING_SHARE = 1 / 16
STAGING_BYTES_MAX = 256 << 20
SHARE_AT_FIRST = 0.55  # of its bytes that a block is expected to take once coded, before any was


def staging_bytes(capacity_bytes: int) -> int:
    """How much of host memory coded blocks leave to those that come as they are; one store gets as much at a time."""
    return min(int(capacity_bytes * STAGING_SHARE), STAGING_BYTES_MAX)


class UnderWay(NamedTuple):
    """A block that is being coded: the bytes that it takes until then, and how many fewer it is expected to take."""

    nbytes: int
    gain: int


class Shrinking:
    """Blocks that lie in host memory as they were stored: to be coded, being coded (`under_way`), or tried without a gain.

    `capacity_bytes` of host memory; 0: nothing is ever coded there, and nothing is kept here.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._plain: dict[BlockKey, int] = {}  # bytes; least recently used first
        self._hopeless: dict[BlockKey, int] = {}
        self.under_way: dict[BlockKey, UnderWay] = {}
        self._gain_bytes = 0
        self._before_bytes, self._after_bytes = 0, 0
        self._is_stuck = False  # the last one found no room to be coded into

    def add(self, key: BlockKey, nbytes: int) -> None:
        """The block lies there as it was stored."""
        if self.capacity_bytes:
            self._plain[key] = nbytes

    def remove(self, key: BlockKey) -> None:
        """The block is not there any more."""
        if self.capacity_bytes:
            self._plain.pop(key, None)
            self._hopeless.pop(key, None)
            self._end(key)
            self._is_stuck = False

    def used(self, keys: Sequence[BlockKey]) -> None:
        """A run of a chain, root first, was used: of it the deepest block is coded first."""
        if self._plain:
            for key in reversed(keys):
                nbytes = self._plain.pop(key, None)
                if nbytes is not None:
                    self._plain[key] = nbytes

    def over(self, used_bytes: int, nbytes: int) -> float:
        """How many bytes should be gained by coding: `nbytes` more than is under way, or what `used_bytes` are above FULL_SHARE."""
        if not self.capacity_bytes:
            return 0
        return max(used_bytes - self._gain_bytes - FULL_SHARE * self.capacity_bytes, nbytes)

    def choose(self, nbytes: float, is_busy: Callable[[BlockKey], bool]) -> list[tuple[BlockKey, int]]:
        """Blocks to code now for a gain of `nbytes`, each with its own, the least recently used first. They are under way from now on."""
        if self._is_stuck:  # until somebody goes
            return []
        share = self._after_bytes / self._before_bytes if self._before_bytes else SHARE_AT_FIRST
        chosen: list[tuple[BlockKey, int]] = []
        for key, size in self._plain.items():
            if nbytes <= 0:
                break
            if not is_busy(key):
                chosen.append((key, max(int(size * (1 - share)), 1)))
                nbytes -= chosen[-1][1]
        for key, gain in chosen:
            self.under_way[key] = UnderWay(self._plain.pop(key), gain)
            self._gain_bytes += gain
        return chosen

    def done(self, key: BlockKey, after_bytes: int) -> None:
        """The block takes `after_bytes` now."""
        self._is_stuck = False
        self._before_bytes += self._end(key)
        self._after_bytes += after_bytes

    def failed(self, key: BlockKey, again: bool) -> None:
        """The block is as it was; `again`: for lack of room, so that it may be tried once more when there is some."""
        nbytes = self._end(key)
        if again:
            self._plain[key] = nbytes
            self._is_stuck = True
        else:
            self._hopeless[key] = nbytes

    def hope(self) -> None:
        """What could not be made smaller may be now: another codec is there."""
        self._plain |= self._hopeless
        self._hopeless.clear()

    def _end(self, key: BlockKey) -> int:
        """The block is not being coded any more; the bytes that it had before, 0 if it was not."""
        nbytes, gain = self.under_way.pop(key, UnderWay(0, 0))
        self._gain_bytes -= gain
        return nbytes

    def check(self, stored: Mapping[BlockKey, int]) -> None:
        """Assert that every block that lies there as it was `stored`, with these bytes, is known, once."""
        assert self._gain_bytes == sum(gain for _, gain in self.under_way.values())
        if self.capacity_bytes:
            known = self._plain | {key: nbytes for key, (nbytes, _) in self.under_way.items()}
            assert len(known) == len(self._plain) + len(self.under_way)
            assert not self._hopeless.keys() & known.keys()
            assert known | self._hopeless == stored
