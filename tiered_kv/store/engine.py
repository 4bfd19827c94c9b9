"""The engine carries out what the machine decides, with bounded threads, under one lock.

The instructions Show, Hide and Free are carried out at once, in the machine's order. Copies between tiers run without the lock.
Copies into memory use `io_threads` threads; each lower tier has one thread of its own, so a slow disk delays only itself.
`io_threads` threads encode blocks for a lower tier, and as many compress blocks in place. The outcome of a copy is reported to
the machine as an event. The condition `freed` wakes threads that wait for room or for a block.
"""

import logging
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
from tiered_kv.store.batches import Reservation, batches, failures, gain_bytes
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
"""Share of a tier that may be queued for a lower tier. Further blocks are dropped instead of copied."""
RECLAIM_WAIT_S = 1.0  # wait for the blocks of a removed segment to be copied down; blocks only that tier's thread
WANTED_WAIT_S = 0.25  # wait for room for blocks that a worker asked for; occupies one of the threads that copy into memory
GIVING_UP_S = 0.01
"""How long after its deadline a store may go on evicting blocks one by one until an extent is large enough."""
IN_MEMORY = ev.IN_MEMORY


class Index(Protocol):
    """The table in which readers look up the location of a block."""

    def put(self, key: BlockKey, location: Location) -> object: ...
    def remove(self, key: BlockKey) -> object: ...
    def harvest(self) -> list[tuple[BlockKey, int, int]]: ...


class FillOutcome(Enum):
    """The outcome of copying a block into memory."""

    DONE = "done"
    GONE = "gone"  # the source is damaged or missing
    LATER = "later"  # the source is unreachable now


class Room(Enum):
    """The region of a tier in memory from which to reserve an extent. In a tier without a codec, all regions are the same."""

    STAGING = "staging"  # uncompressed blocks: prefer the staging area, or anywhere while there is plenty of room
    COMPRESSED = "compressed"  # compressed blocks: keep them together
    ANYWHERE = "anywhere"  # a store that cannot wait


class BlockFormat(NamedTuple):
    """The form of a block in a tier in memory: the id of its codec, and its number of bytes."""

    codec: int
    nbytes: int


class EncodedBlock(Protocol):
    """A block encoded for its target tier. The engine reads only its size."""

    @property
    def nbytes(self) -> int: ...


class Mover(Protocol):
    """Moves the bytes of blocks between tiers for the engine. It knows frames, codecs and tiers, and decides nothing."""

    def fits(self, tier: Tier, nbytes: int) -> bool:
        """Returns whether a tier in memory could hold a block of `nbytes` if the tier were empty."""

    def reserve(self, tier: Tier, nbytes: int, count: int, room: Room) -> list[int]:
        """Reserve up to `count` extents of `nbytes` in a tier in memory, at most one for `Room.COMPRESSED`. Returns their offsets."""

    def free(self, location: Location) -> None:
        """Free the bytes of one copy or of a reserved extent."""

    def form(self, copy: ev.Copy) -> BlockFormat:
        """Returns the block format (codec and size) that the copied block will have in its target, a tier in memory."""

    def fill(self, copies: Sequence[ev.Copy], locations: Sequence[Location]) -> list[FillOutcome]:
        """Read blocks of one source tier into reserved extents of one tier in memory. Returns the outcome of each.

        The extents have the sizes that `form` returned.
        """

    def coded(self, copy: ev.Copy) -> EncodedBlock | None:
        """Encode a block for the tier that it is copied to. Returns None if the block cannot be read. Slow; called by several threads."""

    def settle_in(self) -> None:
        """Prepare the calling thread for calls of `coded`. Each thread that will make such calls calls this once, at its start."""

    def keep(self, copy: ev.Copy, coded: EncodedBlock, offset: int) -> Location:
        """Write an encoded block into a reserved extent of host memory. Returns its location."""

    def append(self, tier: Tier, copies: Sequence[ev.Copy], coded: Sequence[EncodedBlock | None]) -> list[Location | None]:
        """Write encoded blocks to a lower tier. Returns the location of each, None for a block that was not written."""

    def batch_bytes(self, tier: Tier) -> int:
        """Returns how many bytes to write to `tier` at once."""

    def segment_to_go(self, tier: Tier, sizes: Sequence[int]) -> int | None:
        """Returns the segment to remove before blocks of these sizes can be written, None if there is room or no segment can be removed."""

    def segment_to_age(self, tier: Tier) -> int | None:
        """Returns the segment that will be removed next, or None while the tier is not nearly full."""

    def keys_in(self, tier: Tier, segment: int) -> list[BlockKey]:
        """Returns the keys of the blocks in a segment."""

    def segment_bytes(self, tier: Tier) -> int:
        """Returns the approximate size of a segment of the tier."""

    def reinsert(self, tier: Tier, segment: int, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, Location]]:
        """Rewrite blocks of a segment about to be removed into the newest segment. Returns the rewritten keys with new locations."""

    def drop_segment(self, tier: Tier, segment: int) -> None:
        """Remove a segment, after the machine has forgotten all copies in it."""


class Engine:
    """One node's store: keeps machine, index and tiers consistent. Thread-safe."""

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
        """Keys that became visible (True) or invisible (False) since the journal was last emptied."""
        self.on_gone: Callable[[BlockKey, Location], None] | None = None
        """Called with the lock held before the last copy of a block is freed."""
        self.on_batch: Callable[[ev.Copy, float], None] = lambda copy, seconds: None
        """Called with one copy of each batch that has ended, and with the batch's duration."""
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
        """By tier: bytes that copies to a lower tier, or in-place compression, will free."""
        self._progress_s: dict[Tier, float] = {}
        """By tier: when one of the copies counted in `_leaving` last ended, or the first of them began."""
        self._batches, self._closed = 0, False

    def handle(self, events: Iterable[ev.Event]) -> None:
        """Pass events to the store machine in order, and carry out the instructions that it returns."""
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
        last_block: BlockKey | None,
        wait_s: float,
        tier: Tier = Tier.HOST,
        *,
        insist: bool = True,
        is_coded: bool = False,
        tenant: str = "",
    ) -> list[int]:
        """Reserve extents of `nbytes` for the first of the new blocks `keys`. Returns their offsets.

        Evicts other blocks if there is too little room, and waits at most `wait_s` for the first extent. `last_block` is a
        block of the chain of `keys`; it and its ancestors are evicted last. If it returns fewer offsets than keys, there is no
        more room now: write and commit these blocks, then reserve again. Returns [] if no room appeared in time. With `insist`,
        if a lower tier has taken nothing for `wait_s`, drops other blocks instead of waiting for it. If host memory has a
        staging area, reserves no more than its size at a time. `is_coded`: the new blocks are already encoded; then no block is
        compressed in place to make room for them. `tenant`: whose quota applies. If the new blocks would exceed it, blocks of
        this tenant are evicted.
        """
        if not self._mover.fits(tier, nbytes):
            return []  # evicting other blocks would not help
        if self._staging_bytes and tier is Tier.HOST:
            keys = keys[: max(self._staging_bytes // nbytes, 1)]
        with self.lock:
            quotas = self.machine.quotas
            if lacking := quotas.lacking(tenant, tier, nbytes * len(keys)):
                self.drain_touches()
                self.handle([ev.Limited(tenant, tier, lacking, last_block, self._clock.now_s())])
                keys = keys[: quotas.fitting(tenant, tier, nbytes)]
            offsets = self._mover.reserve(tier, nbytes, len(keys), _room(is_coded)) if keys else []
            if len(offsets) == len(keys):
                return offsets
            self.drain_touches()  # so that eviction knows the latest uses
            request = Reservation(tier, nbytes, keys, last_block, is_coded, self._clock.now_s() + wait_s)
            return self._reserve_and_evict(request, offsets, wait_s, insist)

    def _reserve_and_evict(self, request: Reservation, offsets: list[int], wait_s: float, insist: bool) -> list[int]:
        """Evict blocks and wait until at least one extent is reserved. `offsets`: extents that were free at once."""
        tier = request.tier
        while not self._closed:
            missing = len(request.keys) - len(offsets)
            evicted = self._evict(request, self._bytes_to_evict(request, missing), shrink=not request.is_coded)
            offsets += self._mover.reserve(tier, request.nbytes, missing, _room(request.is_coded))
            if offsets:
                return offsets
            if not self._leaving[tier]:  # no copy to wait for: room is in pieces, or there is none
                return self._reserve_by_defragmenting(request, evicted)
            left_s = min(request.deadline_s, self._stalled_at_s(request, wait_s)) - self._clock.now_s()
            if left_s <= 0:
                return self._reserve_by_dropping(request) if insist and wait_s else []
            self.freed.wait(left_s)
            offsets = self._mover.reserve(tier, request.nbytes, len(request.keys), _room(request.is_coded))
            if offsets:  # enough to go on with, without evicting more blocks
                return offsets
        return offsets

    def _bytes_to_evict(self, request: Reservation, count: int) -> int:
        """Returns how many bytes to evict for `count` extents, beyond the bytes that copies to a lower tier will free anyway."""
        leaving_bytes = self._leaving[request.tier]
        if request.is_coded:
            return count * request.nbytes  # leaving blocks are larger, and free the staging area only
        if request.tier is Tier.HOST and self._staging_bytes and leaving_bytes:
            return 0  # one batch at a time: wait for the blocks that leave now
        return count * request.nbytes - leaving_bytes

    def _stalled_at_s(self, request: Reservation, wait_s: float) -> float:
        """Returns when the lower tier will count as stalled: `wait_s` after a copy to it last ended, or the first copy began."""
        return self._progress_s.get(request.tier, request.deadline_s) + wait_s

    def _evict(self, request: Reservation, nbytes: int, *, demote: bool = True, shrink: bool) -> bool:
        """Evict blocks, or compress them in place, to free `nbytes`. Returns whether any block left the tier at once.

        `demote`: whether blocks may be copied to a lower tier first; they leave once the copy is complete. `shrink`: whether
        blocks may be compressed.
        """
        if nbytes <= 0:
            return False
        tier = request.tier
        blocks_before = self.machine.blocks_by_tier[tier]
        queue_bytes = self._queue_bytes - self._leaving[tier] if demote else 0
        self.handle([ev.Needed(tier, nbytes, request.last_block, request.keys, self._clock.now_s(), queue_bytes, shrink)])
        return self.machine.blocks_by_tier[tier] < blocks_before

    def _reserve_by_dropping(self, request: Reservation) -> list[int]:
        """Drop blocks that are not being copied to the lower tier, because that tier has stalled. Returns the reserved offsets."""
        offsets: list[int] = []
        count = len(request.keys)
        while not offsets and self._is_in_time(request) and self._evict(request, count * request.nbytes, demote=False, shrink=False):
            offsets = self._mover.reserve(request.tier, request.nbytes, count, Room.ANYWHERE)
        return offsets

    def _reserve_by_defragmenting(self, request: Reservation, evicted: bool) -> list[int]:
        """Evict more blocks until one extent fits, because free room is in pieces. Returns its offset, [] if that is impossible in time."""
        while evicted and not self._leaving[request.tier] and self._is_in_time(request):
            evicted = self._evict(request, request.nbytes, shrink=True)
            offsets = self._mover.reserve(request.tier, request.nbytes, 1, Room.ANYWHERE)
            if offsets:
                return offsets
        return []

    def _is_in_time(self, request: Reservation) -> bool:
        return self._clock.now_s() <= request.deadline_s + GIVING_UP_S

    def drain_touches(self) -> None:
        """Report to the machine which blocks workers have used since the last call, so that it updates history and policies."""
        with self.lock:
            self.note_touches()
            self.machine.report_commits()

    def note_touches(self) -> None:
        """Do the same as `drain_touches`, but report commits to the policy only if some blocks were used. The caller holds the lock."""
        if not self._closed and (touched := self._index.harvest()):
            self.handle(uses_of(touched, self.machine.blocks, self._clock.now_s()))

    def bring(self, keys: Sequence[BlockKey], wait_s: float) -> None:
        """Copy blocks that workers cannot read directly (see `BringRequested`) into host memory. Waits for them at most `wait_s`."""
        with self.lock:
            self.handle([ev.BringRequested(keys)])
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
        """Run `call` on the thread that writes to a lower tier: no segment is removed meanwhile. Raises (kind `closed`) after `close`."""
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
        """The bytes that copies to a lower tier or compression in place will free, by name of the tier."""
        return {tier.label: nbytes for tier, nbytes in self._leaving.items()}

    def check(self) -> None:
        """Assert that the store machine's invariants hold, and that copies under way are counted correctly."""
        with self.lock:
            self.machine.check()
            assert all(nbytes >= 0 for nbytes in self._leaving.values())
            assert self._batches or not any(self._leaving.values())

    def _apply(self, instruction: ev.Show | ev.Hide | ev.Free) -> bool:
        """Carry out an instruction that only changes the index or frees bytes. Returns whether it freed bytes."""
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
            for batch in batches(together, batch_bytes):
                self._batches += 1
                if target >= source:
                    if not self._leaving[source]:
                        self._progress_s[source] = self._clock.now_s()
                    self._leaving[source] += gain_bytes(batch)
                if self._closed:
                    self._finish(batch, failures(batch))
                else:
                    pool.submit(self._guarded, run, batch)

    def _guarded(self, run: Callable[[list[ev.Copy]], None], batch: list[ev.Copy]) -> None:
        """Run a batch on a background thread. If it raises, the blocks stay where they are, and the machine learns which copies failed."""
        failed, begun_s = list[ev.CopyFailed](), self._clock.now_s()
        try:
            run(batch)
        except Exception:
            log.exception("copying %d blocks to %s failed", len(batch), batch[0].target.label)
            failed = failures(batch)
        self.on_batch(batch[0], self._clock.now_s() - begun_s)
        self._finish(batch, failed)

    def _finish(self, batch: list[ev.Copy], failed: list[ev.CopyFailed]) -> None:
        with self.lock:
            self._batches -= 1
            if batch[0].target >= batch[0].source.tier:
                self._leaving[batch[0].source.tier] -= gain_bytes(batch)
                self._progress_s[batch[0].source.tier] = self._clock.now_s()
            self.handle(failed)
            self.freed.notify_all()

    def _append(self, batch: list[ev.Copy]) -> None:
        """Copy a batch into a lower tier. Runs on its one thread, so that no segment is removed before its blocks are reported."""
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
        """Remove a segment. First copy its blocks to a lower tier if that ends within RECLAIM_WAIT_S, and rewrite those worth keeping."""
        keys = self._mover.keys_in(tier, segment)
        self._age(tier, segment)
        with self.lock:
            self.freed.wait_for(lambda: self._closed or not self._is_leaving(tier, keys), RECLAIM_WAIT_S)
            to_reinsert = self.machine.wanted_in(tier, segment, keys, REINSERT_SHARE * self._mover.segment_bytes(tier))
        moved = self._mover.reinsert(tier, segment, to_reinsert) if to_reinsert else []
        self.handle([*(ev.Moved(key, segment, location) for key, location in moved), ev.Emptied(tier, segment, keys)])
        self._mover.drop_segment(tier, segment)

    def _is_leaving(self, tier: Tier, keys: Iterable[BlockKey]) -> bool:
        """Returns whether any of the blocks is being copied to a lower tier."""
        found = (self.machine.blocks.get(key) for key in keys)
        return any(block is not None and block.copying_to is not None and block.copying_to > tier for block in found)

    def _age(self, tier: Tier, segment: int | None) -> None:
        """Copy the blocks of a segment that will be removed soon to the objects tier, unless another segment's blocks are being copied."""
        with self.lock:
            if segment is not None and tier is Tier.DISK and Tier.OBJECTS in self.machine.tiers and not self._leaving[tier]:
                self.handle([ev.Aging(tier, segment, self._mover.keys_in(tier, segment))])

    def _fill(self, batch: list[ev.Copy]) -> None:
        """Copy a batch into memory, as many blocks at a time as there is room for, ancestors first."""
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
                self.handle(failures(taken))
            done = set(map(id, taken))
            rest = [copy for copy in rest if id(copy) not in done]

    def _shrink(self, batch: list[ev.Copy]) -> None:
        """Compress blocks of host memory, each into the region of compressed blocks. Evicts other blocks if there is no room."""
        for copy in batch:
            tier, coded = copy.target, self._mover.coded(copy)
            if coded is None or coded.nbytes >= copy.source.stored_bytes:
                self.handle([ev.CopyFailed(copy.key, tier, again=False)])
                continue
            offsets = self.reserve(coded.nbytes, [copy.key], copy.key, WANTED_WAIT_S, tier, insist=False, is_coded=True)
            event = ev.Copied(copy.key, self._mover.keep(copy, coded, offsets[0])) if offsets else ev.CopyFailed(copy.key, tier)
            self.handle([event])

    def _fill_extents(self, batch: list[ev.Copy], locations: list[Location]) -> None:
        outcomes: list[FillOutcome] = []
        try:
            outcomes = self._mover.fill(batch, locations)
        finally:
            with self.lock:
                outcomes += [FillOutcome.LATER] * (len(batch) - len(outcomes))
                for copy, location, outcome in reversed(list(zip(batch, locations, outcomes, strict=True))):
                    self._filled(copy, location, outcome)  # the deepest first, so that it is evicted first
                self.freed.notify_all()

    def _filled(self, copy: ev.Copy, location: Location, outcome: FillOutcome) -> None:
        if outcome is FillOutcome.DONE:
            self.handle([ev.Copied(copy.key, location)])
            return
        self._mover.free(location)
        self.handle([ev.CopyFailed(copy.key, copy.target)])
        if outcome is FillOutcome.GONE and copy.source.tier not in IN_MEMORY:
            self.handle([ev.Lost(copy.key, copy.source)])


def _room(is_coded: bool) -> Room:
    return Room.COMPRESSED if is_coded else Room.STAGING
