"""What more memory would bring: the hit ratio of an infinite cache, and of one with twice the room. In at most 1 MiB.

A worker that misses a block computes it and stores it. So the node sees the misses that matter as stores, also those that it refuses.
Of the stored blocks an infinite cache would have missed each different one once: the rest, and all hits, are its hits. The number
of different ones is estimated by a sketch (`DistinctKeys`).

A cache with twice the room would still have the blocks that were evicted last, as many bytes as the room (a victim cache). A block
that is stored again while it is among them would have been a hit. They are sampled by their keys (Waldspurger et al., SHARDS, 2015).
"""

from collections.abc import Callable, Iterable

from tiered_kv.blocks import GoneCause, Location
from tiered_kv.keys import BlockKey
from tiered_kv.node.insight.distinct import DistinctKeys
from tiered_kv.protocol.messages import CeilingStats

GHOSTS_MAX = 2048
GHOST_BYTES = 200
"""About the bytes of an entry of a dict with a key of 32 bytes and a large number."""
LOG_MAX = 2048
"""Once so many stores and evictions have been noted, they are evaluated at once instead of at the next beat."""
LOG_BYTES = 120
"""About the bytes of an entry of the log."""
_SAMPLED_BYTE = 30  # of a key; no other structure samples by it
_PARTS_MAX = 256


class Ceiling:
    """Estimates one node's hit ratio with more room, since the node's start. `room_bytes`: the caps of all its tiers together.

    `tallies()`: the numbers of blocks that workers asked for, and that they got. Stores and evictions only append to a log, which
    `beat` evaluates. Not thread-safe: the engine's lock guards it.
    """

    def __init__(self, room_bytes: int, tallies: Callable[[], tuple[int, int]]) -> None:
        self._room_bytes = room_bytes
        self._tallies = tallies
        self._asked_before, self._hit_before = tallies()
        self._log: list[BlockKey | tuple[BlockKey, int]] = []  # a stored block; or an evicted one, and its bytes
        self._distinct = DistinctKeys()
        self._stored = 0
        self._ghosts: dict[BlockKey, int] = {}  # sampled evicted blocks, and how many bytes were evicted before each, the oldest first
        self._evicted_bytes = 0
        self._parts = 1  # one key of so many is sampled
        self._twice = 0

    def stored(self, keys: Iterable[BlockKey]) -> None:
        """Note that workers stored these blocks, or wanted to. They had computed them, because they had missed them."""
        self._log.extend(keys)
        if len(self._log) >= LOG_MAX:
            self.beat()

    def gone(self, key: BlockKey, location: Location, cause: GoneCause, uses: int, standing: float) -> None:
        """Note that a block is gone, as a `GoneObserver`. Only evicted blocks count: more room would have kept those."""
        if cause <= GoneCause.RECLAIMED:
            self._log.append((key, location.stored_bytes))
            if len(self._log) >= LOG_MAX:
                self.beat()

    def beat(self) -> None:
        """Evaluate the log. Takes about 0.5 µs an entry."""
        entries, self._log = self._log, []
        keys = [entry for entry in entries if isinstance(entry, bytes)]
        if keys:
            self._distinct.add(keys)
            self._stored += len(keys)
        self._replay(entries)

    def _replay(self, entries: list[BlockKey | tuple[BlockKey, int]]) -> None:
        """Replay stores and evictions in a cache of evicted blocks."""
        ghosts, mask = self._ghosts, self._parts - 1
        for entry in entries:
            if isinstance(entry, bytes):
                if not entry[_SAMPLED_BYTE] & mask and (before := ghosts.pop(entry, None)) is not None:
                    self._twice += self._parts * (self._evicted_bytes - before <= self._room_bytes)
            else:
                key, nbytes = entry
                self._evicted_bytes += nbytes
                if not key[_SAMPLED_BYTE] & mask:
                    ghosts.pop(key, None)
                    ghosts[key] = self._evicted_bytes
        self._forget_ghosts()

    def _forget_ghosts(self) -> None:
        """Forget evicted blocks for which twice the room would not do, and sample fewer if there are too many."""
        ghosts = self._ghosts
        while ghosts and self._evicted_bytes - ghosts[oldest := next(iter(ghosts))] > self._room_bytes:
            del ghosts[oldest]
        while len(ghosts) > GHOSTS_MAX and self._parts < _PARTS_MAX:
            self._parts *= 2
            for key in [key for key in ghosts if key[_SAMPLED_BYTE] & (self._parts - 1)]:
                del ghosts[key]
        while len(ghosts) > GHOSTS_MAX:
            del ghosts[next(iter(ghosts))]

    def stats(self) -> CeilingStats:
        """Returns the figures since the node's start, up to the last beat."""
        asked, hit = (now - before for now, before in zip(self._tallies(), (self._asked_before, self._hit_before), strict=True))
        again = max(self._stored - round(self._distinct.estimate()), 0)
        infinite = min(hit + again, asked)
        return {
            "asked_blocks": asked,
            "hit_blocks": hit,
            "hit_blocks_infinite": infinite,
            "hit_blocks_twice_room": min(hit + self._twice, infinite),
        }

    @property
    def nbytes(self) -> int:
        """About the largest number of bytes that the sketch and the evicted blocks take."""
        return self._distinct.nbytes + GHOSTS_MAX * GHOST_BYTES + LOG_MAX * LOG_BYTES

    def check(self) -> None:
        """Assert the bounds, and that evicted blocks are in order."""
        self._distinct.check()
        assert len(self._ghosts) <= GHOSTS_MAX
        assert list(self._ghosts.values()) == sorted(self._ghosts.values())
