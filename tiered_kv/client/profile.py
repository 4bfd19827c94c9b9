"""Where the time of fetches and stores goes, by stage: hash, look-up, copy, decode, store. Off, nothing is there that could cost."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from tiered_kv.clock import Clock, SystemClock

STAGES = ("hash", "look-up", "copy", "decode", "store")
"""hash: keys of a prompt; look-up: the shared index; copy: blocks that lie as they were stored; decode: coded ones, copying included
(summed over the threads that decode); store: reserving, packing and committing new blocks."""


class Stage(NamedTuple):
    """What one stage took: calls, seconds in all, and the longest call."""

    stage: str
    calls: int
    seconds: float
    longest_s: float


class Profile:
    """Time by stage. Thread-safe; about a microsecond a call."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        with self._lock:
            self._stages = {stage: Stage(stage, 0, 0.0, 0.0) for stage in STAGES}

    def timed(self, stage: str, function: Callable) -> Callable:
        """The function, its time counted to `stage`."""

        @wraps(function)
        def measured(*arguments: Any, **options: Any) -> Any:
            begun_s = self._clock.now_s()
            try:
                return function(*arguments, **options)
            finally:
                self._add(stage, self._clock.now_s() - begun_s)

        return measured

    def _add(self, stage: str, seconds: float) -> None:
        with self._lock:
            _, calls, total_s, longest_s = self._stages[stage]
            self._stages[stage] = Stage(stage, calls + 1, total_s + seconds, max(longest_s, seconds))

    def stages(self) -> list[Stage]:
        """Every stage, in the order that a request meets them."""
        with self._lock:
            return list(self._stages.values())

    def table(self) -> str:
        """The stages as text for people."""
        rows = ["stage       calls     total ms    mean us     max us   share"]
        whole_s = sum(each.seconds for each in self.stages()) or 1.0
        for stage, calls, seconds, longest_s in self.stages():
            mean_us = seconds / calls * 1e6 if calls else 0.0
            rows.append(
                f"{stage:8} {calls:8} {seconds * 1e3:12.3f} {mean_us:10.1f} {longest_s * 1e6:10.1f} {seconds / whole_s:6.1%}".rstrip()
            )
        return "\n".join(rows)
