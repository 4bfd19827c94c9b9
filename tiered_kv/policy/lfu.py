"""Least frequently used. Uses are counted while a block is resident. Of blocks with equal counts, the one
that reached the count first is evicted.

Aho, Denning, Ullman: Principles of Optimal Page Replacement (JACM 1971).
"""

from collections.abc import Sequence

from tiered_kv.policy.base import Key
from tiered_kv.policy.lru import LRUPolicy

_TICK_BITS = 64
_ONE_USE = 1 << _TICK_BITS


class LFUPolicy(LRUPolicy):
    """Evicts the leaf with the fewest uses. O(1) a use, O(log n) a victim. A block that was hot once stays for ever."""

    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        for key in reversed(keys):
            self._used[key] = _ONE_USE | next(self._tick)

    def _touched(self, keys: Sequence[Key]) -> None:
        used = self._used
        for key, tick in zip(reversed(keys), self._tick):
            used[key] = ((used[key] >> _TICK_BITS) + 1) << _TICK_BITS | tick
