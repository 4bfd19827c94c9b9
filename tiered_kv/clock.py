"""Time as an argument: the system's monotonic clock, and one that tests move by hand."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where a component gets its time from."""

    def now_s(self) -> float:
        """Seconds since an arbitrary start; never goes back."""


class SystemClock:
    """The machine's monotonic clock; on Linux the same in every process of the machine."""

    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that stands still until a test moves it."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("a clock never goes back")
        self._now_s += seconds
