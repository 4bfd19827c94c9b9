"""A node's part in restoring a checkpoint: its share of the blocks, shown at once where they lie, and brought nearer in the background.

A mounted block is a hit from then on: it is read from its pack when somebody wants it. Filling copies blocks, in the order in
which they were told (the hottest first), to host memory and then to disk until these are as full as they may be; nothing that is
there already has to go for it.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs.frame import Frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.reshard import Made, Maker
from tiered_kv.node.checkpoints.writer import Pace, ended, stand_back
from tiered_kv.node.compression import BlockData
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.store import events as ev
from tiered_kv.store.engine import Room
from tiered_kv.threads import DaemonThreads
from tiered_kv.tiers.host import Lineage
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objects.mounted import READ_BYTES, MountedBlock, Run, runs_of
from tiered_kv.tiers.objects.open_store import open_store

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

log = logging.getLogger(__name__)

FILLED_SHARE = 7 / 8
"""Of a tier that is filled; the rest is for what workers store."""
INDEX_SHARE = 7 / 8  # of the index that may show blocks after a mount
_EVENTS_AT_ONCE = 500  # with the engine's lock held: under 5 ms
_SHOWN_AT_ONCE = 16  # in memory, where a policy hears of them
_WINDOW_BYTES, _WINDOW_SHARE = 64 << 20, 1 / 16  # of host: blocks in their order, within which those of one pack are read together
READS_AHEAD = 4
_PROBLEMS_KEPT = 100

Source = Frame | TieredKVError
Placed = tuple[MountedBlock, Frame, Location]


class Shelf(NamedTuple):
    """How much of a checkpoint a node can take: bytes in host memory and on disk, and blocks that its index can show."""

    host_bytes: int
    disk_bytes: int
    blocks: int


class Filled(NamedTuple):
    """How filling goes: blocks mounted, of which copied to host memory and disk by now, and bytes read.

    `problems`: what is wrong with blocks that could not be restored, `damaged` of them in all. `error`: what ended it too early.
    `too_lossy`: blocks that may not be shown, for they carry more error than the settings allow.
    """

    mounted: int
    host: int
    disk: int
    nbytes: int
    damaged: int
    problems: list[str]
    is_done: bool
    error: TieredKVError | None = None
    too_lossy: int = 0


class Work(NamedTuple):
    """Blocks that are had together, and by which call: for each its frame, or what is wrong with it."""

    blocks: list[MountedBlock]
    nbytes: int
    read: Callable[[], list[Source]]


@dataclass
class _Job:
    """The filling from one mount, or with blocks that are made."""

    blocks: Sequence[MountedBlock]
    work: Iterable[Work] = ()
    host: list[BlockKey] = field(default_factory=list)
    disk: int = 0
    nbytes: int = 0
    damaged: int = 0
    too_lossy: int = 0
    problems: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    done: Future | None = None


class Filling:
    """Mounts blocks of checkpoints on one node, and fills its tiers from them, one mount at a time."""

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._place = node.storage
        self._thread = DaemonThreads(1, "tkv-fill", stand_back)  # starts none before it is used
        self._copying = DaemonThreads(node.config.io_threads, "tkv-fill", stand_back)
        """What takes longest: memory that nobody has touched yet is made by the system a page at a time."""
        self._lock = threading.Lock()
        self._job: _Job | None = None
        self.models: dict[BlockKey, dict] = {}
        """By root what the checkpoints said of models (`ModelFacts.as_message`); workers say it again when they attach."""

    def steps(self) -> dict[str, Callable[..., object]]:
        """Returns the steps of restoring a checkpoint, by the names under which a command calls them."""
        return {
            "shelf": self.shelf,
            "mount": self.mount,
            "fill": self.fill,
            "make": self.make,
            "filled": self.filled,
            "stop_filling": self.stop,
        }

    def shelf(self) -> Shelf:
        """What there is room for now."""
        with self._node.running():
            host, disk = self._place.host, self._place.disk
            index = self._place.index
            host_bytes = int(host.capacity_bytes * FILLED_SHARE) - host.used_bytes
            disk_bytes = int(disk.capacity_bytes * FILLED_SHARE) - disk.used_bytes if disk else 0
            return Shelf(max(host_bytes, 0), max(disk_bytes, 0), max(int(index.capacity_blocks * INDEX_SHARE) - len(index), 0))

    def mount(
        self,
        url: str,
        packs: Sequence[str],
        blocks: Sequence[MountedBlock],
        models: Mapping[BlockKey, dict] = MappingProxyType({}),
        environ: Mapping[str, str] | None = None,
    ) -> int:
        """Show these blocks of the packs at `url`, the hottest first and each behind its parent; how many are shown.

        The others are too lossy (`filled` says how many) or found no room in the index.

        `location.segment` of a block counts in `packs`. `models`: what is known of those whose blocks they are. `environ`:
        credentials of who wants it. Opening makes no request. Raises (kinds `config`, `storage`).
        """
        with self._lock:
            self._must_be_idle()
            store = open_store(url, setting="url", create=False, environ=environ or None)
            first = self._place.mounted.mount(store, packs)
            self.models |= models
            room, shown = self.shelf().blocks, []
            admits = self._place.allowance.admits
            allowed = [each for each in blocks if admits(each.key, each.root, each.location.codec, None)]
            too_lossy = len(blocks) - len(allowed)
            self._place.allowance.refuse(Tier.CHECKPOINT.label, too_lossy)
            for start in range(0, len(allowed), _EVENTS_AT_ONCE):
                with self._node.running():
                    known = self._node.engine.machine.blocks
                    events = []
                    for each in allowed[start : start + _EVENTS_AT_ONCE]:
                        room -= each.key not in known
                        if room < 0:
                            break
                        block = each._replace(location=each.location._replace(tier=Tier.CHECKPOINT, segment=first + each.location.segment))
                        self._place.mounted.hold(block.location.stored_bytes)
                        events.append(ev.Recovered(block.key, block.parent, block.root, block.location, block.depth, block.uses))
                        shown.append(block)
                    self._node.engine.handle(events)
                if room < 0:
                    break
            self._job = _Job(shown, self._reading(shown), too_lossy=too_lossy)
        self._node.report()
        return len(shown)

    def fill(self, max_rate: float | None = None) -> None:
        """Begin to copy what was mounted last nearer; `max_rate`: bytes a second at most. How it goes is asked by `filled`."""
        with self._lock:
            job = self._job
            if job is None or job.done is not None:
                raise TieredKVError(Kind.STORAGE, "nothing was mounted that could be brought nearer")
            job.done = self._thread.submit(self._run, job, max_rate)

    def make(
        self,
        url: str,
        packs: Sequence[str],
        blocks: Sequence[Made],
        max_rate: float | None = None,
        models: Mapping[BlockKey, dict] = MappingProxyType({}),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Begin to make blocks of those of other ranks, in the packs at `url`, and to put them into host memory and then to disk.

        What finds no room there is left out. `environ`: as that of `mount`. How it goes is asked by `filled`.
        """
        with self._lock:
            self._must_be_idle()
            store = open_store(url, setting="url", create=False, environ=environ or None)
            self.models |= models
            maker = Maker(self._place.mounted, self._place.mounted.mount(store, packs))
            job = self._job = _Job([each.block for each in blocks], (Work(*each) for each in maker.work(blocks, self._is_unknown)))
            job.done = self._thread.submit(self._run, job, max_rate)

    def filled(self) -> Filled:
        """How it goes; zeros where nothing was mounted."""
        job = self._job or _Job([])
        is_done, error = ended(job.done, "filling") if job.done is not None else (True, None)
        return Filled(len(job.blocks), len(job.host), job.disk, job.nbytes, job.damaged, list(job.problems), is_done, error, job.too_lossy)

    def stats(self) -> dict | None:
        """How it goes, in blocks, ready for JSON; None where nothing was restored."""
        if self._job is None:
            return None
        told = self.filled()
        error = str(told.error) if told.error else None
        nearer = told.host + told.disk
        figures = {"blocks": told.mounted, "nearer": nearer, "damaged": told.damaged, "too_lossy": told.too_lossy}
        return figures | {"is_done": told.is_done, "error": error}

    def stop(self) -> None:
        """End the filling; what is mounted stays so. Returns when no more is read."""
        job = self._job
        if job is not None and job.done is not None:
            job.stopping.set()
            wait([job.done])  # however it ends: `filled` tells

    def close(self) -> None:
        """Stop, and end the thread."""
        self.stop()
        self._thread.shutdown()
        self._copying.shutdown()

    def _must_be_idle(self) -> None:
        if self._job is not None and self._job.done is not None and not self._job.done.done():
            raise TieredKVError(Kind.STORAGE, "this node is still being filled from another checkpoint; try again when it is done")

    # Filling, on the thread

    def _run(self, job: _Job, max_rate: float | None) -> None:
        pace = Pace(max_rate)
        work = iter(job.work)
        threads = DaemonThreads(READS_AHEAD, "tkv-fill", stand_back)
        ahead: deque[tuple[Work, Future]] = deque()
        with threads, closing(self._node.open_session()) as session:
            try:
                while not job.stopping.is_set():
                    for each in islice(work, READS_AHEAD - len(ahead)):
                        pace.spend(each.nbytes, job.stopping)
                        ahead.append((each, threads.submit(each.read)))
                    if not ahead or not self._taken(job, session, *ahead.popleft()):
                        break
            finally:
                for _, future in ahead:
                    future.cancel()
        self._node.engine.handle([ev.Ranked(job.host[::-1])])  # the first that came are the hottest, not the oldest

    def _reading(self, blocks: Sequence[MountedBlock]) -> Iterator[Work]:
        """Blocks that are mounted, those of one pack together."""
        most_bytes = int(min(_WINDOW_BYTES, self._node.config.host * _WINDOW_SHARE))
        for window in _windows(blocks, most_bytes):
            for run in runs_of(filter(self._is_far, window), min(READ_BYTES, most_bytes)):
                yield Work(run.blocks, run.nbytes, partial(self._read, run))

    def _read(self, run: Run) -> list[Source]:
        """The frames of a run; block by block where all of it at once takes too long, as on a slow link."""
        try:
            return self._place.mounted.read_run(run)
        except TieredKVError as error:
            if len(run.blocks) == 1 or error.kind is not Kind.STORAGE or error.context.get("missing"):
                raise
            log.info("a range of %d bytes is read in pieces: %s", run.nbytes, str(error))
        return [source for each in runs_of(run.blocks, 1) for source in self._place.mounted.read_run(each)]

    def _is_unknown(self, key: BlockKey) -> bool:
        return key not in self._node.engine.machine.blocks

    def _is_far(self, block: MountedBlock) -> bool:
        """Whether the block is still shown, and nowhere nearer."""
        known = self._node.engine.machine.blocks.get(block.key)
        return known is not None and known.best == block.location

    def _taken(self, job: _Job, session: NodeSession, work: Work, reading: Future) -> bool:
        """Put blocks where there is room; False when there is none any more."""
        try:
            sources: list[Source] = reading.result()
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            sources = [error] * len(work.blocks)
        job.nbytes += work.nbytes
        good = []
        for block, source in zip(work.blocks, sources, strict=True):
            if isinstance(source, TieredKVError):
                self._refused(job, block, source)
            elif not self._place.allowance.admits(block.key, block.root, source.codec.id, source.error):
                self._too_lossy(job, block)
            else:
                good.append((block, source))
        rest = self._to_host(job, session, good)
        return not rest or self._to_disk(job, rest)

    def _refused(self, job: _Job, block: MountedBlock, error: TieredKVError) -> None:
        job.damaged += 1
        message = f"block {block.key.hex()} is not restored: {error}"
        log.warning("%s", message)
        if len(job.problems) < _PROBLEMS_KEPT:
            job.problems.append(message)
        self._node.engine.handle([ev.Lost(block.key, block.location)])

    def _too_lossy(self, job: _Job, block: MountedBlock) -> None:
        """A block that was mounted before anybody knew what it carries is not shown any more."""
        job.too_lossy += 1
        self._place.allowance.refuse(Tier.CHECKPOINT.label, 1)
        self._node.engine.handle([ev.Lost(block.key, block.location)])

    def _to_host(self, job: _Job, session: NodeSession, blocks: list[tuple[MountedBlock, Frame]]) -> list[tuple[MountedBlock, Frame]]:
        """Copy blocks to host memory as long as nothing has to go for them, side by side; those that found no room."""
        locations = self._reserved(session, blocks)
        placed = [(block, frame, location) for (block, frame), location in zip(blocks, locations, strict=False)]
        share = -(-len(placed) // self._node.config.io_threads) or 1
        parts = [placed[start : start + share] for start in range(0, len(placed), share)]
        errors = list(chain.from_iterable(self._copying.map(lambda part: list(map(self._put, part)), parts)))
        outcomes = list(zip(placed, errors, strict=True))
        for start in range(0, len(outcomes), _SHOWN_AT_ONCE):
            self._show(job, session, outcomes[start : start + _SHOWN_AT_ONCE])
        for (block, _, location), error in outcomes:
            if error is not None:
                session.release([location.offset])
                self._refused(job, block, error)
        return blocks[len(placed) :]

    def _show(self, job: _Job, session: NodeSession, outcomes: Sequence[tuple[Placed, TieredKVError | None]]) -> None:
        """Let blocks that lie in host memory now be hits there."""
        events = []
        with self._node.running():
            for (block, _, location), error in outcomes:
                if error is None:
                    del session.reserved[location.offset]
                    events.append(ev.Recovered(block.key, block.parent, block.root, location, block.depth, block.uses))
                    job.host.append(block.key)
            self._node.engine.handle(events)

    def _put(self, placed: Placed) -> TieredKVError | None:
        """Write a block to its extent; what is wrong with it if it cannot be decoded."""
        block, frame, location = placed
        try:
            self._place.put(BlockData.of(frame), location, Lineage(block.key, block.parent, block.root, block.depth))
        except TieredKVError as error:
            return TieredKVError(error.kind, str(error))  # the error itself holds on to the arena
        return None

    def _reserved(self, session: NodeSession, blocks: list[tuple[MountedBlock, Frame]]) -> list[Location]:
        """Extents that are free, for the first of the blocks."""
        host, locations = self._place.host, []
        with self._node.running():
            for block, frame in blocks:
                form = self._place.form_of(frame, block.root)
                if host.used_bytes + form.nbytes > host.capacity_bytes * FILLED_SHARE:
                    break
                offsets = self._place.reserve(Tier.HOST, form.nbytes, 1, Room.APART if form.codec else Room.STAGING)
                if not offsets:
                    break
                session.reserved[offsets[0]] = form.nbytes
                locations.append(Location(Tier.HOST, form.codec, 0, offsets[0], form.nbytes, frame.raw_bytes))
        return locations

    def _to_disk(self, job: _Job, blocks: list[tuple[MountedBlock, Frame]]) -> bool:
        """Append blocks to the disk tier; False where it has no room for all of them without giving up others."""
        if self._place.disk is None:
            return False
        records = [Record(block.key, frame.pieces, frame.codec.id, frame.raw_bytes, block.parent, block.root) for block, frame in blocks]
        placed = self._node.engine.below(Tier.DISK, lambda: self._append(blocks, records)).result()
        job.disk += placed
        return placed == len(blocks)

    def _append(self, blocks: list[tuple[MountedBlock, Frame]], records: list[Record]) -> int:
        disk = self._place.disk
        nbytes = sum(frame.nbytes for _, frame in blocks)
        if disk.used_bytes + nbytes > disk.capacity_bytes * FILLED_SHARE or disk.needs_reclaim(nbytes, len(blocks)) is not None:
            return 0
        answers = disk.append(records)
        self._node.engine.handle(
            ev.Recovered(block.key, block.parent, block.root, answer.location, block.depth, block.uses)
            for (block, _), answer in zip(blocks, answers, strict=True)
            if answer.location is not None
        )
        return sum(answer.location is not None for answer in answers)


def _windows(blocks: Sequence[MountedBlock], most_bytes: float) -> Iterator[list[MountedBlock]]:
    """The blocks in their order, some at a time; those of one pack that stand together stay so."""
    window, nbytes = [], 0
    for block in blocks:
        if nbytes >= most_bytes and block.location.segment != window[-1].location.segment:
            yield window
            window, nbytes = [], 0
        window.append(block)
        nbytes += block.location.stored_bytes
    if window:
        yield window
