"""ARC: one LRU list of blocks used once and one of blocks used again. Their shares adapt to which evicted blocks return.

Megiddo, Modha: ARC: A Self-Tuning, Low Overhead Replacement Cache (FAST 2003). A ghost is the remembered key of an evicted
block. The letters are those of the paper: T1 and T2 are resident, B1 and B2 their ghosts, p is the target size of T1 in bytes.
"""

from collections.abc import Iterator, Sequence
from itertools import count

from tiered_kv.policy.base import Key, RankedPolicy
from tiered_kv.policy.queues import Ghosts, Queue, check_queues


class ARCPolicy(RankedPolicy):
    """The policy ARC. A block that is stored again while its ghost is in B1 raises the target of T1; in B2, it lowers the target.

    O(1) a use.
    """

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__()
        self._capacity_bytes = capacity_bytes
        self._p = 0.0
        self._tick = count()
        self._t1, self._t2 = Queue(self._is_free), Queue(self._is_free)
        self._b1, self._b2 = Ghosts(), Ghosts()
        self._returning: dict[Key, Ghosts] = {}
        self._ghostless: Key | None = None  # the block that `_next` has just returned, if it must not become a ghost
        self._without_ghost: set[Key] = set()  # chosen blocks that must not become ghosts
        self._incoming: Iterator[Key] = iter(())
        self._chosen_t1_bytes = 0  # bytes of T1 blocks chosen by this call, which will move to B1

    def _prepare_for(self, incoming: Sequence[Key]) -> None:
        known = self._returning
        self._returning = {key: known[key] for key in incoming if key in known}
        for key in incoming:
            self._meet_ghost(key)
        self._incoming = iter(incoming)
        self._chosen_t1_bytes = 0

    def _meet_ghost(self, key: Key) -> None:
        for mine, other, sign in ((self._b1, self._b2, 1), (self._b2, self._b1, -1)):
            if key in mine:
                size, ratio = mine.bytes_of(key), other.nbytes / mine.nbytes
                self._p = min(max(self._p + sign * max(ratio, 1.0) * size, 0.0), self._capacity_bytes)
                mine.remove(key)
                self._returning[key] = mine

    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        for key in reversed(keys):
            self._meet_ghost(key)
            queue = self._t1 if self._returning.pop(key, None) is None else self._t2
            queue.enter(key, next(self._tick), nbytes)

    def _touched(self, keys: Sequence[Key]) -> None:
        once = self._t1.rank
        for key in reversed(keys):
            if key in once:
                self._move_to_t2(key)
            else:
                self._t2.rank[key] = next(self._tick)

    def _move_to_t2(self, key: Key) -> None:
        nbytes = 0 if key in self._chosen else self._bytes[key]
        self._t1.leave(key, nbytes)
        self._t2.enter(key, next(self._tick), nbytes)
        self._without_ghost.discard(key)
        if self._is_free(key):
            self._t2.leaves.push(key)

    def _removed(self, key: Key, nbytes: int, evicted: bool) -> None:
        queue = self._queue_of(key)
        queue.leave(key, 0 if evicted else nbytes)
        if evicted and key not in self._without_ghost:
            self._remember(key, self._b1 if queue is self._t1 else self._b2, nbytes)
        self._without_ghost.discard(key)

    def _remember(self, key: Key, ghosts: Ghosts, nbytes: int) -> None:
        ghosts.add(key, nbytes)
        self._b1.shrink(self._capacity_bytes - self._t1.nbytes)
        self._b2.shrink(2 * self._capacity_bytes - self._t1.nbytes - self._t2.nbytes - self._b1.nbytes)

    def _queue_of(self, key: Key) -> Queue:
        return self._t1 if key in self._t1.rank else self._t2

    def _offer(self, key: Key) -> None:
        self._queue_of(key).leaves.push(key)

    def _next(self) -> Key | None:
        """Returns the next victim: applies the paper's case IV if the incoming block is not a ghost, then the paper's REPLACE."""
        self._ghostless = None
        ghosts = self._returning.get(next(self._incoming, None))
        if ghosts is None and self._forget_for_newcomer():
            self._ghostless = self._t1.leaves.pop()
            if self._ghostless is not None:
                return self._ghostless
        t1_bytes = self._t1.nbytes
        from_t1 = not self._t2.nbytes or t1_bytes > self._p or (0 < t1_bytes == self._p and ghosts is self._b2)
        first, second = (self._t1, self._t2) if from_t1 else (self._t2, self._t1)
        key = first.leaves.pop()
        return second.leaves.pop() if key is None else key

    def _forget_for_newcomer(self) -> bool:
        """Forgets a ghost if the lists are full.

        Returns True if T1 alone fills the cache, so that B1 has no ghost to forget: the block evicted from T1 must then leave
        no ghost.
        """
        once_bytes = self._t1.nbytes + self._chosen_t1_bytes + self._b1.nbytes
        if once_bytes >= self._capacity_bytes:
            return not self._b1.forget_oldest()
        if once_bytes + self._t2.nbytes + self._b2.nbytes >= 2 * self._capacity_bytes:
            self._b2.forget_oldest()
        return False

    def _on_chosen(self, key: Key) -> None:
        self._queue_of(key).nbytes -= self._bytes[key]
        if key == self._ghostless:
            self._without_ghost.add(key)
        elif key in self._t1.rank:
            self._chosen_t1_bytes += self._bytes[key]

    def _on_unchosen(self, key: Key) -> None:
        self._queue_of(key).nbytes += self._bytes[key]
        self._without_ghost.discard(key)

    def _resized(self, key: Key, before: int) -> None:
        if key not in self._chosen:  # bytes of a chosen block are not counted; `_on_unchosen` may count them again
            self._queue_of(key).nbytes += self._bytes[key] - before

    def _offered(self) -> set[Key]:
        return self._t1.leaves.queued.keys() | self._t2.leaves.queued.keys()

    def check(self) -> None:
        super().check()
        check_queues([self._t1, self._t2], self._bytes, self._chosen)
        for ghosts in (self._b1, self._b2):
            ghosts.check()
            assert not ghosts.keys() & self._bytes.keys()
        assert self._b1.nbytes + self._b2.nbytes <= 2 * self._capacity_bytes
        assert 0 <= self._p <= self._capacity_bytes
        assert self._without_ghost <= self._chosen.keys()
