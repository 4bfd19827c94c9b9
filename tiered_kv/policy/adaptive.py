"""Adaptive policy: evicts the blocks of the lowest value. It learns from this node's requests how soon blocks are used again.

A block's reuse index is its Gittins index over hazards of reuse by kind and age (`reuse` explains kinds, `blockhistory` keeps
the data). A block's value is its reuse index times the cost of getting it back, divided by its size. As in hyperbolic caching
(Blankstein, Sen & Freedman, ATC 2017), the policy evicts the leaf of the lowest value in a sample. The leaves of the next
lowest values are added to the next sample (Psounis & Prabhakar, IEEE/ACM ToN 2002).
"""

import heapq
import math
from collections.abc import Container, Sequence

import numpy as np

from tiered_kv.policy import reuse
from tiered_kv.policy.base import EvictionPolicy, Key
from tiered_kv.policy.blockhistory import BlockHistory

FRESH_LEAVES = 24
KEPT_LEAVES = 8
_PER_FIRST = 1 / reuse.FIRST_S
_BARREN_ROUNDS_MAX = 4

COST_TOKENS = 30_500
"""The position at which a token of an 8B Llama costs twice the FLOPs of the first token: attention then costs as much as the rest."""


class AdaptivePolicy(EvictionPolicy):
    """Ranks blocks by value. Without data its order is that of LRU. Shares `history` with the policies of the other tiers.

    `cost_per_block`: how much more computing a block costs than computing its parent, relative to the cost of the first block;
    0 means that all cost the same. `seed` fixes which leaves are sampled. Takes 0.2 to 0.4 ms a request. Memory: 12 bytes a
    block in addition to `history`, and a dictionary entry for each resident block.
    """

    def __init__(self, history: BlockHistory, *, cost_per_block: float = 0.0, seed: int = 0) -> None:
        self._history = history
        self._cost_per_block = cost_per_block
        self._random = np.random.default_rng(seed)
        self._keys: dict[int, Key] = {}
        self._factors: dict[int, float] = {}
        self._bytes = np.zeros(0, np.uint32)  # by slot: bytes of a resident block, else 0
        self._children = np.zeros(0, np.int32)
        self._leaf_at = np.zeros(0, np.int32)  # by slot: index in `_leaves`, or -1 if the block is not a leaf
        self._leaves: list[int] = []
        self._kept: list[int] = []
        self._chosen: dict[Key, int] = {}  # last victims and their slots; the caller removes them next
        self._scores: dict[int, float] = {}  # values of the last victims, by slot
        self._lowest_kept = 0.0  # the lowest value of a candidate that was not chosen; 0 if all were

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return self._slot(key) in self._keys

    def leading(self, keys: Sequence[Key]) -> int:
        if not keys or not len(self._bytes):
            return 0
        slots = self._history.slots(keys)
        self._fit()
        missing = np.flatnonzero((slots < 0) | (self._bytes[slots] == 0))
        return int(missing[0]) if len(missing) else len(keys)

    def add(self, keys: Sequence[Key], parent: Key | None, nbytes: int) -> None:
        slots = self._history.note(keys, parent)
        self._fit()
        self._history.hold(slots)
        numbers = slots.tolist()
        self._keys.update(zip(numbers, keys, strict=True))
        self._bytes[slots] = nbytes
        parents = self._history.parent[slots]
        self._children[parents[parents >= 0]] += 1  # the blocks of a run have different parents
        for slot in {*slots[self._children[slots] == 0].tolist(), int(parents[0])}:
            self._sort_leaf(slot)

    def use(self, keys: Sequence[Key]) -> None:
        """Does nothing, because the history already records the time of each use and the kind of the block."""

    def remove(self, key: Key) -> None:
        slot = self._chosen.pop(key, None)
        if slot is None:
            slot = self._slot(key)
        del self._keys[slot]
        self._bytes[slot] = 0
        if self._factors:
            self._factors.pop(slot, None)
        self._history.release(slot)
        if self._leaf_at.item(slot) >= 0:
            self._sort_leaf(slot)
        parent = self._history.parent.item(slot)
        if parent >= 0:
            self._children[parent] -= 1
            if not self._children.item(parent):
                self._sort_leaf(parent)

    def resize(self, key: Key, nbytes: int) -> None:
        self._bytes[self._slot(key)] = nbytes

    def weigh(self, key: Key, factor: float) -> None:
        if factor == 1.0:
            self._factors.pop(self._slot(key), None)
        else:
            self._factors[self._slot(key)] = factor

    def victims(self, nbytes: int, protected: Container[Key], now_s: float, incoming: Sequence[Key] = ()) -> list[Key]:
        search = _Search(self, protected, now_s)
        barren = 0
        while search.freed < nbytes and self._leaves:
            everything = barren >= _BARREN_ROUNDS_MAX or len(self._leaves) <= FRESH_LEAVES
            found = search.take_lowest(self._candidates(search, everything), nbytes)
            barren = 0 if found else barren + 1
            if everything and not found:
                break
        self._kept = [slot for *_, slot in search.pool]
        self._chosen = {key: slot for slot, key in search.chosen.items()}
        self._scores, self._lowest_kept = search.scores, search.pool[0][0] if search.pool else 0.0
        return list(self._chosen)

    def standing(self, key: Key) -> float:
        slot = self._chosen.get(key, -1)
        return self._scores[slot] / self._lowest_kept if slot >= 0 and self._lowest_kept > 0 else math.nan

    def ranked(self, now_s: float) -> list[Key]:
        """Does the same as `EvictionPolicy.ranked`, but compares all leaves at each step, not only a sample. About 4 µs a block."""
        slots = list(self._keys)
        values = dict(zip(slots, self.values(slots, now_s), strict=True)) if slots else {}
        last_s, parent_of, order = self._history.last_s, self._history.parent, []
        left = {slot: count for slot in slots if (count := self._children.item(slot))}
        leaves = [(values[slot], last_s.item(slot), slot) for slot in slots if slot not in left]
        heapq.heapify(leaves)
        while leaves:
            slot = heapq.heappop(leaves)[-1]
            order.append(self._keys[slot])
            parent = parent_of.item(slot)
            if parent in left:
                left[parent] -= 1
                if not left[parent]:
                    heapq.heappush(leaves, (values[parent], last_s.item(parent), parent))
        return order[::-1]

    def _candidates(self, search: "_Search", everything: bool) -> list[int]:
        kept, self._kept = [slot for slot in self._kept if self._leaf_at[slot] >= 0], []
        if everything:
            fresh = self._leaves
        else:
            fresh = [self._leaves[at] for at in self._random.integers(0, len(self._leaves), FRESH_LEAVES).tolist()]
        known = search.chosen.keys() | {slot for *_, slot in search.pool}
        return [slot for slot in dict.fromkeys([*kept, *fresh]) if slot not in known]

    def _slot(self, key: Key) -> int:
        return int(self._history.slots([key])[0])

    def _sort_leaf(self, slot: int) -> None:
        """Adds the block to the leaves or removes it, depending on whether it is a resident block without resident children."""
        at = int(self._leaf_at[slot]) if slot >= 0 else -1
        due = slot in self._keys and not self._children[slot]
        if due and at < 0:
            self._leaf_at[slot] = len(self._leaves)
            self._leaves.append(slot)
        elif at >= 0 and not due:
            last = self._leaves.pop()
            if last != slot:
                self._leaves[at] = last
                self._leaf_at[last] = at
            self._leaf_at[slot] = -1

    def _fit(self) -> None:
        """Extends the arrays to the length of the history's arrays."""
        more = self._history.capacity - len(self._children)
        if more:
            self._bytes = np.concatenate([self._bytes, np.zeros(more, np.uint32)])
            self._children = np.concatenate([self._children, np.zeros(more, np.int32)])
            self._leaf_at = np.concatenate([self._leaf_at, np.full(more, -1, np.int32)])

    def values(self, slots: list[int], now_s: float) -> list[float]:
        """Returns the value per byte of each block: its reuse index times the cost of getting it back, divided by its size."""
        known, at = self._history, np.array(slots, np.int64)
        octaves = np.log2(np.maximum((now_s - known.last_s[at]) * _PER_FIRST, 1.0)) + 1.0
        octave = np.minimum(octaves.astype(np.int64), reuse.OCTAVES - 2)
        places = known.kind[at].astype(np.int64) * reuse.OCTAVES + octave
        low, high = known.table[places], known.table[places + 1]
        index = low + (high - low) * np.minimum(octaves - octave, 1.0)
        return [self._by_byte(slot, each) for slot, each in zip(slots, index.tolist(), strict=True)]

    def value(self, slot: int, now_s: float) -> float:
        """Same as `values`, for one block."""
        known = self._history
        octaves = math.log2(max((now_s - known.last_s.item(slot)) * _PER_FIRST, 1.0)) + 1.0
        octave = min(int(octaves), reuse.OCTAVES - 2)
        place = known.kind.item(slot) * reuse.OCTAVES + octave
        low, high = known.table.item(place), known.table.item(place + 1)
        return self._by_byte(slot, low + (high - low) * min(octaves - octave, 1.0))

    def _by_byte(self, slot: int, index: float) -> float:
        cost = 1 + self._cost_per_block * self._history.depth.item(slot) if self._cost_per_block else 1.0
        return index * cost * self._factors.get(slot, 1.0) / self._bytes.item(slot)

    def parent_freed_by(self, slot: int, gone: dict[int, int]) -> int | None:
        """Returns the parent of the chosen block `slot`, if it is resident and all its resident children are now chosen as victims.

        Else None.

        `gone` has the number of chosen children by parent; this call counts `slot`.
        """
        parent = self._history.parent.item(slot)
        if parent not in self._keys:
            return None
        gone[parent] = gone.get(parent, 0) + 1
        return parent if gone[parent] == self._children.item(parent) else None

    def check(self) -> None:
        known = self._history
        resident = np.array(sorted(self._keys), np.int64)
        assert np.flatnonzero(self._bytes).tolist() == resident.tolist()
        assert (known.uses_of[resident] > 0).all()
        assert (known.held[resident] > 0).all()
        expected = np.bincount(known.parent[resident][known.parent[resident] >= 0], minlength=len(self._children))
        assert (expected == self._children).all()
        assert set(self._leaves) == {slot for slot in self._keys if not self._children[slot]}
        assert all(self._leaf_at[slot] == at for at, slot in enumerate(self._leaves))
        assert np.count_nonzero(self._leaf_at >= 0) == len(self._leaves)
        assert all(self._slot(key) == slot for slot, key in self._keys.items())


class _Search:
    """One search for victims: the blocks chosen so far, and the candidates of the lowest values that are not chosen."""

    def __init__(self, policy: AdaptivePolicy, protected: Container[Key], now_s: float) -> None:
        self.chosen: dict[int, Key] = {}
        self.scores: dict[int, float] = {}  # the value of each chosen block
        self.pool: list[tuple[float, float, int]] = []  # value, last use (of equal values, the older is evicted first), slot
        self.freed = 0
        self._policy = policy
        self._protected = protected
        self._now_s = now_s
        self._gone: dict[int, int] = {}  # chosen children by parent

    def take_lowest(self, candidates: list[int], nbytes: int) -> bool:
        """Chooses victims: the candidate of the lowest value, then its ancestors while their values are below the next candidate's.

        Returns False if every candidate is protected.
        """
        last_s = self._policy._history.last_s
        values = self._policy.values(candidates, self._now_s)
        self.pool = sorted([*self.pool, *zip(values, last_s[candidates].tolist(), candidates, strict=True)])
        while self.pool:
            value, _, slot = self.pool.pop(0)
            if self._policy._keys[slot] not in self._protected:
                break
        else:
            return False
        self.pool = self.pool[:KEPT_LEAVES]
        self._peel(slot, value, self.pool[0][0] if self.pool else math.inf, nbytes)
        return True

    def _peel(self, slot: int, value: float, bound: float, nbytes: int) -> None:
        policy, known = self._policy, self._policy._history
        kind, last_s = -1, 0.0
        while True:
            self.chosen[slot], self.scores[slot] = policy._keys[slot], value
            self.freed += policy._bytes.item(slot)
            parent = policy.parent_freed_by(slot, self._gone)
            if parent is None or self.freed >= nbytes or policy._keys[parent] in self._protected:
                return
            if known.kind.item(parent) != kind or known.last_s.item(parent) != last_s:  # blocks of one turn have the same value
                kind, last_s = known.kind.item(parent), known.last_s.item(parent)
                value = policy.value(parent, self._now_s)
            if value > bound:
                self.pool = sorted([*self.pool, (value, last_s, parent)])
                return
            slot = parent
