"""The engine: carries out what the machine decides, with bounded threads, under one lock.

Show, Hide and Free happen at once, in the machine's order. Copies run without the lock: those into memory on
`io_threads` threads, those into each lower tier on one thread of its own, so that a slow disk stops nobody but itself. What
codes blocks on their way down, or where they are, has as many threads again. Their outcome is the machine's next event.
`freed` wakes those who wait for room or for a block.
"""

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from enum import Enum
from typing import NamedTuple, Protocol, TypeVar

from tiered_kv.blocks import AWAY, Location, Tier
from tiered_kv.clock import Clock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.store import events as ev
from tiered_kv.store.machine import StoreMachine
from tiered_kv.store.movement import REINSERT_SHARE
from tiered_kv.store.runs import uses_of
from tiered_kv.store.shrinking import staging_bytes
from tiered_kv.threads import DaemonThreads

log = logging.getLogger(__name__)
T = TypeVar("T")

COPY_BATCH_BYTES = 8 << 20
QUEUE_BYTES_MIN = 64 << 20
QUEUE_SHARE = 1 / 8
"""Of the tier above: bytes that may be on their way to a lower tier; what would come on top is given up instead."""
RECLAIM_WAIT_S = 1.0  # for the blocks of a segment that goes to arrive below, on the thread of that tier alone
WANTED_WAIT_S = 0.25  # for room for blocks that a worker waits for; it holds one of the threads that copy into memory
GIVING_UP_S = 0.01
"""How long after its deadline a store may go on giving blocks up, one after the other, until one extent is large enough."""
IN_MEMORY = (Tier.DEVICE, Tier.HOST)


class Index(Protocol):
    """What readers look keys up in."""

    def put(self, key: BlockKey, location: Location) -> object: ...
    def remove(self, key: BlockKey) -> object: ...
    def harvest(self) -> list[tuple[BlockKey, int, int]]: ...


class Filled(Enum):
    """How copying a block into memory went."""

    DONE = "done"
    GONE = "gone"  # the source is damaged or is not there
    LATER = "later"  # the source cannot be reached now


class Room(Enum):
    """Where in a tier in memory an extent may lie, if blocks are coded in it; elsewhere it makes no difference."""

    STAGING = "staging"  # for a block as it was stored: where it can be coded from, or anywhere while there is plenty of room
    APART = "apart"  # for one that is coded: among its like
    ANYWHERE = "anywhere"  # for a store that cannot wait


class Form(NamedTuple):
    """How a block lies, or will lie, in a tier in memory: the id of its codec, and bytes."""

    codec: int
    nbytes: int


class Coded(Protocol):
    """A block as it is to be kept in some tier: known to the mover, but for its size."""

    @property
    def nbytes(self) -> int: ...


class Mover(Protocol):
    """Moves bytes between tiers; knows frames, codecs and tiers, decides nothing."""

    def fits(self, tier: Tier, nbytes: int) -> bool:
        """Whether a tier in memory could hold a block of `nbytes` if it were empty."""

    def reserve(self, tier: Tier, nbytes: int, count: int, room: Room) -> list[int]:
        """Offsets of up to `count` extents for blocks of `nbytes` in a tier in memory; of at most one that is to lie apart."""

    def free(self, location: Location) -> None:
        """Give the bytes of one copy, or of a reserved extent, back."""

    def form(self, copy: ev.Copy) -> Form:
        """What a block that is copied into a tier in memory will be there."""

    def fill(self, copies: Sequence[ev.Copy], locations: Sequence[Location]) -> list[Filled]:
        """Read blocks of one source tier into reserved extents, of their form, of one tier in memory; how each went."""

    def coded(self, copy: ev.Copy) -> Coded | None:
        """A block as it should be kept in the tier that it is copied to; None if it cannot be read. Takes time, for several threads."""

    def settle_in(self) -> None:
        """What a thread does first that will call `coded`."""

    def keep(self, copy: ev.Copy, coded: Coded, offset: int) -> Location:
        """Put a coded block into a reserved extent of host memory."""

    def append(self, tier: Tier, copies: Sequence[ev.Copy], coded: Sequence[Coded | None]) -> list[Location | None]:
        """Write coded blocks to a lower tier; None for one that could not be written."""

    def batch_bytes(self, tier: Tier) -> int:
        """How much to write to `tier` in one go."""

    def segment_to_go(self, tier: Tier, sizes: Sequence[int]) -> int | None:
        """The segment that must go before blocks of these sizes can be written; None if there is room, or nothing can go."""

    def segment_to_age(self, tier: Tier) -> int | None:
        """A segment that will have to go before long, if there is one."""

    def keys_in(self, tier: Tier, segment: int) -> list[BlockKey]:
        """The blocks of a segment."""

    def segment_bytes(self, tier: Tier) -> int:
        """About how large a segment of the tier is."""

    def reinsert(self, tier: Tier, segment: int, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, Location]]:
        """Write blocks of a segment that goes into the newest one; those that could be, with their new places."""

    def drop_segment(self, tier: Tier, segment: int) -> None:
        """Remove a segment, with whose blocks the machine is done."""


class Engine:
    """One node's store: machine, index and tiers moved in step. Thread-safe."""

    def __init__(
        self,
        machine: StoreMachine,
        index: Index,
        mover: Mover,
        clock: Clock,
        io_threads: int,
        *,
        queue_bytes: int = QUEUE_BYTES_MIN,
    ) -> None:
        self.machine = machine
        self.lock = threading.RLock()
        self.freed = threading.Condition(self.lock)
        self.journal: dict[BlockKey, bool] = {}
        """Keys that became visible (True) or invisible (False) since somebody last emptied it."""
        self.on_gone: Callable[[BlockKey, Location], None] | None = None
        """Called, with the lock held, for the bytes of a block that is nowhere else, before they are given up."""
        self._index = index
        self._mover = mover
        self._clock = clock
        self._queue_bytes = queue_bytes
        self._up = DaemonThreads(io_threads, "tkv-io")
        self._coding = DaemonThreads(io_threads, "tkv-code", mover.settle_in)
        self._demoting = DaemonThreads(io_threads, "tkv-code", mover.settle_in)
        self._staging_bytes = staging_bytes(machine.shrinking.capacity_bytes)
        lower = sorted(tier for tier in machine.tiers if tier not in IN_MEMORY)
        self._down = {tier: DaemonThreads(1, f"tkv-{tier.label}") for tier in lower}
        self._leaving: Counter[Tier] = Counter()
        """Bytes that are on their way from a tier to a lower one."""
        self._progress_s: dict[Tier, float] = {}
        """When the last of them arrived, or the first of them left."""
        self._batches = 0
        self._closed = False

    def handle(self, events: Iterable[ev.Event]) -> None:
        """Let the machine decide about the events in order, and carry the decisions out."""
        with self.lock:
            copies: list[ev.Copy] = []
            freed = False
            for event in events:
                for instruction in self.machine.handle(event):
                    if isinstance(instruction, ev.Copy):
                        copies.append(instruction)
                    else:
                        freed = self._apply(instruction) or freed
            if freed:
                self.freed.notify_all()
            if copies:
                self._start(copies)

    def reserve(
        self,
        nbytes: int,
        keys: Sequence[BlockKey],
        tail: BlockKey | None,
        wait_s: float,
        tier: Tier = Tier.HOST,
        *,
        insist: bool = True,
        is_coded: bool = False,
    ) -> list[int]:
        """Extents for the first of the new blocks `keys`; makes room for them, waits at most `wait_s` for the first.

        Fewer than asked is back-pressure: pack these, commit them, ask again. None at all after the wait: refused. Where
        blocks were to leave for a lower tier that has not taken any for `wait_s`, others are given up instead, if the
        caller does `insist`. Where blocks are coded in host memory, all get no more than its staging area at a time; for one
        that `is_coded` others go, but are not coded themselves.
        """
        if not self._mover.fits(tier, nbytes):
            return []  # and nobody else has to go for it
        if self._staging_bytes and tier is Tier.HOST:
            keys = keys[: max(self._staging_bytes // nbytes, 1)]
        room = Room.APART if is_coded else Room.STAGING
        with self.lock:
            offsets = self._mover.reserve(tier, nbytes, len(keys), room)
            if len(offsets) == len(keys):
                return offsets
            self.drain_touches()
            deadline_s = self._clock.now_s() + wait_s
            while not self._closed:
                missing_bytes = (len(keys) - len(offsets)) * nbytes
                gave = self._make_room(tier, missing_bytes - self._coming_bytes(tier, is_coded), tail, keys, shrink=not is_coded)
                offsets += self._mover.reserve(tier, nbytes, len(keys) - len(offsets), room)
                left_s = min(deadline_s, self._progress_s.get(tier, deadline_s) + wait_s) - self._clock.now_s()
                if offsets or not self._leaving[tier]:
                    return offsets or self._defragment(tier, nbytes, tail, keys, deadline_s, gave)
                if left_s <= 0:
                    return self._instead(tier, nbytes, tail, keys, deadline_s) if insist and wait_s else []
                self.freed.wait(left_s)
                offsets = self._mover.reserve(tier, nbytes, len(keys), room)
                if offsets:  # enough to go on with, for which nobody else has to go
                    return offsets
            return offsets

    def _coming_bytes(self, tier: Tier, is_coded: bool) -> float:
        """How much room there will be without anybody else going, for a block that `is_coded` or not."""
        if is_coded:
            return 0  # what leaves is larger, and leaves the staging area
        return math.inf if tier is Tier.HOST and self._staging_bytes and self._leaving[tier] else self._leaving[tier]

    def _make_room(
        self, tier: Tier, nbytes: int, tail: BlockKey | None, keys: Sequence[BlockKey], queue: bool = True, shrink: bool = True
    ) -> bool:
        """Have blocks leave the tier, or shrink, for `nbytes`, without `queue` none of them for a lower one; whether any left at once."""
        if nbytes <= 0:
            return False
        blocks_before = self.machine.blocks_by_tier[tier]
        queue_bytes = self._queue_bytes - self._leaving[tier] if queue else 0
        self.handle([ev.Needed(tier, nbytes, tail, keys, self._clock.now_s(), queue_bytes, shrink and queue)])
        return self.machine.blocks_by_tier[tier] < blocks_before

    def _instead(self, tier: Tier, nbytes: int, tail: BlockKey | None, keys: Sequence[BlockKey], deadline_s: float) -> list[int]:
        """Extents of blocks that are given up instead of those on their way to a lower tier that is too slow."""
        offsets: list[int] = []
        while not offsets and self._is_in_time(deadline_s) and self._make_room(tier, len(keys) * nbytes, tail, keys, queue=False):
            offsets = self._mover.reserve(tier, nbytes, len(keys), Room.ANYWHERE)
        return offsets

    def _defragment(
        self, tier: Tier, nbytes: int, tail: BlockKey | None, keys: Sequence[BlockKey], deadline_s: float, gave: bool
    ) -> list[int]:
        """Room was made, but in pieces: give up more blocks until one extent fits, nothing is left to give, or time is up."""
        while gave and not self._leaving[tier] and self._is_in_time(deadline_s):
            gave = self._make_room(tier, nbytes, tail, keys)
            offsets = self._mover.reserve(tier, nbytes, 1, Room.ANYWHERE)
            if offsets:
                return offsets
        return []

    def _is_in_time(self, deadline_s: float) -> bool:
        return self._clock.now_s() <= deadline_s + GIVING_UP_S

    def drain_touches(self) -> None:
        """Tell the machine which blocks the workers have used since the last time; history and policies know all then."""
        with self.lock:
            if not self._closed and (touched := self._index.harvest()):
                self.handle(uses_of(touched, self.machine.blocks, self._clock.now_s()))
            self.machine.catch_up()

    def bring(self, keys: Sequence[BlockKey], wait_s: float) -> None:
        """Have blocks that a worker cannot read where they are in host memory; waits for them at most `wait_s`."""
        with self.lock:
            self.handle([ev.Wanted(keys)])
            self.freed.wait_for(lambda: self._closed or not any(map(self._is_coming, keys)), max(wait_s, 0))

    def _is_coming(self, key: BlockKey) -> bool:
        block = self.machine.blocks.get(key)
        return block is not None and block.copying_to is Tier.HOST

    def settle(self) -> None:
        """Wait until no copy is under way."""
        with self.lock:
            self.freed.wait_for(lambda: not self._batches)

    def close(self) -> None:
        """Finish the copies under way and stop the threads."""
        with self.lock:
            self._closed = True
            self.freed.notify_all()
        for pool in (self._up, *self._down.values(), self._coding, self._demoting):
            pool.shutdown(wait=True)

    def below(self, tier: Tier, call: Callable[[], T]) -> Future[T]:
        """Have `call` run on the one thread that writes to a lower tier, so that no segment goes meanwhile. Raises (kind `closed`)."""
        with self.lock:
            if self._closed:
                raise TieredKVError(Kind.CLOSED, "the node is closing")
            return self._down[tier].submit(call)

    @property
    def is_busy(self) -> bool:
        """Whether copies between tiers are under way."""
        return self._batches > 0

    @property
    def leaving_bytes(self) -> dict[str, int]:
        """By tier: bytes that are on their way from there to a lower tier."""
        return {tier.label: nbytes for tier, nbytes in self._leaving.items()}

    def check(self) -> None:
        """Assert what the machine asserts, and that what is on its way is counted."""
        with self.lock:
            self.machine.check()
            assert all(nbytes >= 0 for nbytes in self._leaving.values())
            assert self._batches or not any(self._leaving.values())

    def _apply(self, instruction: ev.Show | ev.Hide | ev.Free) -> bool:
        """Carry out what takes no time; whether it freed anything."""
        key = instruction.key
        if isinstance(instruction, ev.Show):
            self._index.put(key, instruction.location)
            self.journal[key] = True
            return False
        if isinstance(instruction, ev.Hide):
            self._index.remove(key)
            self.journal[key] = False
            return False
        if self.on_gone and key not in self.machine.blocks:
            self.on_gone(key, instruction.location)
        self._mover.free(instruction.location)
        return True

    # Copies

    def _start(self, copies: list[ev.Copy]) -> None:
        ways: dict[tuple[Tier, Tier], list[ev.Copy]] = {}
        for copy in copies:
            ways.setdefault((copy.source.tier, copy.target), []).append(copy)
        for (source, target), together in ways.items():
            pool, run, batch_bytes = self._up, self._fill, self._mover.batch_bytes(target)
            if target is source:
                pool, run, batch_bytes = self._coding, self._shrink, 1
            elif target not in IN_MEMORY:
                pool, run = self._down[target], self._append
            for batch in _batches(together, batch_bytes):
                self._batches += 1
                if target >= source:
                    if not self._leaving[source]:
                        self._progress_s[source] = self._clock.now_s()
                    self._leaving[source] += _gain(batch)
                if self._closed:
                    self._finish(batch, _failed(batch))
                else:
                    pool.submit(self._guarded, run, batch)

    def _guarded(self, run: Callable[[list[ev.Copy]], None], batch: list[ev.Copy]) -> None:
        """Boundary of the background threads: whatever fails, the sources stay and the machine hears of it."""
        failed: list[ev.CopyFailed] = []
        try:
            run(batch)
        except Exception:
            log.exception("copying %d blocks to %s failed", len(batch), batch[0].target.label)
            failed = _failed(batch)
        self._finish(batch, failed)

    def _finish(self, batch: list[ev.Copy], failed: list[ev.CopyFailed]) -> None:
        with self.lock:
            self._batches -= 1
            if batch[0].target >= batch[0].source.tier:
                self._leaving[batch[0].source.tier] -= _gain(batch)
                self._progress_s[batch[0].source.tier] = self._clock.now_s()
            self.handle(failed)
            self.freed.notify_all()

    def _append(self, batch: list[ev.Copy]) -> None:
        """Into a lower tier; on its one thread, so that no segment goes of whose blocks the machine has not heard."""
        tier = batch[0].target
        coded = list(self._demoting.map(self._mover.coded, batch))
        sizes = [each.nbytes for each in coded if each is not None]
        while (segment := self._mover.segment_to_go(tier, sizes)) is not None:
            self._reclaim(tier, segment)
        locations = self._mover.append(tier, batch, coded)
        self.handle(
            ev.Copied(copy.key, location) if location else ev.CopyFailed(copy.key, tier)
            for copy, location in zip(batch, locations, strict=True)
        )
        self._age(tier, self._mover.segment_to_age(tier))

    def _reclaim(self, tier: Tier, segment: int) -> None:
        """Remove a segment, after what is still wanted of it was written again, and the rest copied down if that is quick."""
        keys = self._mover.keys_in(tier, segment)
        self._age(tier, segment)
        with self.lock:
            self.freed.wait_for(lambda: self._closed or not self._is_leaving(tier, keys), RECLAIM_WAIT_S)
            wanted = self.machine.wanted_in(tier, segment, keys, REINSERT_SHARE * self._mover.segment_bytes(tier))
        moved = self._mover.reinsert(tier, segment, wanted) if wanted else []
        self.handle([*(ev.Moved(key, segment, location) for key, location in moved), ev.Emptied(tier, segment, keys)])
        self._mover.drop_segment(tier, segment)

    def _is_leaving(self, tier: Tier, keys: Iterable[BlockKey]) -> bool:
        """Whether any of the blocks is on its way to a tier below."""
        found = (self.machine.blocks.get(key) for key in keys)
        return any(block is not None and block.copying_to is not None and block.copying_to > tier for block in found)

    def _age(self, tier: Tier, segment: int | None) -> None:
        """Copy the blocks of a segment that will have to go down; not while those of another are on that way."""
        with self.lock:
            if segment is not None and tier is Tier.DISK and Tier.OBJECTS in self.machine.tiers and not self._leaving[tier]:
                self.handle([ev.Aging(tier, segment, self._mover.keys_in(tier, segment))])

    def _fill(self, batch: list[ev.Copy]) -> None:
        """Into memory: as many at a time as there is room for, the first ones of a chain first."""
        rest, target = batch, batch[0].target
        wait_s = WANTED_WAIT_S if batch[0].source.tier in AWAY else 0
        while rest:
            codec, nbytes = form = self._mover.form(rest[0])
            same = [copy for copy in rest if self._mover.form(copy) == form]
            keys = [copy.key for copy in same]
            offsets = self.reserve(nbytes, keys, same[-1].key, wait_s, target, insist=False, is_coded=codec != 0)
            taken = same[: len(offsets)] or same
            if offsets:
                places = zip(taken, offsets, strict=True)
                self._fill_extents(taken, [Location(target, codec, 0, offset, nbytes, copy.source.raw_bytes) for copy, offset in places])
            else:
                self.handle(_failed(taken))
            done = set(map(id, taken))
            rest = [copy for copy in rest if id(copy) not in done]

    def _shrink(self, batch: list[ev.Copy]) -> None:
        """Where they are: each to where coded blocks lie, for which others go if there is no room."""
        for copy in batch:
            tier, coded = copy.target, self._mover.coded(copy)
            if coded is None or coded.nbytes >= copy.source.stored_bytes:
                self.handle([ev.CopyFailed(copy.key, tier, again=False)])
                continue
            offsets = self.reserve(coded.nbytes, [copy.key], copy.key, WANTED_WAIT_S, tier, insist=False, is_coded=True)
            event = ev.Copied(copy.key, self._mover.keep(copy, coded, offsets[0])) if offsets else ev.CopyFailed(copy.key, tier)
            self.handle([event])

    def _fill_extents(self, batch: list[ev.Copy], locations: list[Location]) -> None:
        outcomes: list[Filled] = []
        try:
            outcomes = self._mover.fill(batch, locations)
        finally:
            with self.lock:
                outcomes += [Filled.LATER] * (len(batch) - len(outcomes))
                for copy, location, outcome in reversed(list(zip(batch, locations, outcomes, strict=True))):
                    self._filled(copy, location, outcome)  # the deepest first: it goes first
                self.freed.notify_all()

    def _filled(self, copy: ev.Copy, location: Location, outcome: Filled) -> None:
        if outcome is Filled.DONE:
            self.handle([ev.Copied(copy.key, location)])
            return
        self._mover.free(location)
        self.handle([ev.CopyFailed(copy.key, copy.target)])
        if outcome is Filled.GONE and copy.source.tier not in IN_MEMORY:
            self.handle([ev.Lost(copy.key, copy.source)])


def _failed(batch: list[ev.Copy]) -> list[ev.CopyFailed]:
    return [ev.CopyFailed(copy.key, copy.target, again=False) for copy in batch]


def _gain(batch: list[ev.Copy]) -> int:
    return sum(copy.gain for copy in batch)


def _batches(copies: list[ev.Copy], batch_bytes: int) -> Iterable[list[ev.Copy]]:
    """Runs of copies of about `batch_bytes` each: enough for one write, small enough to free room early."""
    batch: list[ev.Copy] = []
    nbytes = 0
    for copy in copies:
        batch.append(copy)
        nbytes += copy.source.stored_bytes
        if nbytes >= batch_bytes:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
