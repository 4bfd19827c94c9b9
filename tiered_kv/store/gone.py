"""Records which blocks a node no longer has, and why: a ring of fixed size, in which the newest entry replaces the oldest.

An entry takes 24 bytes: the first eight bytes of the key, the time, the standing (see `GoneBlock`), the tier, the cause and the uses.
Writing one takes less than a microsecond. Looking keys up reads the whole ring, which takes up to 5 ms.
"""

import math
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from tiered_kv.blocks import GoneCause, Location, Tier
from tiered_kv.keys import BlockKey

ENTRIES = 1 << 16
TAG_BYTES = 8
USES_MAX = 255
UNKNOWN = math.nan
_ENTRY = struct.Struct(f"<{TAG_BYTES}sdfBBBx")
_WORDS = _ENTRY.size // TAG_BYTES


class GoneBlock(NamedTuple):
    """A block that a node no longer has.

    `at_s`: when its last copy was removed, on the node's clock. `tier`: the tier of that copy, None if the node never stored
    the block.

    `uses`: how often it was used, its store included; at most USES_MAX. `standing`: if an eviction policy chose the block, the
    block's value divided by the lowest value that stayed, among the blocks that the policy compared. NaN if unknown, because not
    every policy computes values.
    """

    at_s: float
    tier: Tier | None
    cause: GoneCause
    uses: int
    standing: float


class GoneObserver(Protocol):
    """Notes each block whose last copy is removed. It must be quick: the engine's lock is held."""

    def gone(self, key: BlockKey, location: Location, cause: GoneCause, uses: int, standing: float) -> None:
        """Note that the last copy of a block, at `location`, is removed. The other arguments are those of `GoneBlock`."""


class UnobservedGone:
    """An observer that does nothing."""

    def gone(self, key: BlockKey, location: Location, cause: GoneCause, uses: int, standing: float) -> None:
        pass


class GoneBlocks:
    """The last ENTRIES blocks that one node lost or refused to store. Writers must hold the engine's lock; readers need no lock.

    `also`: another observer, whose `gone` is called for each block.
    """

    def __init__(self, now_s: Callable[[], float], also: GoneObserver | None = None, entries: int = ENTRIES) -> None:
        self._now_s = now_s
        self._also = also or UnobservedGone()
        self._begun_s = now_s()
        self._entries = entries
        self._data = bytearray(entries * _ENTRY.size)
        self._written = 0

    def gone(self, key: BlockKey, location: Location, cause: GoneCause, uses: int, standing: float) -> None:
        self._write(key, location.tier, cause, uses, standing)
        self._also.gone(key, location, cause, uses, standing)

    def refused(self, keys: Iterable[BlockKey]) -> None:
        """Record that the node refused to store these blocks of a worker, because no room appeared in time."""
        for key in keys:
            self._write(key, 0, GoneCause.REFUSED, 0, UNKNOWN)

    def _write(self, key: BlockKey, tier: int, cause: GoneCause, uses: int, standing: float) -> None:
        at = self._written % self._entries * _ENTRY.size
        _ENTRY.pack_into(self._data, at, key, self._now_s(), standing, tier, cause, min(uses, USES_MAX))
        self._written += 1

    def find(self, keys: Sequence[BlockKey]) -> dict[BlockKey, GoneBlock]:
        """Returns the newest entry of each key that has one. Takes up to 5 ms."""
        wanted = {int.from_bytes(key[:TAG_BYTES], sys.byteorder): key for key in keys}
        written, data = self._written, bytes(self._data)  # copied in one step for other threads, so that no entry is half written
        tags = memoryview(data).cast("Q")[: min(written, self._entries) * _WORDS : _WORDS].tolist()
        places = [place for place, tag in enumerate(tags) if tag in wanted]
        oldest = written % self._entries if written > self._entries else 0
        places.sort(key=lambda place: (place - oldest) % self._entries)  # a later entry of a key replaces its earlier ones
        return {wanted[tags[place]]: self._entry(data, place) for place in places}

    @staticmethod
    def _entry(data: bytes, place: int) -> GoneBlock:
        _, at_s, standing, tier, cause, uses = _ENTRY.unpack_from(data, place * _ENTRY.size)
        return GoneBlock(at_s, Tier(tier) if tier else None, GoneCause(cause), uses, standing)

    @property
    def since_s(self) -> float:
        """The time since which all lost blocks are in the record: that of the oldest entry, or of the node's start."""
        if self._written <= self._entries:
            return self._begun_s
        at_s: float = _ENTRY.unpack_from(self._data, self._written % self._entries * _ENTRY.size)[1]
        return at_s

    def check(self) -> None:
        """Assert that the ring has its fixed size, and that exactly the written entries have a cause."""
        assert len(self._data) == self._entries * _ENTRY.size
        filled = sum(1 for *_, cause, _ in _ENTRY.iter_unpack(self._data) if cause)
        assert filled == min(self._written, self._entries)
