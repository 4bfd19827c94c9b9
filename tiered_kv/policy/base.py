"""What every eviction policy has in common: it ranks blocks, and it respects the chain.

A block can be hit only if all blocks before it hit. So a block goes before its ancestors: `victims` offers a block
only when every resident child of it is a victim too. A concrete policy only says in which order it would like to
give blocks up.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Iterator

from tiered_kv.keys import BlockKey


class EvictionPolicy(ABC):
    """Ranks the blocks resident in one tier. `add`, `touch` and `remove` report facts, `victims` only answers."""

    def __init__(self) -> None:
        self._parent: dict[BlockKey, BlockKey | None] = {}
        self._bytes: dict[BlockKey, int] = {}
        self._children: Counter[BlockKey] = Counter()

    def __len__(self) -> int:
        return len(self._bytes)

    def __contains__(self, key: BlockKey) -> bool:
        return key in self._bytes

    def add(self, key: BlockKey, parent: BlockKey | None, nbytes: int) -> None:
        """`key` is resident from now on, used just now. Of one chain, add the deepest block first."""
        assert key not in self._bytes
        self._parent[key], self._bytes[key] = parent, nbytes
        if parent is not None:
            self._children[parent] += 1
        self._added(key)

    def touch(self, key: BlockKey) -> None:
        """`key` was used. Of one chain, touch the deepest block first, so that it is given up first."""
        self._touched(key)

    def remove(self, key: BlockKey) -> None:
        """`key` is no longer resident."""
        parent = self._parent.pop(key)
        del self._bytes[key]
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
        self._removed(key)

    def victims(self, nbytes: int, protected: Container[BlockKey]) -> list[BlockKey]:
        """Blocks to give up, in this order, for at least `nbytes`; fewer where there is not enough. Changes nothing.

        Leaves first; an ancestor follows once all its resident children are chosen.
        """
        chosen: dict[BlockKey, None] = {}
        passed_over: set[BlockKey] = set()
        chosen_children: Counter[BlockKey] = Counter()
        freed = 0
        for candidate in self._ranked():
            key: BlockKey | None = candidate
            while key is not None and freed < nbytes:
                if key in protected:
                    break
                if self._children[key] > chosen_children[key]:
                    passed_over.add(key)
                    break
                chosen[key] = None
                freed += self._bytes[key]
                parent = self._parent[key]
                if parent is not None:
                    chosen_children[parent] += 1
                key = parent if parent in passed_over else None
            if freed >= nbytes:
                break
        return list(chosen)

    def check(self) -> None:
        """Assert that what is kept of the chain agrees with the resident blocks."""
        expected = Counter(parent for parent in self._parent.values() if parent is not None)
        assert self._children == expected
        assert self._parent.keys() == self._bytes.keys()
        assert sorted(self._ranked()) == sorted(self._bytes)

    @abstractmethod
    def _added(self, key: BlockKey) -> None:
        """Rank a new block."""

    @abstractmethod
    def _touched(self, key: BlockKey) -> None:
        """Rank a block anew after a use."""

    @abstractmethod
    def _removed(self, key: BlockKey) -> None:
        """Forget a block."""

    @abstractmethod
    def _ranked(self) -> Iterator[BlockKey]:
        """All resident blocks, the first to give up first."""
