"""The times that loads from slow tiers and from other nodes take: for each source a latency, and seconds per byte.

They follow the loads of the last seconds, with all contention in them, and not the best ones.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

from tiered_kv import forking
from tiered_kv.blocks import PEER
from tiered_kv.clock import Clock

SAMPLE_KEPT = 0.8
"""Each load reduces the weight of the former ones to this part."""
SURPRISE = 3.0
"""A load that is this many times faster than expected replaces all former ones, as do two that are this many times slower."""
FARTHEST = 1.5
"""Loads of one size say nothing certain about loads that are more than this many times larger."""
SPREAD_MIN = 0.25
"""Latency and rate are told apart only if the sizes of the loads differ by this part of their mean."""
PROBE_EVERY_S = 2.0
"""A source that is not used because it is slow is measured again, by a load of one block, at most this often."""
SILENCE_S = 0.05
SOURCES_MAX = 128


class LoadPart(NamedTuple):
    """Consecutive blocks of a chain from one source, and the bytes that a load of them moves."""

    source: str
    blocks: int
    nbytes: int


class LoadCostStats(TypedDict):
    """The estimate for one source. `loads`: the number of loads behind it."""

    latency_s: float
    bytes_per_s: float | None
    loads: int


class LoadCost:
    """The time of loads from one source: `latency_s + byte_s * nbytes`, by least squares over recent loads.

    While all loads were of about one size, the whole time is taken for latency. So larger loads are tried, and show the rate.
    """

    def __init__(self, latency_s: float = 0.0, byte_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self.byte_s = byte_s
        self.loads = 0
        self._latency_share, self._is_split = 1.0, False  # is_split: whether latency and rate were told apart
        self._was_slow = False
        self._clear()

    def _clear(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def seconds(self, nbytes: float) -> float:
        """Returns the expected time of a load of `nbytes`."""
        return self.latency_s + nbytes * self.byte_s

    def seconds_at_most(self, nbytes: float) -> float:
        """Returns the expected time of a load of `nbytes` if all of what is not certain takes time for each byte."""
        if self.is_certain(nbytes):
            return self.seconds(nbytes)
        return self._y / self._x * nbytes

    def is_certain(self, nbytes: float) -> bool:
        """Returns whether a load of `nbytes` takes the expected time at most: loads were as large, or of different sizes."""
        return self._is_split or nbytes * self._weight <= FARTHEST * self._x

    def _is_comparable(self, nbytes: float) -> bool:
        return self.loads > 0 and self.is_certain(nbytes) and (self._is_split or nbytes * self._weight * FARTHEST >= self._x)

    def note(self, nbytes: int, seconds: float) -> None:
        """Record a load. A single load that is very slow is taken for an exception, and counts as SURPRISE times slower than expected."""
        expected_s = self.seconds(nbytes)
        is_comparable = self._is_comparable(nbytes)
        is_slow = is_comparable and seconds > expected_s * SURPRISE
        if is_slow and self._was_slow:
            self._clear()
        elif is_comparable and seconds * SURPRISE < expected_s:
            self._clear()
            self._latency_share, self._is_split = 1.0, False
        elif is_slow:
            seconds = expected_s * SURPRISE
        self._was_slow = is_slow
        self.loads += 1
        kept, x = SAMPLE_KEPT, float(nbytes)
        self._weight = kept * self._weight + 1
        self._x, self._y = kept * self._x + x, kept * self._y + seconds
        self._xx, self._xy = kept * self._xx + x * x, kept * self._xy + x * seconds
        self._fit()

    def _fit(self) -> None:
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x * mean_x
        if variance > (SPREAD_MIN * mean_x) ** 2:
            slope = (self._xy / self._weight - mean_x * mean_y) / variance
            self._latency_share, self._is_split = 1 - min(max(slope * mean_x / mean_y, 0.0), 1.0), True
        self.latency_s = self._latency_share * mean_y
        self.byte_s = (mean_y - self.latency_s) / mean_x


class LoadCosts:
    """The `LoadCost` of each source: the label of a tier, PEER for all peers, or the name of one (`peer_source`). Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._costs: dict[str, LoadCost] = {}
        self._probed_s: dict[str, float] = {}
        self._unfinished: dict[str, int] = {}
        self._lock = threading.Lock()
        forking.register(self)

    def after_fork(self) -> None:
        """Renew the lock in a child process: a thread of the parent may have held it. The parent's loads do not end here."""
        self._lock, self._unfinished = threading.Lock(), {}

    def note(self, source: str, nbytes: int, seconds: float) -> None:
        """Record that a load of `nbytes` from a source took `seconds`. Without bytes, nothing is recorded."""
        if nbytes <= 0 or not 0 < seconds < float("inf"):
            return
        with self._lock:
            if source not in self._costs and len(self._costs) >= SOURCES_MAX:
                del self._costs[next(iter(self._costs))]
            self._costs.setdefault(source, LoadCost()).note(nbytes, seconds)

    def note_pull(self, peers: Sequence[LoadPart], blocks: int, nbytes: int, seconds: float) -> None:
        """Record that a pull brought `blocks` new blocks of `nbytes` each, from these peers one after the other."""
        if blocks <= 0:
            self.note_silence(peers[0].source, nbytes, seconds)
            return
        self.note(PEER, blocks * nbytes, seconds)
        left = blocks
        for source, count, _ in peers:
            part = min(count, left)
            left -= part
            if source != PEER:
                self.note(source, part * nbytes, seconds * part / blocks)

    def note_silence(self, source: str, nbytes: int, seconds: float) -> None:
        """Record that a load of at least `nbytes` had brought no block after `seconds`. Short times say nothing: the blocks were gone."""
        if seconds >= SILENCE_S and seconds > (self.seconds(source, nbytes) or 0.0):
            self.note(source, nbytes, seconds)

    def seconds(self, source: str, nbytes: int) -> float | None:
        """Returns the expected time of a load; None for a source that is not known yet. An unknown peer is expected to be as the others."""
        cost = self.of(source)
        return cost.seconds(nbytes) if cost is not None else None

    def of(self, source: str) -> LoadCost | None:
        """Returns the estimate for a source, for an unknown peer that for all peers, or None."""
        return self._costs.get(source) or (self._costs.get(PEER) if label_of(source) == PEER else None)

    def peers_seconds(self, nbytes: int) -> float | None:
        """Returns the expected time of a load from the slowest known peer.

        None if it is not certain for each of them, or if a load goes on for which no fetch waits any more.
        """
        with self._lock:
            if any(label_of(source) == PEER and count for source, count in self._unfinished.items()):
                return None
            peers = [cost for source, cost in self._costs.items() if label_of(source) == PEER]
        return max(cost.seconds(nbytes) for cost in peers) if peers and all(cost.is_certain(nbytes) for cost in peers) else None

    def begin_measuring(self, *sources: str) -> None:
        """Record that a load goes on though its fetch no longer waits for it. End it with `end_measuring`."""
        with self._lock:
            for source in sources:
                self._unfinished[source] = self._unfinished.get(source, 0) + 1

    def end_measuring(self, *sources: str) -> None:
        """Record the end of such a load."""
        with self._lock:
            for source in sources:
                self._unfinished[source] = max(self._unfinished.get(source, 0) - 1, 0)

    def is_measuring(self, source: str) -> bool:
        """Returns whether such a load is running."""
        return self._unfinished.get(source, 0) > 0

    @property
    def is_busy(self) -> bool:
        """Whether such a load from any source is running."""
        return any(self._unfinished.values())

    def may_probe(self, source: str, every_s: float | None = None) -> bool:
        """Returns whether it is time to measure a declined source again. If so, the next time is `every_s` (PROBE_EVERY_S) later."""
        every_s = PROBE_EVERY_S if every_s is None else every_s
        now_s = self._clock.now_s()
        with self._lock:
            if now_s < self._probed_s.get(source, float("-inf")) + every_s or self._unfinished.get(source, 0):
                return False
            self._probed_s.pop(source, None)
            self._probed_s[source] = now_s
            while len(self._probed_s) > SOURCES_MAX:
                del self._probed_s[next(iter(self._probed_s))]
        return True

    def known(self) -> dict[str, tuple[float, float]]:
        """Returns by source the latency and the seconds per byte."""
        with self._lock:
            return {source: (cost.latency_s, cost.byte_s) for source, cost in self._costs.items()}

    def adopt(self, known: Mapping[str, tuple[float, float]]) -> None:
        """Use the estimates of another process from now on."""
        with self._lock:
            self._costs = {source: LoadCost(latency_s, byte_s) for source, (latency_s, byte_s) in known.items()}

    def stats(self) -> dict[str, LoadCostStats]:
        """Returns the estimates by source."""
        with self._lock:
            return {
                source: {"latency_s": cost.latency_s, "bytes_per_s": 1 / cost.byte_s if cost.byte_s else None, "loads": cost.loads}
                for source, cost in self._costs.items()
            }


def peer_source(node: str) -> str:
    """Returns the name under which the loads from one peer are measured."""
    return f"{PEER} {node}"


def label_of(source: str) -> str:
    """Returns the label of a source's tier."""
    return source.partition(" ")[0]
