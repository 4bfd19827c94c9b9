"""A profile of fetches and stores: the time of each stage (hash, look-up, copy, decode, store). It costs nothing while it is off."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

from tiered_kv.clock import Clock, SystemClock

STAGES = ("hash", "look-up", "copy", "decode", "store")
"""hash: computing the keys of a prompt. look-up: searching the shared index. copy: copying uncompressed blocks. decode: copying and
decoding encoded blocks, summed over the decoding threads. store: reserving, packing and committing new blocks."""

P = ParamSpec("P")
R = TypeVar("R")


class Timed(Protocol):
    """A function that wraps another function to measure its time."""

    def __call__(self, stage: str, function: Callable[P, R], /) -> Callable[P, R]:
        """Returns a function that calls `function` and adds its time to `stage`."""


def untimed(stage: str, function: Callable[P, R], /) -> Callable[P, R]:
    """Returns `function` itself: the `Timed` that measures nothing."""
    return function


class Stage(NamedTuple):
    """The figures of one stage: number of calls, seconds in all, and the longest call."""

    stage: str
    calls: int
    seconds: float
    longest_s: float


class Profile:
    """The time spent in each stage. Thread-safe. Costs about a microsecond a call."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Set all figures to zero."""
        with self._lock:
            self._stages = {stage: Stage(stage, 0, 0.0, 0.0) for stage in STAGES}

    def timed(self, stage: str, function: Callable[P, R], /) -> Callable[P, R]:
        """Returns a function that calls `function` and adds its time to `stage`."""

        @wraps(function)
        def measured(*arguments: P.args, **options: P.kwargs) -> R:
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
        """Returns the figures of every stage, in the order in which a request runs them."""
        with self._lock:
            return list(self._stages.values())

    def table(self) -> str:
        """Returns the stages as a table for people to read."""
        rows = ["stage       calls     total ms    mean us     max us   share"]
        whole_s = sum(each.seconds for each in self.stages()) or 1.0
        for stage, calls, seconds, longest_s in self.stages():
            mean_us = seconds / calls * 1e6 if calls else 0.0
            rows.append(
                f"{stage:8} {calls:8} {seconds * 1e3:12.3f} {mean_us:10.1f} {longest_s * 1e6:10.1f} {seconds / whole_s:6.1%}".rstrip()
            )
        return "\n".join(rows)
