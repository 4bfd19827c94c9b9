"""The writer's side of the shared index: a hash table that many processes read while one changes it.

Open addressing with linear probing; removal shifts later slots back (Knuth, TAOCP vol. 3, 6.4, algorithm R), so that
there are no tombstones. Every change of a slot is a seqlock write (Lameter, "Effective synchronization on Linux/NUMA
systems", 2005): sequence number odd, fields, sequence number even again. Sequence numbers never go back or repeat.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from tiered_kv.blocks import Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.memory import words as w
from tiered_kv.memory.shared import NodeFiles

_EMPTY_KEY = bytes(KEY_BYTES)
_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1
_TIERS = frozenset(Tier)
_Words = npt.NDArray[np.uint64]


class RebuildResult(NamedTuple):
    """Result of `IndexWriter.rebuild`: numbers of blocks kept, dropped for each reason, and `moved` because look-ups did not find them."""

    kept: int
    torn: int
    out_of_bounds: int
    duplicate: int
    overlapping: int
    moved: int


class IndexWriter:
    """The one writer of a node's index. Not thread-safe.

    The constructor first gives the files a new identity (a random number) and increments the generation (a count of writers).
    At last it sets the state to live. After attaching to existing files, call `rebuild` before any change. Besides the file it
    uses 12 bytes of private memory a slot.
    """

    def __init__(self, files: NodeFiles) -> None:
        if not files.writer or files.index.map is None:
            raise TieredKVError(Kind.MEMORY, f"IndexWriter: the files of {files.directory} are not open for writing")
        self._views = w.IndexViews(files.index.map, files.slots)
        self._header, self._words = self._views.header, self._views.slot_words
        self._header[w.IDENTITY] = w.new_identity()  # processes that map the original of copied files keep the former one
        self._header[w.GENERATION] += 1
        w.fence()
        self._slots, self._mask, self._arena_bytes = files.slots, files.slots - 1, files.arena_bytes
        # Not `zeros`: each of its pages is faulted in by a later put, at ten times the cost of the put.
        self._seen_ticks = np.full(files.slots, 0, np.uint64)
        self._seen_counts = np.full(files.slots, 0, np.uint32)
        self._seen_tick_words, self._seen_count_words = memoryview(self._seen_ticks), memoryview(self._seen_counts)
        self._seen_tick = 0
        self._closed = False
        self._header[w.WRITER_PID] = os.getpid()
        self._header[w.STATE] = w.LIVE

    @property
    def capacity_blocks(self) -> int:
        """Maximum number of blocks: half of the slots, so that probes stay short."""
        return self._slots // 2

    @property
    def generation(self) -> int:
        """Number of writers that these files have had."""
        return self._header[w.GENERATION]

    @property
    def identity(self) -> int:
        """A random number that identifies these files together with this writer."""
        return self._header[w.IDENTITY]

    @property
    def arena_bytes(self) -> int:
        """Size of the arena that belongs to this index."""
        return self._arena_bytes

    def __len__(self) -> int:
        return self._header[w.BLOCKS]

    def put(self, key: BlockKey, location: Location) -> int | None:
        """Make a block, or its new location, visible to all readers. Returns its slot, or None if the index is full.

        A full index is an expected outcome: nothing changes and the block stays invisible. Cost: about 3 µs.
        Raises (kind `memory`) for a location that does not fit into a slot.
        """
        fields = _packed(key, location)
        slot, found = self._find(key)
        if found:
            if self._location(slot) != location:
                self._write(slot, fields)
            return slot
        if self._header[w.BLOCKS] >= self.capacity_blocks:
            return None
        self._write(slot, fields)  # the slot was emptied with its touches; only a late reader can have added some
        self._header[w.BLOCKS] += 1
        return slot

    def get(self, key: BlockKey) -> Location | None:
        """Returns the location of the block, or None."""
        slot, found = self._find(key)
        return self._location(slot) if found else None

    def remove(self, key: BlockKey) -> bool:
        """Hide a block from all readers. Returns whether it was visible. Its bytes may be reused as soon as this returns."""
        slot, found = self._find(key)
        if found:
            self._close_gap(slot)
            self._header[w.BLOCKS] -= 1
        return found

    def items(self) -> Iterator[tuple[BlockKey, Location]]:
        """Yields all blocks with their locations, in the order of the slots. Change nothing while iterating."""
        for slot in np.flatnonzero(self._tiers()).tolist():
            yield self._key(slot), self._location(slot)

    def harvest(self) -> list[tuple[BlockKey, int, int]]:
        """Returns (key, touches, last tick) of the blocks used since the last call, by ascending tick.

        A touch is one use of a block, noted by a reader in the index. A tick is its place in the order of all touches. The
        first call after a restart returns all blocks that were ever touched, so that a policy can learn their order again.
        Cost: about 1 µs if no reader touched anything; else 16 bytes read per slot of the index (0.2 ms per GiB of host memory)
        and 0.5 µs a touched block. A race with a reader may lose a touch, but never invents a block.
        """
        tick = self._header[w.TICK]
        if tick == self._seen_tick:
            return []
        self._seen_tick = tick
        ticks, counts = np.frombuffer(self._views.ticks, np.uint64), np.frombuffer(self._views.counts, np.uint32)
        changed = np.flatnonzero(ticks != self._seen_ticks)
        last, total = ticks[changed], counts[changed]
        since = total - self._seen_counts[changed]
        self._seen_ticks[changed], self._seen_counts[changed] = last, total
        if len(changed) and int(last.max()) > self._header[w.TICK]:  # a slow reader set it back
            self._header[w.TICK] = int(last.max())
        order = np.argsort(last, kind="stable")
        slots = self._slot_table()[changed[order]]
        occupied = (slots[:, 5] & np.uint64(0xFF)) != 0
        keys, order = slots[occupied, 1:5].tobytes(), order[occupied]
        touches = zip(np.maximum(since[order], 1).tolist(), last[order].tolist(), strict=True)
        return [(keys[at * KEY_BYTES : (at + 1) * KEY_BYTES], count, tick) for at, (count, tick) in enumerate(touches)]

    def used(self) -> list[BlockKey]:
        """Returns the keys of all blocks that `harvest` has ever returned, the most recently used first."""
        touched = np.flatnonzero(self._seen_ticks)
        order = touched[np.argsort(self._seen_ticks[touched], kind="stable")[::-1]]
        keys = self._slot_table()[order[self._tiers()[order] != 0], 1:5].tobytes()
        return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]

    def tallies(self) -> tuple[int, int]:
        """Returns how many blocks workers asked for, and how many they got, since these files were created."""
        return self._header[w.ASKED], self._header[w.HIT]

    def savings(self) -> tuple[int, float]:
        """Returns the prefill that workers saved by fetches since these files were created: number of tokens, and seconds.

        The seconds are only those of workers that knew how fast their prefill is.
        """
        return self._header[w.SAVED_TOKENS], self._header[w.SAVED_US] / 1e6

    def declined(self) -> dict[str, int]:
        """Returns, by place (a tier, or a peer), how many cached tokens workers did not load because computing them is faster."""
        return {label: self._header[w.DECLINED + number] for number, label in enumerate(w.DECLINED_LABELS)}

    def set_epochs(self, epochs: Sequence[tuple[bytes, int]]) -> None:
        """Publish the weight epochs (family, number) to readers, at most EPOCHS_MAX. Every reader notices the change at its next call."""
        header, table = self._header, [word for family, number in epochs for word in (w.family_word(family), number)]
        assert len(epochs) <= w.EPOCHS_MAX
        odd = header[w.EPOCHS] | 1
        header[w.EPOCHS] = odd
        w.fence()
        for at, word in enumerate(table):
            header[w.EPOCH_TABLE + at] = word
        header[w.EPOCH_COUNT] = len(epochs)
        w.fence()
        header[w.EPOCHS] = odd + 1 & _U64

    def set_peers(self, peers: int) -> None:
        """Publish the number of other live nodes to readers. If it is 0, a miss in this index is a miss in the whole cluster."""
        self._header[w.PEERS] = peers

    def beat(self, now_ns: int) -> None:
        """Write this node's heartbeat: `now_ns`, the time of the monotonic clock in nanoseconds."""
        self._header[w.HEARTBEAT] = now_ns

    def close_state(self) -> None:
        """Show readers that the node has shut down on purpose."""
        self._header[w.STATE] = w.CLOSED

    def close(self) -> None:
        """Release the mapped index; the state that readers see stays. May be called twice."""
        self._closed = True
        self._views.release()

    def rebuild(self, is_trusted: Callable[[BlockKey, Location], bool] = lambda key, location: True) -> RebuildResult:
        """Repair the index of a writer that may have died at any point. Readers may read meanwhile. Returns what was kept and dropped.

        Drops slots that were being written; blocks out of bounds; host blocks that are not `is_trusted`; keys with several
        different locations; and all host extents that overlap, as none of them can be trusted. Makes every other block
        reachable. Cost: about 10 µs a block.
        """
        torn = self._drop_torn()
        stray = self._drop(lambda key, location: not self._in_bounds(location) or not _is_where_trusted(key, location, is_trusted))
        duplicate = self._drop_duplicates()
        overlapping_extents = self._overlapping()
        overlapping = self._drop(lambda _, location: location.tier is Tier.HOST and location.offset in overlapping_extents)
        moved = self._make_reachable()
        self._header[w.BLOCKS] = int(np.count_nonzero(self._tiers()))
        return RebuildResult(len(self), torn, stray, duplicate, overlapping, moved)

    def reconcile(self, truth: Mapping[BlockKey, Location]) -> int:
        """Repair a damaged index so that it shows exactly the blocks of `truth`. Returns how many slots were wrong or missing.

        Readers may read meanwhile, with more misses than usual. Cost: about 10 µs a block.
        """
        dropped = self._drop_torn() + self._drop(lambda key, location: truth.get(key) != location) + self._drop_duplicates()
        self._make_reachable()
        self._header[w.BLOCKS] = int(np.count_nonzero(self._tiers()))
        missing = [key for key in truth if not self._find(key)[1]]
        for key in missing:
            self.put(key, truth[key])
        return max(dropped, len(missing))  # most wrong slots are also missing blocks

    def check(self) -> None:
        """Assert that the counters are right, and whatever else readers rely on. Cost: about 10 µs a block."""
        if self._closed:
            return
        seqs = np.frombuffer(self._views.slot_words, np.uint64)[:: w.SLOT_WORDS]
        assert not (seqs & 1).any(), "a slot is being written"
        occupied = list(self._slot_keys())
        assert len(self) == len(occupied) <= self.capacity_blocks
        for slot, key in occupied:
            assert self._find(key) == (slot, True), f"slot {slot} is unreachable or a duplicate"
            assert self._in_bounds(self._location(slot)), f"slot {slot} is out of bounds"
        assert not self._overlapping(), "host extents overlap"

    def _find(self, key: BlockKey) -> tuple[int, bool]:
        """Returns (slot, True) if the key is in the index, else (slot, False) with the slot to put it in.

        If all slots are occupied, that slot is the last one tried.
        """
        words, view, mask = self._words, self._views.slot_bytes, self._mask
        start = w.HOME.unpack_from(key)[0] & mask
        for probe in range(start, start + self._slots):
            slot = probe & mask
            found, tier, _, _ = w.FIELDS.unpack_from(view, slot * w.SLOT_BYTES + w.KEY_OFFSET)
            if not tier & 0xFF:
                return slot, False
            if found == key and not words[slot * w.SLOT_WORDS] & 1:
                return slot, True
        return slot, False

    def _key(self, slot: int) -> BlockKey:
        start = slot * w.SLOT_BYTES + w.KEY_OFFSET
        return bytes(self._views.slot_bytes[start : start + KEY_BYTES])

    def _location(self, slot: int) -> Location:
        return _location(*self._words[slot * w.SLOT_WORDS + 5 : (slot + 1) * w.SLOT_WORDS])

    def _tiers(self) -> _Words:
        return np.frombuffer(self._views.slot_words, np.uint64)[5 :: w.SLOT_WORDS] & np.uint64(0xFF)

    def _slot_table(self) -> _Words:
        return np.frombuffer(self._views.slot_words, np.uint64).reshape(self._slots, w.SLOT_WORDS)

    def _slot_keys(self) -> Iterator[tuple[int, BlockKey]]:
        for slot in np.flatnonzero(self._tiers()).tolist():
            yield slot, self._key(slot)

    def _write(self, slot: int, fields: tuple[bytes, int, int, int]) -> None:
        """Change a slot: sequence number odd, fields, sequence number even. No other code changes slots."""
        word = slot * w.SLOT_WORDS
        odd = self._words[word] | 1  # it is already odd after a write that never ended
        self._words[word] = odd
        if w.WEAKLY_ORDERED:
            w.fence()
        w.FIELDS.pack_into(self._views.slot_bytes, slot * w.SLOT_BYTES + w.KEY_OFFSET, *fields)
        if w.WEAKLY_ORDERED:
            w.fence()
        self._words[word] = odd + 1 & _U64  # a damaged number may be the largest of 64 bits

    def _set_touches(self, slot: int, tick: int, count: int, seen_tick: int, seen_count: int) -> None:
        self._views.ticks[slot], self._views.counts[slot] = tick, count
        self._seen_tick_words[slot], self._seen_count_words[slot] = seen_tick, seen_count

    def _close_gap(self, gap: int) -> None:
        """Empty a slot. First move back those later slots that would become unreachable."""
        words, mask, slot = self._words, self._mask, gap
        for _ in range(self._slots):
            slot = (slot + 1) & mask
            word = slot * w.SLOT_WORDS
            if not words[word + 5] & 0xFF:
                break
            if (slot - words[word + 1]) & mask >= (slot - gap) & mask:
                self._write(gap, w.FIELDS.unpack_from(self._views.slot_bytes, slot * w.SLOT_BYTES + w.KEY_OFFSET))
                seen = self._seen_tick_words[slot], self._seen_count_words[slot]
                self._set_touches(gap, self._views.ticks[slot], self._views.counts[slot], *seen)
                gap = slot
        self._empty(gap)

    def _empty(self, slot: int) -> None:
        self._write(slot, (_EMPTY_KEY, 0, 0, 0))
        self._set_touches(slot, 0, 0, 0, 0)

    def _in_bounds(self, location: Location) -> bool:
        if location.tier is not Tier.HOST:
            return location.tier in _TIERS and location.stored_bytes > 0
        return 0 < location.stored_bytes <= self._arena_bytes - location.offset

    def _drop_torn(self) -> int:
        seqs = np.frombuffer(self._views.slot_words, np.uint64)[:: w.SLOT_WORDS]
        torn = np.flatnonzero(seqs & np.uint64(1)).tolist()
        for slot in torn:  # all of them first: the content of a torn slot must never be moved
            self._empty(slot)
        for slot in reversed(torn):
            if not self._words[slot * w.SLOT_WORDS + 5]:
                self._close_gap(slot)
        return len(torn)

    def _drop(self, unwanted: Callable[[BlockKey, Location], bool]) -> int:
        """Remove the blocks that are `unwanted`. Returns how many. Checks a slot again if another block moved into it."""
        dropped = 0
        for slot in np.flatnonzero(self._tiers()).tolist():
            while self._words[slot * w.SLOT_WORDS + 5] & 0xFF and unwanted(self._key(slot), self._location(slot)):
                self._close_gap(slot)
                dropped += 1
        return dropped

    def _drop_duplicates(self) -> int:
        """Remove duplicates: a writer that died while moving a slot leaves two equal slots. Keeps the slot that readers find.

        Returns how many slots were removed. Slots with one key and different locations are all removed.
        """
        slots_by_key: dict[BlockKey, list[int]] = {}
        for slot, key in self._slot_keys():
            slots_by_key.setdefault(key, []).append(slot)
        several = [key for key, slots in slots_by_key.items() if len(slots) > 1]
        return sum(self._drop_copies(key) for key in several)

    def _drop_copies(self, key: BlockKey) -> int:
        copies = [slot for slot, other in self._slot_keys() if other == key]
        equal = len({self._location(slot) for slot in copies}) == 1
        kept = self._find(key)[0] if equal else None
        dropped = 0
        while surplus := [slot for slot, other in self._slot_keys() if other == key and slot != kept]:
            self._close_gap(surplus[-1])
            dropped += 1
        return dropped

    def _overlapping(self) -> set[int]:
        """Returns the offsets of the host extents that overlap another extent."""
        extents = sorted((location.offset, location.stored_bytes) for _, location in self.items() if location.tier is Tier.HOST)
        overlapping: set[int] = set()
        end, owner = 0, 0
        for offset, stored_bytes in extents:
            if offset < end:
                overlapping |= {owner, offset}
            if offset + stored_bytes > end:
                end, owner = offset + stored_bytes, offset
        return overlapping

    def _make_reachable(self) -> int:
        """Move every block to where lookups of its key find it. Returns how many were unreachable."""
        moved = sum(self._find(key) != (slot, True) for slot, key in self._slot_keys())
        if moved:
            self._insert_all_again()
        return moved

    def _insert_all_again(self) -> None:
        blocks = list(self.items())
        for slot in np.flatnonzero(self._tiers()).tolist():
            self._empty(slot)
        self._header[w.BLOCKS] = 0
        for key, location in blocks:
            self.put(key, location)


def _is_where_trusted(key: BlockKey, location: Location, is_trusted: Callable[[BlockKey, Location], bool]) -> bool:
    return location.tier is not Tier.HOST or is_trusted(key, location)


def _location(kind: int, offset: int, lengths: int) -> Location:
    number = kind & 0xFF
    tier = Tier(number) if number in _TIERS else cast("Tier", number)  # a damaged slot: `_in_bounds` rejects it
    return Location(tier, kind >> 8 & 0xFF, kind >> 32, offset, lengths & _U32, lengths >> 32)


def _packed(key: BlockKey, location: Location) -> tuple[bytes, int, int, int]:
    tier, codec, segment, offset, stored_bytes, raw_bytes = location
    fits = 0 <= codec < 256 and 0 <= segment <= _U32 and 0 <= offset < 1 << 64 and 0 < stored_bytes <= _U32 and 0 <= raw_bytes <= _U32
    if len(key) != KEY_BYTES or not fits or tier not in _TIERS:
        raise TieredKVError(
            Kind.MEMORY, f"index: the location must fit into a slot and the key have {KEY_BYTES} bytes, got {location} and {len(key)} bytes"
        )
    return bytes(key), tier | codec << 8 | segment << 32, offset, stored_bytes | raw_bytes << 32
