"""Least recently used.

Touched deepest block first, this is the leaf-first LRU of a radix tree (SGLang's RadixCache; Zheng et al., SGLang:
Efficient Execution of Structured Language Model Programs, 2024).
"""

from collections.abc import Sequence
from itertools import count

from tiered_kv.policy.base import Key, RankedPolicy
from tiered_kv.policy.leaves import Leaves


class LRUPolicy(RankedPolicy):
    """Gives up the leaf whose last use is longest ago. O(1) a use, O(log n) a victim."""

    def __init__(self) -> None:
        super().__init__()
        self._tick = count()
        self._used: dict[Key, int] = {}
        self._leaves = Leaves(self._used, self._is_free)

    def _touched(self, keys: Sequence[Key]) -> None:
        self._used.update(zip(reversed(keys), self._tick))

    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        self._touched(keys)

    def _removed(self, key: Key, nbytes: int, given_up: bool) -> None:
        del self._used[key]

    def _offer(self, key: Key) -> None:
        self._leaves.push(key)

    def _next(self) -> Key | None:
        return self._leaves.pop()

    def _offered(self) -> set[Key]:
        return set(self._leaves.queued)
