"""Counts of a node's service: how long it has run, how often it was restarted, how many blocks it refused, and its rates of hits."""

import threading
from collections import deque
from typing import NamedTuple

from tiered_kv.clock import Clock
from tiered_kv.protocol.messages import Rates, ServiceStats

WINDOW_S = 10.0
"""Rates are means over at least this time, or over the node's life if that is shorter."""
SAMPLE_S = 1.0


class _Sample(NamedTuple):
    at_s: float
    hit_blocks: int
    hit_bytes: int


class ServiceCounters:
    """Counts of one life of a node. Thread-safe. `generation`: how often a node has been started on these files, this time included."""

    def __init__(self, clock: Clock, generation: int) -> None:
        self._clock = clock
        self._begun_s = clock.now_s()
        self._restarts = generation - 1
        self.refused_blocks = 0
        self._lock = threading.Lock()
        self._samples: deque[_Sample] = deque()

    def refused(self, blocks: int) -> None:
        """Count blocks that a worker could not store, because no room appeared in time."""
        with self._lock:
            self.refused_blocks += blocks

    def stats(self, hit_blocks: int, hit_bytes: int) -> ServiceStats:
        """Take a sample of the node's totals of hits. Returns the figures up to now."""
        now_s = self._clock.now_s()
        with self._lock:
            return {
                "uptime_s": now_s - self._begun_s,
                "restarts": self._restarts,
                "refused_blocks": self.refused_blocks,
                "rates": self._rates(_Sample(now_s, hit_blocks, hit_bytes)),
            }

    def _rates(self, now: _Sample) -> Rates:
        samples = self._samples
        if not samples or now.at_s - samples[-1].at_s >= SAMPLE_S:
            samples.append(now)
        while len(samples) > 1 and now.at_s - samples[1].at_s >= WINDOW_S:
            samples.popleft()
        over_s = now.at_s - samples[0].at_s
        if over_s <= 0:
            return {"over_s": 0.0, "hit_blocks_per_s": 0.0, "hit_bytes_per_s": 0.0}
        return {
            "over_s": over_s,
            "hit_blocks_per_s": (now.hit_blocks - samples[0].hit_blocks) / over_s,
            "hit_bytes_per_s": (now.hit_bytes - samples[0].hit_bytes) / over_s,
        }
