"""A worker's access to the shared memory of its node: finds blocks in the index and reads them, without a call to the node.

Protocol of a read: `slot = lookup(key)`, copy the bytes, `valid(slot)`. If that returns False, the block was moved or removed during
the copy: discard the bytes, and treat the lookup as a miss or try once more.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import torch

from tiered_kv.blocks import Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.memory import words as w
from tiered_kv.memory.locks import merged, share_range, unlock_range
from tiered_kv.memory.shared import NodeFiles, VacantFiles

_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1
_HOST, _DEVICE = int(Tier.HOST), int(Tier.DEVICE)
_TIERS = frozenset(map(int, Tier))
DAMAGED_MAX = 1024
EPOCH_TRIES = 100
_slot = tuple.__new__  # half the time of the named tuple's own constructor


class Slot(NamedTuple):
    """A block as found in the index. `seq` is the slot's sequence number, which `valid` compares; `tier` is the number of a `Tier`."""

    index: int  # type: ignore[assignment]  # hides the tuple's method of that name
    seq: int
    tier: int
    codec: int
    segment: int
    offset: int
    stored_bytes: int
    raw_bytes: int


class NodeView:
    """The mapped index and arena of a node on this machine. Lookups are safe from several threads."""

    def __init__(self, files: NodeFiles | VacantFiles) -> None:
        """Use `open` instead. The view owns `files` from now on."""
        self._files = files
        self._views = w.IndexViews(files.index.mapped(), files.slots)
        self._header, self._words, self._bytes = self._views.header, self._views.slot_words, self._views.slot_bytes
        self._slots, self._mask = files.slots, files.slots - 1
        self._arena: torch.Tensor | None = files.arena.tensor()
        self.arena_bytes = files.arena_bytes
        self.lookups = 0
        self.retries = 0
        self.damaged: set[BlockKey] = set()
        """Keys whose slots were found damaged, at most `DAMAGED_MAX`, until the client takes them."""

    @classmethod
    def open(cls, directory: str | Path) -> Self:
        """Map the files of the node in `directory`. Raises as `NodeFiles.attach` does. Cost: page tables, about 0.15 s a GiB."""
        return cls(NodeFiles.attach(directory))

    @classmethod
    def vacant(cls, directory: str | Path) -> Self:
        """Create the view of a closed node without blocks, in 12 KiB of memory. A worker uses it while there is no node."""
        return cls(VacantFiles(Path(directory)))

    def is_in_place(self) -> bool:
        """Whether the mapped files are still the files in the node's directory."""
        return self._files.is_in_place()

    @property
    def directory(self) -> Path:
        return self._files.directory

    @property
    def arena(self) -> torch.Tensor:
        """The whole arena, 1-D uint8; shared memory."""
        if self._arena is None:
            raise _closed()
        return self._arena

    @property
    def generation(self) -> int:
        """Number of writers that the files have had. A change means that the node was restarted."""
        return self._head(w.GENERATION)

    @property
    def identity(self) -> int:
        """A random number that identifies the mapped files. A node with another number uses other files, even at the same path."""
        return self._head(w.IDENTITY)

    def seems_alive(self, now_ns: int) -> bool:
        """Whether the node has not shut down and its heartbeat is younger than BEAT_AGE_NS_MAX. `now_ns`: monotonic clock."""
        header = self._header
        try:
            return header[w.STATE] == w.LIVE and now_ns - header[w.HEARTBEAT] < w.BEAT_AGE_NS_MAX
        except ValueError as error:
            raise _closed() from error

    @property
    def live(self) -> bool:
        """Whether the node has not shut down on purpose. A node that crashed still counts as live: its blocks can be read."""
        return self._head(w.STATE) == w.LIVE

    @property
    def peers(self) -> int:
        """Number of other live nodes, as last published by this node."""
        return self._head(w.PEERS)

    @property
    def mark(self) -> tuple[int, int]:
        """The identity, and a counter of changes of weight epochs. The pair changes with a restart or a new epoch. About 0.2 µs."""
        header = self._header
        try:
            return header[w.IDENTITY], header[w.EPOCHS]
        except ValueError as error:
            raise _closed() from error

    def weight_epoch(self, family: bytes) -> tuple[tuple[int, int], int] | None:
        """Returns the `mark`, and the weight epoch that a family has at this mark. Returns None while the node changes its epochs."""
        header, wanted = self._header, (0, w.family_word(family))
        try:
            for _ in range(EPOCH_TRIES):
                mark = self.mark
                w.fence()
                count = min(header[w.EPOCH_COUNT], w.EPOCHS_MAX)
                table = header[w.EPOCH_TABLE : w.EPOCH_TABLE + 2 * count].tolist()
                w.fence()
                if self.mark == mark and not mark[1] & 1:
                    pairs = zip(table[::2], table[1::2], strict=True)
                    return mark, max((number for word, number in pairs if word in wanted), default=0)
        except ValueError as error:
            raise _closed() from error
        return None

    @property
    def heartbeat_ns(self) -> int:
        """Time of the node's last heartbeat, on the monotonic clock."""
        return self._head(w.HEARTBEAT)

    @property
    def blocks(self) -> int:
        """Number of blocks in the index."""
        return self._head(w.BLOCKS)

    def lookup(self, key: BlockKey, _tries: int = 2) -> Slot | None:
        """Find a block. Returns its slot, or None if it is not visible. Cost: about 1 µs.

        A block that is being moved is looked up once more. If it still is being moved, it is a miss. A damaged slot (an
        unknown tier, bytes out of bounds) is a miss too, and its key is added to `damaged`. Raises (kind `closed`) after `close`.
        """
        self.lookups += 1
        words, view, mask, unpack = self._words, self._bytes, self._mask, w.FIELDS.unpack_from
        start = w.HOME.unpack_from(key)[0] & mask
        try:
            for probe in range(start, start + self._slots):
                index = probe & mask
                seq = words[index * 8]
                if w.WEAKLY_ORDERED:
                    w.fence()
                found, kind, offset, lengths = unpack(view, index * 64 + 8)
                if found == key:
                    if w.WEAKLY_ORDERED:
                        w.fence()
                    if seq & 1 or words[index * 8] != seq:
                        return self._lookup_again(key, _tries - 1)
                    if kind & 0xFF:
                        slot = _slot(Slot, (index, seq, kind & 0xFF, kind >> 8 & 0xFF, kind >> 32, offset, lengths & _U32, lengths >> 32))
                        if self._is_sound(slot):
                            return slot
                        self._note_damage(key)
                        return None
                if not kind & 0xFF:
                    return None
        except ValueError as error:
            raise _closed() from error
        return None

    def lookup_leading(self, keys: Sequence[BlockKey], raw_bytes: int) -> list[Slot]:
        """Find the longest prefix of `keys` that is visible as blocks of `raw_bytes`. Returns its slots, at half the cost of `lookup`.

        Checks a key's first slot itself, and accepts a raw block in host memory there. Passes all other keys to `lookup`.
        """
        lengths_of_raw, offset_max = raw_bytes | raw_bytes << 32, self.arena_bytes - raw_bytes
        words, view, mask, unpack, home = self._words, self._bytes, self._mask, w.FIELDS.unpack_from, w.HOME.unpack_from
        found: list[Slot] = []
        quick = 0
        try:
            for key in keys:
                index = home(key)[0] & mask
                seq = words[index * 8]
                present, kind, offset, lengths = unpack(view, index * 64 + 8)
                slot: Slot | None
                if (
                    present == key
                    and kind == _HOST
                    and lengths == lengths_of_raw
                    and offset <= offset_max
                    and not offset % w.PAYLOAD_ALIGN
                    and not seq & 1
                    and not w.WEAKLY_ORDERED
                    and words[index * 8] == seq
                ):
                    quick += 1
                    slot = _slot(Slot, (index, seq, _HOST, 0, 0, offset, raw_bytes, raw_bytes))
                else:
                    slot = self.lookup(key)
                    if slot is not None and slot.raw_bytes != raw_bytes:
                        self._note_damage(key)  # the key is bound to the layout, and so to the size
                        slot = None
                if slot is None:
                    break
                found.append(slot)
        except ValueError as error:
            raise _closed() from error
        self.lookups += quick
        return found

    def _is_sound(self, slot: Slot) -> bool:
        """Whether the fields of a slot are possible for a block."""
        if slot.tier not in _TIERS or not 0 < slot.stored_bytes <= slot.raw_bytes + w.FRAME_BYTES_MORE or slot.offset > w.OFFSET_MAX:
            return False
        if slot.tier > _HOST:
            return True
        is_placed = not slot.offset % w.PAYLOAD_ALIGN and (slot.codec != 0 or slot.stored_bytes == slot.raw_bytes)
        return is_placed and (slot.tier == _DEVICE or slot.offset + slot.stored_bytes <= self.arena_bytes)

    def _note_damage(self, key: BlockKey) -> None:
        if len(self.damaged) < DAMAGED_MAX:
            self.damaged.add(key)

    def _lookup_again(self, key: BlockKey, tries: int) -> Slot | None:
        if not tries:
            return None
        self.lookups -= 1
        self.retries += 1
        return self.lookup(key, tries)

    def valid(self, slot: Slot) -> bool:
        """Whether the slot is unchanged since `lookup`. Only then are the copied bytes right."""
        if w.WEAKLY_ORDERED:
            w.fence()
        try:
            return self._words[slot.index * 8] == slot.seq
        except ValueError as error:
            raise _closed() from error

    def all_valid(self, slots: Sequence[Slot]) -> bool:
        """Whether `valid` is true for every slot, at half the cost."""
        if w.WEAKLY_ORDERED:
            return all(map(self.valid, slots))
        words = self._words
        try:
            return [words[slot.index * 8] for slot in slots] == [slot.seq for slot in slots]
        except ValueError as error:
            raise _closed() from error

    def touch(self, slots: Iterable[Slot]) -> None:
        """Record one use (a touch) of each block. Pass the deepest block of a chain first. A race may lose touches.

        Cost: about 0.3 µs a block.
        """
        ticks, counts = self._views.ticks, self._views.counts
        tick = self._head(w.TICK)
        for slot in slots:
            tick = tick + 1 & _U64  # a damaged tick may be the largest of 64 bits
            index = slot.index
            ticks[index] = tick
            counts[index] = counts[index] + 1 & _U32
        self._header[w.TICK] = tick

    def tally(self, asked: int, hit: int, saved_tokens: int = 0, saved_us: int = 0) -> None:
        """Add to the node's counters: blocks that workers asked for, blocks that they got, and prefill saved, in tokens and in µs.

        If two workers add at the same time, one of the additions may be lost.
        """
        header = self._header
        header[w.ASKED] = header[w.ASKED] + asked & _U64
        header[w.HIT] = header[w.HIT] + hit & _U64
        header[w.SAVED_TOKENS] = header[w.SAVED_TOKENS] + saved_tokens & _U64
        header[w.SAVED_US] = header[w.SAVED_US] + saved_us & _U64

    def tally_declined(self, label: str, tokens: int) -> None:
        """Add to the counter of tokens that were not loaded from a tier because computing them is faster.

        `label`: where the tokens are cached, one of DECLINED_LABELS.
        """
        word = w.DECLINED + w.DECLINED_LABELS.index(label)
        self._header[word] = self._header[word] + tokens & _U64

    def extent(self, offset: int, nbytes: int) -> torch.Tensor:
        """Returns `nbytes` of the arena as a (nbytes,) uint8 tensor that shares its memory. Raises (kind `memory`) out of bounds."""
        self._check_bounds(offset, nbytes)
        return self.arena[offset : offset + nbytes]

    def extents(self, offset: int, stride: int, count: int, nbytes: int) -> torch.Tensor:
        """Returns `count` extents that start `stride` bytes apart, as a (count, nbytes) uint8 tensor that shares the arena's memory.

        Raises (kind `memory`) out of bounds.
        """
        if count < 1 or stride < 0:
            raise TieredKVError(Kind.MEMORY, f"extents: count must be at least 1 and stride at least 0, got {count} and {stride}")
        self._check_bounds(offset, stride * (count - 1) + nbytes)
        return self.arena.as_strided((count, nbytes), (stride, 1), offset)

    @contextmanager
    def guard(self, ranges: Iterable[tuple[int, int]], generation: int) -> Iterator[bool]:
        """Lock (offset, nbytes) `ranges` of the arena, so that a restarted node does not give them to another worker.

        Yields whether the node still has the `generation` that was read before the ranges were reserved. If False, the node was
        restarted: write nothing. Keep the lock until the node has answered the commit. Calls on one view must not overlap.
        About 6 µs a run.
        """
        spans = merged(ranges)
        fd = self._files.arena_fd
        if fd is None:
            raise _closed()
        held = []
        try:
            for start, nbytes in spans:
                self._check_bounds(start, nbytes)
                share_range(fd, start, nbytes)
                held.append((start, nbytes))
            yield self.generation == generation
        finally:
            if self._files.arena_fd is not None:  # closing the view has released them
                for start, nbytes in held:
                    unlock_range(fd, start, nbytes)

    def check(self) -> None:
        """Assert that the mapped memory has the sizes in the index's header."""
        if self._arena is not None:
            assert self._head(w.SLOTS) == self._slots and self._head(w.ARENA_BYTES) == self.arena_bytes == len(self._arena)

    def close(self) -> None:
        """Unmap the files and release the locks. Tensors returned earlier stay usable. May be called twice."""
        self._arena = None
        self._views.release()
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _head(self, word: int) -> int:
        try:
            return self._header[word]
        except ValueError as error:
            raise _closed() from error

    def _check_bounds(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.arena_bytes:
            raise TieredKVError(Kind.MEMORY, f"arena: offset {offset} plus nbytes {nbytes} must be within its {self.arena_bytes} bytes")


def _closed() -> TieredKVError:
    return TieredKVError(Kind.CLOSED, "this process has closed its mapping of the node's memory")
