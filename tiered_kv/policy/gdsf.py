"""Greedy dual size frequency: a block's priority is uses × cost ÷ size, plus a level that rises with each eviction.

Cherkasova: Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy (HP Labs, 1998).
"""

from collections.abc import Sequence
from itertools import count

from tiered_kv.policy.base import Key
from tiered_kv.policy.leaves import OneQueuePolicy


class GDSFPolicy(OneQueuePolicy):
    """Evicts the leaf with the lowest priority. The cost of a block is the factor of `weigh`, 1 by default.

    The level makes new blocks comparable with blocks that were hot long ago. O(1) a use, O(log n) a victim.
    """

    def __init__(self) -> None:
        self._tick = count()
        self._level = 0.0
        self._uses: dict[Key, int] = {}
        self._factor: dict[Key, float] = {}
        self._priority: dict[Key, tuple[float, int]] = {}
        super().__init__(self._priority)

    def weigh(self, key: Key, factor: float) -> None:
        before = self._worth(key, self._bytes[key])
        self._factor[key] = factor
        self._change(key, before)

    def _resized(self, key: Key, before: int) -> None:
        self._change(key, self._worth(key, before))

    def _change(self, key: Key, before: float) -> None:
        """Updates the block's priority. Its worth (uses × cost ÷ size) was `before`."""
        priority, tick = self._priority[key]
        self._priority[key] = (priority + self._worth(key, self._bytes[key]) - before, tick)
        if key in self._leaves.queued:
            self._leaves.push(key)

    def _worth(self, key: Key, nbytes: int) -> float:
        return self._uses[key] * self._factor.get(key, 1.0) / nbytes

    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        self._touched(keys)

    def _touched(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            self._uses[key] = self._uses.get(key, 0) + 1
            self._priority[key] = (self._level + self._worth(key, self._bytes[key]), next(self._tick))

    def _removed(self, key: Key, nbytes: int, evicted: bool) -> None:
        priority, _ = self._priority.pop(key)
        if evicted:
            self._level = max(self._level, priority)
        del self._uses[key]
        self._factor.pop(key, None)
