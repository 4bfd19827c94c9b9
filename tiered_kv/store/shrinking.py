"""Bookkeeping of blocks in host memory that can be compressed in place. The store machine decides when, the mover compresses.

A worker stores blocks uncompressed, which costs it one copy. If host memory has a codec, blocks are encoded in the background
once memory fills up: the least recently used first, and before any block is evicted.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tiered_kv.keys import BlockKey

FULL_SHARE = 3 / 4
"""Share of host memory that may be used before blocks are compressed: uncompressed blocks are the fastest to read."""
STAGING_SHARE = 1 / 16
STAGING_BYTES_MAX = 256 << 20
SHARE_AT_FIRST = 0.55  # expected size of an encoded block, as a share of its raw size, before any was encoded


def staging_bytes(capacity_bytes: int) -> int:
    """Returns the size of the staging area: host memory kept free of encoded blocks, so that new uncompressed blocks find room.

    One store reserves no more than this at a time.
    """
    return min(int(capacity_bytes * STAGING_SHARE), STAGING_BYTES_MAX)


class UnderWay(NamedTuple):
    """A block that is being encoded: its present size in bytes, and how many bytes encoding is expected to free."""

    nbytes: int
    gain: int


class Shrinking:
    """Uncompressed blocks in host memory: waiting to be encoded, being encoded (`under_way`), or found incompressible.

    `capacity_bytes`: the size of host memory; 0 if blocks are never encoded there. With 0, nothing is recorded here.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._plain: dict[BlockKey, int] = {}  # bytes; least recently used first
        self._incompressible: dict[BlockKey, int] = {}
        self.under_way: dict[BlockKey, UnderWay] = {}
        self._gain_bytes = 0
        self._before_bytes, self._after_bytes = 0, 0
        self._is_stuck = False  # the last encoded block found no room to be written to

    def add(self, key: BlockKey, nbytes: int) -> None:
        """Record that a block is in host memory uncompressed."""
        if self.capacity_bytes:
            self._plain[key] = nbytes

    def remove(self, key: BlockKey) -> None:
        """Forget a block that left host memory."""
        if self.capacity_bytes:
            self._plain.pop(key, None)
            self._incompressible.pop(key, None)
            self._end(key)
            self._is_stuck = False

    def used(self, keys: Sequence[BlockKey]) -> None:
        """Note a use of blocks of a chain, ancestors first. Of these blocks, the deepest will be encoded first."""
        if self._plain:
            for key in reversed(keys):
                nbytes = self._plain.pop(key, None)
                if nbytes is not None:
                    self._plain[key] = nbytes

    def over(self, used_bytes: int, nbytes: int) -> float:
        """Returns how many bytes encoding should free: at least `nbytes`, or more if `used_bytes` exceed FULL_SHARE.

        The gain of blocks that are being encoded counts as free already.
        """
        if not self.capacity_bytes:
            return 0
        return max(used_bytes - self._gain_bytes - FULL_SHARE * self.capacity_bytes, nbytes)

    def choose(self, nbytes: float, is_busy: Callable[[BlockKey], bool]) -> list[tuple[BlockKey, int]]:
        """Choose blocks to encode now, the least recently used first, so that `nbytes` are freed. Adds them to `under_way`.

        Leaves out blocks for which `is_busy` is true. Returns each key with its expected gain in bytes.
        """
        if self._is_stuck:  # no room for encoded blocks, until a block leaves
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
        """Record that a block was encoded and takes `after_bytes` now."""
        self._is_stuck = False
        self._before_bytes += self._end(key)
        self._after_bytes += after_bytes

    def failed(self, key: BlockKey, again: bool) -> None:
        """Record that a block was not encoded. `again`: only for lack of room, so it will be tried again once a block has left."""
        nbytes = self._end(key)
        if again:
            self._plain[key] = nbytes
            self._is_stuck = True
        else:
            self._incompressible[key] = nbytes

    def retry_all(self) -> None:
        """Try all incompressible blocks again, because another codec is in use."""
        self._plain |= self._incompressible
        self._incompressible.clear()

    def _end(self, key: BlockKey) -> int:
        """Forget that a block is being encoded. Returns its uncompressed bytes, or 0 if it was not being encoded."""
        nbytes, gain = self.under_way.pop(key, UnderWay(0, 0))
        self._gain_bytes -= gain
        return nbytes

    def check(self, stored: Mapping[BlockKey, int]) -> None:
        """Assert that every uncompressed block of host memory (`stored`: its bytes by key) is recorded exactly once."""
        assert self._gain_bytes == sum(gain for _, gain in self.under_way.values())
        if self.capacity_bytes:
            known = self._plain | {key: nbytes for key, (nbytes, _) in self.under_way.items()}
            assert len(known) == len(self._plain) + len(self.under_way)
            assert not self._incompressible.keys() & known.keys()
            assert known | self._incompressible == stored
