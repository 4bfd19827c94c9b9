"""Least recently used.

A use of a chain counts as a use of the deepest block first. So this is the leaf-first LRU of a radix tree (SGLang's RadixCache;
Zheng et al., SGLang: Efficient Execution of Structured Language Model Programs, 2024).
"""

from collections.abc import Sequence
from itertools import count

from tiered_kv.policy.base import Key
from tiered_kv.policy.leaves import OneQueuePolicy


class LRUPolicy(OneQueuePolicy):
    """Evicts the leaf whose last use is longest ago. O(1) a use, O(log n) a victim."""

    def __init__(self) -> None:
        self._tick = count()
        self._used: dict[Key, int] = {}
        super().__init__(self._used)

    def _touched(self, keys: Sequence[Key]) -> None:
        self._used.update(zip(reversed(keys), self._tick))

    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        self._touched(keys)

    def _removed(self, key: Key, nbytes: int, evicted: bool) -> None:
        del self._used[key]
