"""What policies of several queues are made of: a queue that knows its bytes, and ghosts of blocks given up."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Container, KeysView, Mapping, Sequence

from tiered_kv.policy.base import Key
from tiered_kv.policy.leaves import Leaves


class Queue:
    """Some of a policy's blocks, lowest rank first; `nbytes` without those that are chosen to go."""

    def __init__(self, is_free: Callable[[Key], bool]) -> None:
        self.rank: dict[Key, int] = {}
        self.leaves = Leaves(self.rank, is_free)
        self.nbytes = 0

    def enter(self, key: Key, rank: int, nbytes: int) -> None:
        """`key` belongs to this queue from now on."""
        self.rank[key] = rank
        self.nbytes += nbytes

    def leave(self, key: Key, nbytes: int) -> None:
        """`key` belongs to it no longer; `nbytes` are to be taken off."""
        del self.rank[key]
        self.nbytes -= nbytes


def check_queues(queues: Sequence[Queue], nbytes: Mapping[Key, int], chosen: Container[Key]) -> None:
    """Assert that each block is in one queue, and their bytes are right."""
    assert Counter(key for queue in queues for key in queue.rank) == Counter(iter(nbytes))
    for queue in queues:
        assert queue.nbytes == sum(nbytes[key] for key in queue.rank if key not in chosen)


class Ghosts:
    """Keys of blocks given up, the longest gone first, with the bytes they had."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._bytes: OrderedDict[Key, int] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._bytes

    def add(self, key: Key, nbytes: int) -> None:
        """Remember `key`."""
        self._bytes[key] = nbytes
        self.nbytes += nbytes

    def shrink(self, bytes_max: int) -> None:
        """Forget the longest gone until no more than `bytes_max` are kept."""
        while self.nbytes > bytes_max and self.forget_oldest():
            pass

    def forget_oldest(self) -> bool:
        """Forget the longest gone; whether there was one."""
        if not self._bytes:
            return False
        self.nbytes -= self._bytes.popitem(last=False)[1]
        return True

    def bytes_of(self, key: Key) -> int:
        """The bytes of a block that is remembered."""
        return self._bytes[key]

    def remove(self, key: Key) -> bool:
        """Forget `key`; whether it was there."""
        nbytes = self._bytes.pop(key, None)
        self.nbytes -= nbytes or 0
        return nbytes is not None

    def keys(self) -> KeysView[Key]:
        """Who is remembered."""
        return self._bytes.keys()

    def check(self) -> None:
        """Assert that the bytes are right."""
        assert self.nbytes == sum(self._bytes.values())
