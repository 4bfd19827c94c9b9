"""The interface of eviction policies. A policy ranks the blocks resident in one tier, in the order of their chains.

A block can be hit only if all its ancestors hit. So a block is evicted before its ancestors: `victims` includes a block
only if it includes every resident child of that block too.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Container, Hashable, Sequence

Key = Hashable
"""A block's key: 32 bytes in the store, any hashable object in the simulator."""


class EvictionPolicy(ABC):
    """Ranks the blocks resident in one tier. The caller reports changes by `add`, `use` and `remove`. `victims` only names blocks.

    The same code runs in the store and in the simulator. The same calls give the same answers, whatever the keys are.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    def leading(self, keys: Sequence[Key]) -> int:
        """Returns the number of leading keys of a chain whose blocks are resident."""
        for at, key in enumerate(keys):
            if key not in self:
                return at
        return len(keys)

    @abstractmethod
    def add(self, keys: Sequence[Key], parent: Key | None, nbytes: int) -> None:
        """Records consecutive blocks of a chain, ancestors first, as resident with `nbytes` each. None may be resident already.

        `parent` is the parent of the first block in `keys`.
        """

    @abstractmethod
    def use(self, keys: Sequence[Key]) -> None:
        """Records a use of consecutive resident blocks of a chain, ancestors first. The deepest block counts as used first."""

    @abstractmethod
    def remove(self, key: Key) -> None:
        """Records that `key` is no longer resident."""

    @abstractmethod
    def victims(self, nbytes: int, protected: Container[Key], now_s: float, incoming: Sequence[Key] = ()) -> list[Key]:
        """Chooses blocks to evict that have at least `nbytes` together. Returns them in order, or fewer if there are not enough.

        Skips blocks in `protected`. Leaves come first; an ancestor follows once all its resident children are chosen.
        `incoming`: the blocks that need the room, ancestors first. Nothing is evicted yet: the caller calls `remove` for each
        evicted block.
        """

    def ranked(self, now_s: float) -> list[Key]:
        """Returns all resident blocks, the most worth keeping first, and every block before its descendants.

        It is the reverse of the order in which `victims` would evict them all. In some policies this call changes the rank of
        blocks, as `victims` does. So call it only on a node that is about to close.
        """
        return self.victims(1 << 62, (), now_s)[::-1]

    def standing(self, key: Key) -> float:
        """Returns the value of `key`, which `victims` has just chosen, as a share of the lowest value that stayed.

        NaN if the policy computes no values, or if `victims` did not choose the block. Call it before `remove`.
        """
        return math.nan

    @abstractmethod
    def resize(self, key: Key, nbytes: int) -> None:
        """Records that the resident `key` has a new size of `nbytes`. Its rank does not change, except where it depends on size."""

    def weigh(self, key: Key, factor: float) -> None:  # noqa: B027 - most policies know no costs
        """Records the cost of getting the resident `key` back, as a fraction (0 to 1) of the cost of computing it again.

        The fraction is small if a lower tier has a copy of the block.
        """

    @abstractmethod
    def check(self) -> None:
        """Asserts that redundant state is consistent. Slow; for tests."""


class RankedPolicy(EvictionPolicy):
    """Base of policies that evict leaf after leaf. A subclass decides which leaf is next.

    The subclass has queues of leaves, so that blocks which cannot be evicted yet cost no time. A block chosen by `victims` is
    not in the queues until `victims` is called again.
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
        previous = parent
        for key in keys:
            assert key not in self._bytes
            self._parent[key], self._bytes[key] = previous, nbytes
            if previous is not None:
                self._children[previous] = self._children.get(previous, 0) + 1
            previous = key
        self._added(keys, nbytes)
        if self._is_free(keys[-1]):
            self._offer(keys[-1])

    def use(self, keys: Sequence[Key]) -> None:
        self._touched(keys)

    def remove(self, key: Key) -> None:
        parent = self._parent.pop(key)
        evicted = key in self._chosen
        self._chosen.pop(key, None)
        self._removed(key, self._bytes.pop(key), evicted)
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
        self._unchoose()
        self._prepare_for(incoming)
        skipped, freed = [], 0
        while freed < nbytes and (key := self._next()) is not None:
            if key in protected:
                skipped.append(key)
                continue
            freed += self._bytes[key]
            self._choose(key)
        for key in skipped:
            self._offer(key)
        self._chosen_children.clear()
        return list(self._chosen)

    def _choose(self, key: Key) -> None:
        self._chosen[key] = None
        self._on_chosen(key)
        parent = self._parent[key]
        if parent in self._bytes:
            chosen = self._chosen_children[parent] = self._chosen_children.get(parent, 0) + 1
            if chosen == self._children[parent]:
                self._offer(parent)

    def _unchoose(self) -> None:
        for key in self._chosen:
            self._on_unchosen(key)
            if key not in self._children:
                self._offer(key)
        self._chosen.clear()

    def _is_free(self, key: Key) -> bool:
        """Whether the resident block `key` can become a victim now: all its resident children are chosen as victims, and it is not."""
        return self._children.get(key, 0) == self._chosen_children.get(key, 0) and key not in self._chosen

    def check(self) -> None:
        expected = Counter(parent for parent in self._parent.values() if parent is not None)
        assert self._children == expected
        assert self._parent.keys() == self._bytes.keys()
        assert self._chosen.keys() <= self._bytes.keys()
        assert not self._chosen_children
        leaves = self._bytes.keys() - self._children.keys() - self._chosen.keys()
        assert leaves <= self._offered(), "every leaf must be queued"

    @abstractmethod
    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        """Ranks new blocks: consecutive blocks of one chain, ancestors first."""

    @abstractmethod
    def _touched(self, keys: Sequence[Key]) -> None:
        """Ranks blocks again after a use: consecutive blocks of one chain, ancestors first."""

    @abstractmethod
    def _removed(self, key: Key, nbytes: int, evicted: bool) -> None:
        """Drops a block that is no longer resident. `evicted`: `victims` chose it."""

    @abstractmethod
    def _offer(self, key: Key) -> None:
        """Queues a resident block that can be evicted: a leaf, or a block whose children are all chosen. It may be queued already."""

    @abstractmethod
    def _next(self) -> Key | None:
        """Removes the next block for which `_is_free` holds from the queues and returns it. Returns None if the queues are empty."""

    @abstractmethod
    def _offered(self) -> set[Key]:
        """Returns the blocks in the queues. The result may include blocks that are no longer queued."""

    def _prepare_for(self, incoming: Sequence[Key]) -> None:
        """Prepares to choose victims that make room for the blocks `incoming`, ancestors first."""

    def _resized(self, key: Key, before: int) -> None:
        """Updates the queues after a resident block's size changed from `before` bytes. The block may be a chosen victim."""

    def _on_chosen(self, key: Key) -> None:
        """Updates the queues after the block `key` was chosen as a victim. The block stays resident until `remove`."""

    def _on_unchosen(self, key: Key) -> None:
        """Undoes the choice of `key` as a victim. The block is still resident."""
