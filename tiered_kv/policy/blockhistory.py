"""The history of uses from which the adaptive policy learns. It takes about fifty bytes for each block, evicted blocks included."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from tiered_kv.policy import reuse
from tiered_kv.policy.base import Key
from tiered_kv.policy.history import History
from tiered_kv.policy.keytable import KeyTable, tags_of

GHOSTS_MIN = 65_536
GHOSTS_PER_BLOCK = 4
LEARN_EVERY = 200
"""The number of runs recorded before a new table is computed. A request has about two runs."""

_SAMPLE = 4  # the model learns from every fourth block
_HOT_USES = 64
_USES_MAX = 255
_ANSWER_UNKNOWN = 1
_TICK_S = 1e-6  # each run is recorded at least this much later than the previous one, so that uses have an order
_REQUEST_S = 1e-3  # runs of one request are recorded within this time
_RUNS_MAX = 1024  # runs of one request that are remembered: a chain may grow block by block without end
_NONE = np.empty(0, np.int32)
_FIELDS = {
    "tag": np.uint64,
    "last_s": np.float64,
    "parent": np.int32,
    "depth": np.int32,
    "kind": np.int16,
    "uses_of": np.uint8,
    "held": np.uint8,
    "sampled": np.bool_,
}


class BlockHistory(History):
    """Known blocks by slot number, in arrays that the policies of all tiers share.

    `last_s`: time of the last use. `parent`: slot of the parent, -1 for none. `depth`: number of ancestors. `kind`: number of
    the block's kind (see `reuse`), its row in `table`. `uses_of`: count of uses, 0 for a free slot. `held`: in how many tiers
    the block is resident. `sampled`: whether the reuse model learns from this block. Of the blocks in no tier (ghosts), the
    most recently used are remembered: at most `GHOSTS_PER_BLOCK` for each resident block, but not fewer than `GHOSTS_MIN`.
    """

    tag: np.ndarray
    last_s: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    kind: np.ndarray
    uses_of: np.ndarray
    held: np.ndarray
    sampled: np.ndarray

    def __init__(self) -> None:
        self.model = reuse.ReuseModel()
        self.table = self.model.table(_NONE, _NONE)
        """The reuse index of blocks by kind and age. float32, `reuse.ROWS` times `reuse.OCTAVES`, flat."""
        self.capacity = 0
        self._keys = KeyTable()
        self._free: list[int] = []
        self._blocks_ever = 0
        self._resident_max = 0
        self._learn_in = LEARN_EVERY
        self._now_s = 0.0
        self._adopted = False
        self._hot: dict[int, int] = {}  # slot of a prefix that many requests share -> its bucket, from 1 on
        self._hot_uses: Counter[int] = Counter()
        self._run: list[np.ndarray] = []  # slots of the request recorded last, in runs
        self._memo: tuple[Sequence[Key], np.ndarray] = ((), _NONE)
        self._grow(1024)

    def slots(self, keys: Sequence[Key]) -> np.ndarray:
        """Returns the int32 slots of consecutive blocks of one chain, -1 for unknown blocks.

        Cheap for the same blocks as in the last call, and for the first or the last of them.
        """
        known, slots = self._memo
        count, more = len(keys), len(known) - len(keys)
        if more < 0 or not count:
            pass
        elif known[count - 1] == keys[-1] and known[0] == keys[0]:
            return slots[:count]
        elif known[-1] == keys[-1] and known[more] == keys[0]:
            return slots[more:]
        slots = self._keys.find(tags_of(keys), self.tag) if count else _NONE
        self._memo = (keys, slots)
        return slots

    def uses(self, key: Key) -> int:
        slot = int(self.slots([key])[0])
        return int(self.uses_of[slot]) if slot >= 0 else 0

    def chance(self, key: Key, ahead: float) -> float:
        slot = int(self.slots([key])[0])
        if slot < 0:
            return 0.0
        age_s = self._now_s - self.last_s.item(slot)
        return self.model.chance(self.kind.item(slot), age_s, ahead * age_s)

    def seen(self, keys: Sequence[Key], parent: Key | None, now_s: float) -> None:
        # An unknown parent gets a slot as well, so that its child is already linked to it when the parent becomes resident.
        parent_slot = -1 if parent is None else int(self.note([parent], None)[0])
        slots = self._known(keys, parent_slot)
        now_s = max(now_s, self._now_s + _TICK_S)
        before = slots[self.uses_of[slots] > 0]
        gap, hot = self._chain_features(before, parent_slot, now_s)
        learned = before[self.sampled[before]]
        self.model.ended(self.kind[learned], now_s - self.last_s[learned])
        self.uses_of[slots] += self.uses_of[slots] < _USES_MAX
        self.last_s[slots] = self._now_s = now_s
        self.kind[slots] = reuse.kinds(self.uses_of[slots], gap, hot, _ANSWER_UNKNOWN)
        continues = self._run and parent_slot >= 0 and self._run[-1][-1] == parent_slot
        self._run = [*self._run[1 - _RUNS_MAX :], slots] if continues else [slots]
        self._learn_in -= 1
        if not self._learn_in:
            self.learn(now_s)

    def note(self, keys: Sequence[Key], parent: Key | None) -> np.ndarray:
        """Records unknown blocks, such as blocks found on disk, as used once, just now. Returns the slots of all `keys`."""
        slots = self.slots(keys)
        if (slots < 0).any():
            self.seen(keys, parent, self._now_s)
        return self.slots(keys)

    def hold(self, slots: np.ndarray) -> None:
        """Records that the blocks are resident in one more tier."""
        self.held[slots] += 1

    def release(self, slot: int) -> None:
        """Records that the block is resident in one tier fewer."""
        self.held[slot] -= 1

    def hint(
        self,
        last_block: Key,
        now_s: float,
        *,
        answer_tokens: int | None = None,
        reuse_within_s: float | None = None,
        ended: bool = False,
    ) -> None:
        chain = self._last_use_of(int(self.slots([last_block])[0]))
        if answer_tokens is not None:
            self.kind[chain] = reuse.answered(self.kind[chain], answer_tokens)
        if reuse_within_s is not None:
            self.kind[chain] = reuse.expected_kind(reuse_within_s)
        if ended:
            children = np.bincount(self.parent[self.parent >= 0], minlength=self.capacity)[chain]
            shared = np.flatnonzero(children > 1)
            self.kind[chain[shared[-1] + 1 if len(shared) else 0 :]] = reuse.ENDED

    def learn(self, now_s: float) -> None:
        """Computes the table of reuse indices (`table`) again from all uses so far. About 2 ms."""
        self._learn_in = LEARN_EVERY
        self._choose_hot()
        self._make_table(now_s)
        self.model.fade()

    def statistics(self) -> bytes:
        """Returns this node's counts of intervals between uses, for `merge_statistics`: at most a few tens of KB."""
        return self.model.statistics(*self._open_intervals(self._now_s))

    def adopt(self, others: bytes) -> None:
        """Learns from other nodes' counts of intervals as well. Replaces the counts of earlier calls."""
        self.model.adopt(others)
        if not self._adopted:  # other nodes know more than a node that is new
            self._adopted = True
            self._make_table(self._now_s)

    @property
    def nbytes(self) -> int:
        """Memory in use, in bytes."""
        arrays: list[np.ndarray] = [getattr(self, field) for field in _FIELDS]
        return self._keys.nbytes + sum(array.nbytes for array in arrays)

    @property
    def blocks(self) -> int:
        """How many blocks are remembered."""
        return len(self._keys)

    def check(self) -> None:
        known = np.flatnonzero(self.uses_of > 0)
        assert len(known) + len(self._free) == self.capacity
        assert len(self._keys) == len(known)
        assert (self._keys.find(self.tag[known], self.tag) == known).all()
        assert (self.uses_of[self.held > 0] > 0).all()
        parents = self.parent[known]
        assert (self.uses_of[parents[parents >= 0]] > 0).all()

    def _make_table(self, now_s: float) -> None:
        self.table = self.model.table(*self._open_intervals(now_s))

    def _open_intervals(self, now_s: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns the kinds of the sampled blocks, and the seconds since their last use. Their next use is not known yet."""
        open_ = np.flatnonzero(self.sampled & (self.uses_of > 0))
        return self.kind[open_], now_s - self.last_s[open_]

    def _known(self, keys: Sequence[Key], parent_slot: int) -> np.ndarray:
        """Returns the slots of consecutive blocks of a chain. Gives slots to unknown blocks, and links each block to its parent."""
        if len(self._free) < len(keys):
            self._make_room(len(keys))
        slots = self.slots(keys)
        new = np.flatnonzero(slots < 0)
        if len(new):
            slots = slots.copy()
            slots[new] = self._allocate(tags_of(keys)[new])
            self._memo = (keys, slots)
        loose = np.flatnonzero(self.held[slots] == 0)  # links of resident blocks never change
        if len(loose):
            parents = np.concatenate([np.array([parent_slot], np.int32), slots[:-1]])
            self.parent[slots[loose]] = parents[loose]
            self.depth[slots[loose]] = loose + (int(self.depth[parent_slot]) + 1 if parent_slot >= 0 else 0)
        return slots

    def _chain_features(self, before: np.ndarray, parent_slot: int, now_s: float) -> tuple[int, int]:
        """Returns two buckets for `reuse.kinds`: of the time since this chain's last request (turn), and of its hot prefix.

        A hot prefix is one that many requests share. `before`: slots of the chain's blocks that were used before.
        """
        gap, hot = reuse.inherited(int(self.kind[parent_slot])) if parent_slot >= 0 else (0, 0)
        if len(before):
            gap = reuse.gap_bucket(now_s - self.last_s.item(before[-1]))
            often = before[self.uses_of[before] >= _HOT_USES]
            if len(often):
                hottest = int(often[-1])
                self._hot_uses[hottest] += 1
                hot = self._hot.get(hottest, 0)
        return gap, hot

    def _choose_hot(self) -> None:
        """Assigns the buckets of hot prefixes to the most used prefixes.

        A prefix loses its bucket only to one with more than twice its uses.
        """
        buckets = reuse.HOTS - 1
        for slot, _ in self._hot_uses.most_common(buckets):
            if slot in self._hot:
                continue
            if len(self._hot) < buckets:
                bucket = min(set(range(1, buckets + 1)) - set(self._hot.values()))
            else:
                least = min(self._hot, key=lambda hot: self._hot_uses[hot])
                if self._hot_uses[slot] <= 2 * self._hot_uses[least]:
                    break
                bucket = self._hot.pop(least)
                self.model.forget_hot(bucket)
            self._hot[slot] = bucket
        self._hot_uses = Counter({slot: uses // 2 for slot, uses in self._hot_uses.most_common(4 * buckets) if uses > 1})

    def _last_use_of(self, last_block: int) -> np.ndarray:
        """Returns the slots of `last_block` and of those of its ancestors that were last used by the same request, ancestors first.

        Each step must go to a smaller depth, because the parents of blocks that are remembered but not resident may form a cycle.
        """
        if self._run and self._run[-1][-1] == last_block:
            return np.concatenate(self._run)
        chain: list[int] = []
        while last_block >= 0 and (not chain or abs(self.last_s[last_block] - self.last_s[chain[0]]) < _REQUEST_S):
            if chain and self.depth[last_block] >= self.depth[chain[-1]]:
                break
            chain.append(last_block)
            last_block = int(self.parent[last_block])
        return np.array(chain[::-1], np.int32)

    def _allocate(self, tags: np.ndarray) -> np.ndarray:
        count = len(tags)
        slots = np.array(self._free[-count:][::-1], np.int32)
        del self._free[-count:]
        self.tag[slots] = tags
        self.sampled[slots] = (self._blocks_ever + np.arange(count)) % _SAMPLE == 0
        self._blocks_ever += count
        self._keys.insert(slots, self.tag)
        return slots

    def _make_room(self, count: int) -> None:
        """Makes sure that `count` slots are free: forgets surplus ghosts, or grows the arrays."""
        needed = self.held > 0
        needed[self.parent[needed & (self.parent >= 0)]] = True
        ghosts = np.flatnonzero(~needed & (self.uses_of > 0))
        self._resident_max = max(self._resident_max, self.capacity - len(self._free) - len(ghosts))
        ghosts_max = max(GHOSTS_MIN, GHOSTS_PER_BLOCK * self._resident_max)
        if len(ghosts) >= ghosts_max:
            oldest = np.argsort(self.last_s[ghosts], kind="stable")
            self._forget(ghosts[oldest[: len(ghosts) - ghosts_max * 7 // 8]])
        if len(self._free) < count:
            self._grow(self.capacity + max(count, min(self.capacity, ghosts_max - len(ghosts))))

    def _forget(self, slots: np.ndarray) -> None:
        learned = slots[self.sampled[slots]]
        self.model.lost_sight(self.kind[learned], self._now_s - self.last_s[learned])
        gone = np.zeros(self.capacity, bool)
        gone[slots] = True
        self.uses_of[slots] = 0
        self.parent[(self.parent >= 0) & gone[self.parent]] = -1
        self._hot = {slot: bucket for slot, bucket in self._hot.items() if not gone[slot]}
        self._hot_uses = Counter({slot: uses for slot, uses in self._hot_uses.items() if not gone[slot]})
        kept = np.flatnonzero(self.uses_of > 0).astype(np.int32)
        self._keys.rebuild(self.tag[kept], kept)
        self._free += slots[::-1].tolist()
        self._run, self._memo = [], ((), _NONE)

    def _grow(self, capacity: int) -> None:
        for field, dtype in _FIELDS.items():
            fresh: np.ndarray = np.zeros(capacity, dtype)
            if self.capacity:
                fresh[: self.capacity] = getattr(self, field)
            setattr(self, field, fresh)
        self._free = [*range(capacity - 1, self.capacity - 1, -1), *self._free]
        self.capacity = capacity
