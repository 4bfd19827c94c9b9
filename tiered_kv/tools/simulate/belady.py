"""The offline optimum for chains: evicts the block whose next use is farthest away (Belady, 1966).

A new block is not stored if it would be evicted first (bypass). A block is used whenever one of its descendants is used, so its
next use is never later than theirs. Of blocks with the same next use the deepest is evicted first. So the evicted block never
has a cached child.
"""

import heapq

import numpy as np

from tiered_kv.tools.simulate.trace import Trace

_DEPTH_BITS, _ID_BITS = 32, 32


class BeladyCache:
    """The blocks cached under a cap, chosen with knowledge of the future. The caller must send the requests of `trace` in order.

    Blocks that are never used again are not kept. While the cache is full, new blocks whose next use is later than that of all
    cached blocks are not kept either.
    """

    def __init__(self, trace: Trace, capacity_blocks: int) -> None:
        self.capacity_blocks = capacity_blocks
        self.evictions = 0
        self._never = len(trace)
        self._next_request = _next_requests(trace)
        self._done_blocks = 0
        self._next: dict[int, int] = {}  # resident block → index of the request with its next use
        self._farthest: list[int] = []  # heap; an entry that disagrees with _next is stale

    def request(self, keys: list[int], now_s: float, answer_tokens: int) -> int:
        """Fetch a chain, and keep the blocks that the optimum keeps. Returns how many leading blocks hit."""
        resident = self._next
        hit = next((at for at, key in enumerate(keys) if key not in resident), len(keys))
        upcoming = self._next_request[self._done_blocks : self._done_blocks + len(keys)].tolist()
        self._done_blocks += len(keys)
        for depth, (key, request) in enumerate(zip(keys, upcoming, strict=True)):
            if request < self._never:
                resident[key] = request
                heapq.heappush(self._farthest, -(((request << _DEPTH_BITS) | depth) << _ID_BITS | key))
            elif resident.pop(key, None) is not None:
                self.evictions += 1
        self._shrink()
        return hit

    def _shrink(self) -> None:
        while len(self._next) > self.capacity_blocks:
            entry = -heapq.heappop(self._farthest)
            key = entry & ((1 << _ID_BITS) - 1)
            if self._next.get(key) == entry >> (_DEPTH_BITS + _ID_BITS):
                del self._next[key]
                self.evictions += 1
        if len(self._farthest) > 4 * len(self._next) + 10_000:
            self._farthest = [entry for entry in self._farthest if self._is_live(-entry)]
            heapq.heapify(self._farthest)

    def _is_live(self, entry: int) -> bool:
        return self._next.get(entry & ((1 << _ID_BITS) - 1)) == entry >> (_DEPTH_BITS + _ID_BITS)

    def check(self) -> None:
        """Assert that the cap holds and that every cached block can be found for eviction."""
        assert len(self._next) <= self.capacity_blocks
        live = {-entry & ((1 << _ID_BITS) - 1) for entry in self._farthest if self._is_live(-entry)}
        assert live == self._next.keys()


def _next_requests(trace: Trace) -> np.ndarray:
    """Returns, for each block of each request, the index of the next request with that block.

    For a block without a next request it is the number of requests.
    """
    requests = np.repeat(np.arange(len(trace), dtype=np.int32), np.diff(trace.offsets))
    order = np.argsort(trace.ids, kind="stable")
    same = trace.ids[order[:-1]] == trace.ids[order[1:]]
    upcoming = np.full(len(trace.ids), len(trace), np.int32)
    upcoming[order[:-1][same]] = requests[order[1:][same]]
    return upcoming
