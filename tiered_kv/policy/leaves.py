"""A priority queue of blocks that can be evicted, lowest rank first, and the base of policies with one such queue."""

import heapq
from collections.abc import Callable
from typing import Any

from tiered_kv.policy.base import Key, RankedPolicy


class Leaves:
    """A priority queue of keys. While a key is queued, its rank may rise, and its block may become one that cannot be evicted now.

    `rank` belongs to the policy: it has the current rank of each block in this queue, and no entry for other blocks. Ranks are
    unique. A rank that rises costs nothing at once: its entry is corrected when it reaches the top, in O(log n).
    """

    def __init__(self, rank: dict[Key, Any], is_free: Callable[[Key], bool]) -> None:
        self.queued: dict[Key, Any] = {}
        """The rank with which each key is in the heap. Other entries of a key in the heap are stale."""
        self._rank, self._is_free = rank, is_free
        self._heap: list[tuple[Any, Key]] = []

    def push(self, key: Key) -> None:
        """Queues `key`, unless it is already queued with the same or a lower rank."""
        rank = self._rank[key]
        if key not in self.queued or rank < self.queued[key]:
            self.queued[key] = rank
            heapq.heappush(self._heap, (rank, key))

    def pop(self) -> Key | None:
        """Removes and returns the key with the lowest rank among those that `is_free` accepts. Returns None if there is none."""
        heap, rank, queued = self._heap, self._rank, self.queued
        while heap:
            was, key = heap[0]
            if queued.get(key) != was:
                heapq.heappop(heap)
                continue
            now = rank.get(key)
            if now is not None and now != was:
                queued[key] = now
                heapq.heapreplace(heap, (now, key))
                continue
            heapq.heappop(heap)
            del queued[key]
            if now is not None and self._is_free(key):
                return key
        return None

    def forget(self, key: Key) -> None:
        """Removes `key` if it is queued."""
        self.queued.pop(key, None)

    def __bool__(self) -> bool:
        return bool(self.queued)


class OneQueuePolicy(RankedPolicy):
    """Base of policies that evict the leaf with the lowest rank. The subclass owns `rank`, with an entry for each block."""

    def __init__(self, rank: dict[Key, Any]) -> None:
        super().__init__()
        self._leaves = Leaves(rank, self._is_free)

    def _offer(self, key: Key) -> None:
        self._leaves.push(key)

    def _next(self) -> Key | None:
        return self._leaves.pop()

    def _offered(self) -> set[Key]:
        return set(self._leaves.queued)
