"""A worker's savings through fetches: prefill tokens not computed, and the time by which fetching them was faster."""

import threading
from typing import TypedDict

from tiered_kv import forking

RATE_WINDOW_TOKENS = 32_768
"""The prefill rate is averaged over about this many of the tokens computed last."""
PREFILL_TOKENS_MIN = 64
"""A shorter prefill measures the cost of one step of the model, not its rate, and is left out."""


class SavingsStats(TypedDict):
    """The sums over a client's fetches, and the prefill rate of its model (None before the rate was measured)."""

    prefill_tokens_saved: int
    prefill_seconds_saved: float
    prefill_tokens_per_s: float | None


class Savings:
    """The prefill tokens and seconds that one client's fetches saved, and the measured prefill rate of its model. Thread-safe."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._measured_tokens = 0.0  # both shrink with each measured token, so that old measurements fade
        self._measured_s = 0.0
        self._lock = threading.Lock()
        forking.register(self)

    def after_fork(self) -> None:
        """Renew the lock in a child process: a thread of the parent may have held it."""
        self._lock = threading.Lock()

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """The number of prompt tokens that the model computes in a second; None before this was measured."""
        return self._measured_tokens / self._measured_s if self._measured_s else None

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """Record that the model computed `tokens` of a prompt in `seconds`."""
        if not (tokens >= PREFILL_TOKENS_MIN and 0 < seconds < float("inf")):
            return
        with self._lock:
            kept = max(1 - tokens / RATE_WINDOW_TOKENS, 0.0)
            self._measured_tokens = kept * self._measured_tokens + tokens
            self._measured_s = kept * self._measured_s + seconds

    def fetched(self, tokens: int, seconds: float) -> float:
        """Record that a fetch delivered `tokens` in `seconds`. Returns the seconds that this saved, 0 while the rate is unknown."""
        with self._lock:
            rate = self.prefill_tokens_per_s
            saved_s = max(tokens / rate - seconds, 0.0) if rate else 0.0
            self.tokens += tokens
            self.seconds += saved_s
        return saved_s

    def stats(self) -> SavingsStats:
        """Returns the sums and the rate."""
        with self._lock:
            return {
                "prefill_tokens_saved": self.tokens,
                "prefill_seconds_saved": self.seconds,
                "prefill_tokens_per_s": self.prefill_tokens_per_s,
            }

    def check(self) -> None:
        """Assert that no sum is negative, and that tokens and seconds were measured together."""
        assert self.tokens >= 0
        assert self.seconds >= 0
        assert (self._measured_tokens > 0) == (self._measured_s > 0)
