"""S3-FIFO: a small queue that most blocks leave by eviction, a main queue for blocks used again, and ghosts of evicted blocks.

Yang et al.: FIFO Queues are All You Need for Cache Eviction (SOSP 2023), in the form of its authors' later simulator:
as long as nothing has been evicted yet, new blocks enter the main queue while the small one is full.
"""

from collections.abc import Sequence
from itertools import count

from tiered_kv.policy.base import Key, RankedPolicy
from tiered_kv.policy.queues import Ghosts, Queue, check_queues

SMALL_SHARE, GHOST_SHARE = 0.1, 0.9
USES_TO_MAIN = 2  # uses after its arrival that move a block from the small queue to the main one
USES_MAX = 3


class S3FIFOPolicy(RankedPolicy):
    """The policy S3-FIFO. Evicts leaves of the small queue, unless the main queue is above its share. O(1) a use.

    A block with children cannot be evicted at its turn. In the small queue it would take the room of blocks that can be evicted.
    So it moves to the main queue together with its first descendant that moves there, or when it was used often enough.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__()
        self._small_max_bytes = int(capacity_bytes * SMALL_SHARE)
        self._main_max_bytes = capacity_bytes - self._small_max_bytes
        self._ghosts = Ghosts()
        self._ghosts_max_bytes = int(capacity_bytes * GHOST_SHARE)
        self._tick = count()
        self._uses: dict[Key, int] = {}
        self._small = Queue(self._is_free)
        self._main = Queue(self._is_free)
        self._returning: set[Key] = set()
        self._was_full = False

    def _prepare_for(self, incoming: Sequence[Key]) -> None:
        self._was_full = True
        self._returning.intersection_update(incoming)
        self._returning.update(key for key in incoming if self._ghosts.remove(key))

    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        for key in reversed(keys):
            self._uses[key] = 0
            returns = self._ghosts.remove(key) or key in self._returning
            self._returning.discard(key)
            overflows = not self._was_full and self._small.nbytes >= self._small_max_bytes
            if returns or overflows:
                self._enter_main(key, nbytes)
            else:
                self._small.enter(key, next(self._tick), nbytes)

    def _touched(self, keys: Sequence[Key]) -> None:
        for key in reversed(keys):
            uses = self._uses[key] = self._uses[key] + 1
            if uses >= USES_TO_MAIN and key in self._children and key in self._small.rank and key not in self._chosen:
                self._promote(key)  # a block without children waits for its turn

    def _removed(self, key: Key, nbytes: int, evicted: bool) -> None:
        del self._uses[key]
        queue = self._queue_of(key)
        if evicted and queue is self._small:
            self._ghosts.add(key, nbytes)
            self._ghosts.shrink(self._ghosts_max_bytes)
        queue.leave(key, 0 if evicted else nbytes)

    def _queue_of(self, key: Key) -> Queue:
        return self._small if key in self._small.rank else self._main

    def _offer(self, key: Key) -> None:
        self._queue_of(key).leaves.push(key)

    def _next(self) -> Key | None:
        main_first = self._main.nbytes > self._main_max_bytes or not self._small.nbytes
        first, second = (self._next_of_main, self._next_of_small) if main_first else (self._next_of_small, self._next_of_main)
        key = first()
        return second() if key is None else key

    def _next_of_small(self) -> Key | None:
        while (key := self._small.leaves.pop()) is not None:
            if self._uses[key] < USES_TO_MAIN:
                return key
            self._promote(key)
            self._main.leaves.push(key)
        return None

    def _promote(self, key: Key) -> None:
        self._small.leave(key, self._bytes[key])
        self._uses[key] = 0
        self._enter_main(key, self._bytes[key])

    def _enter_main(self, key: Key, nbytes: int) -> None:
        """Adds `key` to the main queue and moves its ancestors there.

        The ancestors cannot be evicted before `key`, so they would only take up room in the small queue.
        """
        self._main.enter(key, next(self._tick), nbytes)
        parent = self._parent[key]
        while parent in self._small.rank and parent not in self._chosen:
            self._small.leave(parent, self._bytes[parent])
            self._main.enter(parent, next(self._tick), self._bytes[parent])
            parent = self._parent[parent]

    def _next_of_main(self) -> Key | None:
        while (key := self._main.leaves.pop()) is not None:
            uses = self._uses[key]
            if not uses:
                return key
            self._uses[key] = min(uses, USES_MAX) - 1
            self._main.rank[key] = next(self._tick)
            self._main.leaves.push(key)
        return None

    def _on_chosen(self, key: Key) -> None:
        self._queue_of(key).nbytes -= self._bytes[key]

    def _on_unchosen(self, key: Key) -> None:
        self._queue_of(key).nbytes += self._bytes[key]

    def _resized(self, key: Key, before: int) -> None:
        if key not in self._chosen:  # bytes of a chosen block are not counted; `_on_unchosen` may count them again
            self._queue_of(key).nbytes += self._bytes[key] - before

    def _offered(self) -> set[Key]:
        return self._small.leaves.queued.keys() | self._main.leaves.queued.keys()

    def check(self) -> None:
        super().check()
        assert self._uses.keys() == self._bytes.keys()
        assert not self._ghosts.keys() & self._bytes.keys()
        self._ghosts.check()
        assert self._ghosts.nbytes <= self._ghosts_max_bytes
        check_queues([self._small, self._main], self._bytes, self._chosen)
