"""Clocks, passed to components as arguments: the system's monotonic clock, and one that tests advance."""

import time
from typing import Protocol


class Clock(Protocol):
    """A component's source of time."""

    def now_s(self) -> float:
        """Returns the seconds since an arbitrary start. Never decreases."""


class SystemClock:
    """The machine's monotonic clock; on Linux the same in every process of the machine."""

    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that changes only when a test advances it."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"seconds: must be 0 or more, got {seconds}")
        self._now_s += seconds
