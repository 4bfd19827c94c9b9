"""Queues of blocks that may be given up, lowest rank first, and the policies that have one of them."""

import heapq
from collections.abc import Callable
from typing import Any

from tiered_kv.policy.base import Key, RankedPolicy


class Leaves:
    """A priority queue of keys whose ranks may rise while they wait, and that may cease to be free.

    `rank` belongs to the policy: a block's rank now, without an entry for blocks that are not (or no longer) this
    queue's. Ranks are unique. A rank that rises costs nothing here: the entry is put right when it comes up, O(log n).
    """

    def __init__(self, rank: dict[Key, Any], is_free: Callable[[Key], bool]) -> None:
        self.queued: dict[Key, Any] = {}
        """The rank with which each key stands in the heap; other entries of a key are dead."""
        self._rank, self._is_free = rank, is_free
        self._heap: list[tuple[Any, Key]] = []

    def push(self, key: Key) -> None:
        """Queue `key`, unless it is queued; again if its rank has fallen since."""
        rank = self._rank[key]
        if key not in self.queued or rank < self.queued[key]:
            self.queued[key] = rank
            heapq.heappush(self._heap, (rank, key))

    def pop(self) -> Key | None:
        """Take out the free key of the lowest rank; None: there is none."""
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
        """Take `key` out, if it is in."""
        self.queued.pop(key, None)

    def __bool__(self) -> bool:
        return bool(self.queued)


class OneQueuePolicy(RankedPolicy):
    """A policy that gives up the leaf of the lowest rank. A concrete one keeps `rank`, with an entry for each block."""

    def __init__(self, rank: dict[Key, Any]) -> None:
        super().__init__()
        self._leaves = Leaves(rank, self._is_free)

    def _offer(self, key: Key) -> None:
        self._leaves.push(key)

    def _next(self) -> Key | None:
        return self._leaves.pop()

    def _offered(self) -> set[Key]:
        return set(self._leaves.queued)
