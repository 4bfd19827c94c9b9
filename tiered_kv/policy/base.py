"""What every eviction policy is: it ranks the blocks resident in one tier, and it respects the chain.

A block can be hit only if all blocks before it hit. So a block goes before its ancestors: `victims` offers a block
only when every resident child of it is a victim too.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Hashable, Sequence

Key = Hashable
"""A block's key: 32 bytes in the store, anything hashable in the simulator."""


class EvictionPolicy(ABC):
    """Ranks the blocks resident in one tier. `add`, `use` and `remove` report facts, `victims` only answers.

    The same code decides in the store and in the simulator: fed the same calls, it gives the same answers, whatever
    the keys look like.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    def leading(self, keys: Sequence[Key]) -> int:
        """How many of the leading keys of a chain are resident."""
        for at, key in enumerate(keys):
            if key not in self:
                return at
        return len(keys)

    @abstractmethod
    def add(self, keys: Sequence[Key], parent: Key | None, nbytes: int) -> None:
        """A run of one chain, root first, behind `parent`, is resident from now on, `nbytes` each. None of it was."""

    @abstractmethod
    def use(self, keys: Sequence[Key]) -> None:
        """A run of one chain, root first, was used; all of it is resident. The deepest block counts as used first."""

    @abstractmethod
    def remove(self, key: Key) -> None:
        """`key` is no longer resident."""

    @abstractmethod
    def victims(self, nbytes: int, protected: Container[Key], now_s: float, incoming: Sequence[Key] = ()) -> list[Key]:
        """Blocks to give up, in this order, for at least `nbytes`; fewer where there is not enough.

        Leaves first; an ancestor follows once all its resident children are chosen. `incoming`: the blocks that the
        room is for, root first. No block becomes resident or ceases to be; `remove` follows for those that are given up.
        """

    @abstractmethod
    def resize(self, key: Key, nbytes: int) -> None:
        """The resident `key` takes `nbytes` from now on; its rank stays as far as it does not depend on bytes."""

    def weigh(self, key: Key, factor: float) -> None:  # noqa: B027 - most policies know no costs
        """Getting the resident `key` back would cost `factor` (0 to 1) of computing it again: a copy of it is near."""

    @abstractmethod
    def check(self) -> None:
        """Assert that what is kept in two places agrees. Slow; for tests."""


class RankedPolicy(EvictionPolicy):
    """A policy that gives up leaf after leaf; a concrete one says which leaf is next.

    Leaves wait in the policy's queues, so that blocks which may not go yet cost nothing. What `victims` chose is out
    of them until it is removed, or until `victims` is asked again.
    """

    def __init__(self) -> None:
        self._parent: dict[Key, Key | None] = {}
        self._bytes: dict[Key, int] = {}
        self._children: dict[Key, int] = {}
        self._chosen: dict[Key, None] = {}
        self._chosen_children: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._bytes)

    def __contains__(self, key: object) -> bool:
        return key in self._bytes

    def leading(self, keys: Sequence[Key]) -> int:
        resident = self._bytes
        return next((at for at, key in enumerate(keys) if key not in resident), len(keys))

    def add(self, keys: Sequence[Key], parent: Key | None, nbytes: int) -> None:
        behind = parent
        for key in keys:
            assert key not in self._bytes
            self._parent[key], self._bytes[key] = behind, nbytes
            if behind is not None:
                self._children[behind] = self._children.get(behind, 0) + 1
            behind = key
        self._added(keys, nbytes)
        if self._is_free(keys[-1]):
            self._offer(keys[-1])

    def use(self, keys: Sequence[Key]) -> None:
        self._touched(keys)

    def remove(self, key: Key) -> None:
        parent = self._parent.pop(key)
        given_up = key in self._chosen
        self._chosen.pop(key, None)
        self._removed(key, self._bytes.pop(key), given_up)
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
                if parent in self._bytes and parent not in self._chosen:
                    self._offer(parent)

    def resize(self, key: Key, nbytes: int) -> None:
        before, self._bytes[key] = self._bytes[key], nbytes
        self._resized(key, before)

    def victims(self, nbytes: int, protected: Container[Key], now_s: float, incoming: Sequence[Key] = ()) -> list[Key]:
        self._take_back()
        self._expect(incoming)
        passed_over, freed = [], 0
        while freed < nbytes and (key := self._next()) is not None:
            if key in protected:
                passed_over.append(key)
                continue
            freed += self._bytes[key]
            self._choose(key)
        for key in passed_over:
            self._offer(key)
        self._chosen_children.clear()
        return list(self._chosen)

    def _choose(self, key: Key) -> None:
        self._chosen[key] = None
        self._leaving(key)
        parent = self._parent[key]
        if parent in self._bytes:
            chosen = self._chosen_children[parent] = self._chosen_children.get(parent, 0) + 1
            if chosen == self._children[parent]:
                self._offer(parent)

    def _take_back(self) -> None:
        for key in self._chosen:
            self._staying(key)
            if key not in self._children:
                self._offer(key)
        self._chosen.clear()

    def _is_free(self, key: Key) -> bool:
        """Whether the resident `key` could be chosen: no child of it stays."""
        return self._children.get(key, 0) == self._chosen_children.get(key, 0) and key not in self._chosen

    def check(self) -> None:
        expected = Counter(parent for parent in self._parent.values() if parent is not None)
        assert self._children == expected
        assert self._parent.keys() == self._bytes.keys()
        assert self._chosen.keys() <= self._bytes.keys()
        assert not self._chosen_children
        leaves = self._bytes.keys() - self._children.keys() - self._chosen.keys()
        assert leaves <= self._offered(), "a leaf that can never be chosen"

    @abstractmethod
    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        """Rank new blocks: a run of one chain, root first."""

    @abstractmethod
    def _touched(self, keys: Sequence[Key]) -> None:
        """Rank blocks anew after a use: a run of one chain, root first."""

    @abstractmethod
    def _removed(self, key: Key, nbytes: int, given_up: bool) -> None:
        """Forget a block; `given_up`: it is one that `victims` chose."""

    @abstractmethod
    def _offer(self, key: Key) -> None:
        """Queue a resident block that may go: a leaf, or one whose children are all chosen. It may be queued already."""

    @abstractmethod
    def _next(self) -> Key | None:
        """Take the next block to give up, which `_is_free`, out of the queues; None: they are empty."""

    @abstractmethod
    def _offered(self) -> set[Key]:
        """The blocks in the queues, and perhaps some that were there once."""

    def _expect(self, incoming: Sequence[Key]) -> None:
        """Room is being made for these blocks, root first."""

    def _resized(self, key: Key, before: int) -> None:
        """A resident block takes other bytes than the `before`; it may be chosen."""

    def _leaving(self, key: Key) -> None:
        """`key` was chosen. It stays resident until it is removed."""

    def _staying(self, key: Key) -> None:
        """`key` was chosen and is resident still."""
