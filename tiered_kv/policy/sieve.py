"""SIEVE: a queue in order of arrival. A pointer, the hand, moves through it and evicts the first block not used since its last pass.

Zhang et al.: SIEVE is Simpler than LRU (NSDI 2024).
"""

from collections.abc import Sequence
from itertools import count

from tiered_kv.policy.base import Key, RankedPolicy
from tiered_kv.policy.leaves import Leaves


class SIEVEPolicy(RankedPolicy):
    """The policy SIEVE. The hand visits only leaves, from old to new, and after the newest the oldest again. O(1) a use."""

    def __init__(self) -> None:
        super().__init__()
        self._tick = count()
        self._arrived: dict[Key, int] = {}
        self._visited: set[Key] = set()
        self._hand = -1  # arrival number of the block that the hand passed last
        self._ahead, self._behind = Leaves(self._arrived, self._is_free), Leaves(self._arrived, self._is_free)

    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        self._arrived.update(zip(reversed(keys), self._tick))

    def _touched(self, keys: Sequence[Key]) -> None:
        self._visited.update(keys)

    def _removed(self, key: Key, nbytes: int, evicted: bool) -> None:
        del self._arrived[key]
        self._visited.discard(key)
        self._ahead.forget(key)
        self._behind.forget(key)

    def _offer(self, key: Key) -> None:
        (self._ahead if self._arrived[key] > self._hand else self._behind).push(key)

    def _next(self) -> Key | None:
        while True:
            key = self._ahead.pop()
            if key is None:
                if not self._behind:
                    return None
                self._start_again()
                continue
            self._hand = self._arrived[key]
            if key not in self._visited:
                if not self._ahead:
                    self._start_again()
                return key
            self._visited.discard(key)
            self._behind.push(key)

    def _start_again(self) -> None:
        self._hand = -1
        self._ahead, self._behind = self._behind, self._ahead

    def _offered(self) -> set[Key]:
        return self._ahead.queued.keys() | self._behind.queued.keys()
