"""For policies with several queues: a queue that counts its blocks' bytes, and ghosts (remembered keys of evicted blocks)."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, KeysView, Mapping, Sequence

from tiered_kv.policy.base import Key
from tiered_kv.policy.leaves import Leaves


class Queue:
    """A queue of some of a policy's blocks, lowest rank first. `nbytes` counts the blocks that are not chosen as victims."""

    def __init__(self, is_free: Callable[[Key], bool]) -> None:
        self.rank: dict[Key, int] = {}
        self.leaves = Leaves(self.rank, is_free)
        self.nbytes = 0

    def enter(self, key: Key, rank: int, nbytes: int) -> None:
        """Adds `key` to this queue."""
        self.rank[key] = rank
        self.nbytes += nbytes

    def leave(self, key: Key, nbytes: int) -> None:
        """Removes `key` from this queue and subtracts `nbytes` from its size."""
        del self.rank[key]
        self.nbytes -= nbytes


def check_queues(queues: Sequence[Queue], nbytes: Mapping[Key, int], chosen: Container[Key]) -> None:
    """Asserts that each block is in exactly one queue, and that the queues count their bytes correctly."""
    assert Counter(key for queue in queues for key in queue.rank) == Counter(iter(nbytes))
    for queue in queues:
        assert queue.nbytes == sum(nbytes[key] for key in queue.rank if key not in chosen)


class Ghosts:
    """Keys of evicted blocks with their sizes, the earliest evicted first."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._bytes: OrderedDict[Key, int] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._bytes

    def add(self, key: Key, nbytes: int) -> None:
        """Remembers the evicted block `key`."""
        self._bytes[key] = nbytes
        self.nbytes += nbytes

    def shrink(self, bytes_max: int) -> None:
        """Forgets the earliest evicted blocks until at most `bytes_max` are remembered."""
        while self.nbytes > bytes_max and self.forget_oldest():
            pass

    def forget_oldest(self) -> bool:
        """Forgets the earliest evicted block. Returns False if there is none."""
        if not self._bytes:
            return False
        self.nbytes -= self._bytes.popitem(last=False)[1]
        return True

    def bytes_of(self, key: Key) -> int:
        """Returns the size in bytes of a remembered block."""
        return self._bytes[key]

    def remove(self, key: Key) -> bool:
        """Forgets `key`. Returns whether it was remembered."""
        nbytes = self._bytes.pop(key, None)
        self.nbytes -= nbytes or 0
        return nbytes is not None

    def keys(self) -> KeysView[Key]:
        """Returns the remembered keys."""
        return self._bytes.keys()

    def check(self) -> None:
        """Asserts that the bytes are counted correctly."""
        assert self.nbytes == sum(self._bytes.values())
