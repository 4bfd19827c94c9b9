"""The time that a worker's model takes to compute tokens of a prompt, fitted to the prefills that it has computed.

The cost of a token grows with its position, because attention reads all tokens before it.
"""

import threading
from collections import deque
from typing import NamedTuple

import numpy as np

from tiered_kv import forking
from tiered_kv.client.prefill_savings import PREFILL_TOKENS_MIN

PREFILLS_KEPT = 16
"""The fit uses this many of the latest prefills, so that it includes the present load of the machine."""
PREFILLS_MIN = 3
"""Before this many prefills nothing is known: the first ones of a process are slow."""
SHORT_PART = 8
"""A prefill of less than 1/SHORT_PART of the longest one is left out: the cost of a step is large in it."""


class PrefillCost(NamedTuple):
    """The cost of computing a prompt: `token_s + position_s * position` seconds for the token at `position`."""

    token_s: float
    position_s: float = 0.0

    def seconds(self, start: int, end: int) -> float:
        """Returns the time to compute the tokens from `start` up to, and without, `end`."""
        return (end - start) * (self.token_s + self.position_s * (start + end) / 2)


class PrefillTimes:
    """The latest prefills of a model, and the `PrefillCost` that fits them. Thread-safe.

    The fit takes medians (Theil-Sen), so that up to a quarter of the prefills may have been disturbed.
    """

    def __init__(self) -> None:
        self.cost: PrefillCost | None = None
        """The present fit; None before PREFILLS_MIN prefills."""
        self._latest: deque[tuple[int, int, float]] = deque(maxlen=PREFILLS_KEPT)
        self._lock = threading.Lock()
        forking.register(self)

    def after_fork(self) -> None:
        """Renew the lock in a child process: a thread of the parent may have held it."""
        self._lock = threading.Lock()

    def note(self, tokens: int, seconds: float, position: int = 0) -> None:
        """Record that the model computed `tokens` tokens, the first of them at `position`, in `seconds`. About 0.1 ms."""
        if not (tokens >= PREFILL_TOKENS_MIN and 0 < seconds < float("inf")):
            return
        with self._lock:
            self._latest.append((position, tokens, seconds))
            if len(self._latest) >= PREFILLS_MIN:
                self.cost = _fitted(list(self._latest))


def _fitted(prefills: list[tuple[int, int, float]]) -> PrefillCost:
    longest = max(tokens for _, tokens, _ in prefills)
    rows = np.array([row for row in prefills if row[1] * SHORT_PART >= longest])
    tokens, middle, per_token = rows[:, 1], rows[:, 0] + rows[:, 1] / 2, rows[:, 2] / rows[:, 1]
    first, second = np.triu_indices(len(rows), 1)
    apart = middle[second] - middle[first]
    far = np.abs(apart) >= PREFILL_TOKENS_MIN
    slope = 0.0
    if far.any():
        slope = max(float(np.median((per_token[second] - per_token[first])[far] / apart[far])), 0.0)
    return PrefillCost(max(_weighted_median(per_token - slope * middle, tokens), 0.0), slope)


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, reached[-1] / 2)])
