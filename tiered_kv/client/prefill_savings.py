"""What a worker's fetches save it: prefill tokens, and the seconds that computing them would have taken longer than fetching them."""

import threading

from tiered_kv import forking

RATE_WINDOW_TOKENS = 32_768
"""The prefill rate is that of about so many tokens computed last."""
PREFILL_TOKENS_MIN = 64
"""A prefill of fewer tokens tells what a step of the model costs, not its rate."""


class Savings:
    """Sums over the fetches of one client, and the prefill rate of its model. Thread-safe."""

    def __init__(self) -> None:
        self.tokens = 0
        self.seconds = 0.0
        self._measured_tokens = 0.0  # both decay with each token measured
        self._measured_s = 0.0
        self._lock = threading.Lock()
        forking.register(self)

    def after_fork(self) -> None:
        """In a child process: a thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Tokens of a prompt that the model computes in a second; None before it was measured."""
        return self._measured_tokens / self._measured_s if self._measured_s else None

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """The model computed so many tokens of a prompt in so many seconds."""
        if not (tokens >= PREFILL_TOKENS_MIN and 0 < seconds < float("inf")):
            return
        with self._lock:
            kept = max(1 - tokens / RATE_WINDOW_TOKENS, 0.0)
            self._measured_tokens = kept * self._measured_tokens + tokens
            self._measured_s = kept * self._measured_s + seconds

    def fetched(self, tokens: int, seconds: float) -> float:
        """A fetch delivered so many tokens in so many seconds; the seconds that this saved: 0 while the rate is not known."""
        with self._lock:
            rate = self.prefill_tokens_per_s
            saved_s = max(tokens / rate - seconds, 0.0) if rate else 0.0
            self.tokens += tokens
            self.seconds += saved_s
        return saved_s

    def stats(self) -> dict:
        """The sums, and the rate."""
        with self._lock:
            return {
                "prefill_tokens_saved": self.tokens,
                "prefill_seconds_saved": self.seconds,
                "prefill_tokens_per_s": self.prefill_tokens_per_s,
            }

    def check(self) -> None:
        """Assert that the sums make sense."""
        assert self.tokens >= 0
        assert self.seconds >= 0
        assert (self._measured_tokens > 0) == (self._measured_s > 0)
