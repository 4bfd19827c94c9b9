"""A node's part in restoring a checkpoint: mounts its share of the blocks, and loads them in the background.

A mounted block is a hit at once: it is read from its pack on demand. Loading copies the mounted blocks, hottest first, to host
memory and then to disk, until each is filled to `FILLED_SHARE`. It evicts nothing.
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
from typing import Any, NamedTuple

from tiered_kv.blocks import GoneCause, Location, Tier
from tiered_kv.codecs.frame import Frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.host import CheckpointHost
from tiered_kv.node.checkpoints.reshard import Resharder
from tiered_kv.node.checkpoints.steps import (
    LoadCapacity,
    LoadProgress,
    MountRequest,
    ReshardRequest,
)
from tiered_kv.node.checkpoints.writer import Pace, outcome_of, stand_back
from tiered_kv.node.compression import BlockData
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.protocol.messages import LoadStats
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.store import events as ev
from tiered_kv.store.engine import Room
from tiered_kv.threads import DaemonThreads
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objects.mounted import READ_BYTES, MountedBlock, PackRange, runs_of
from tiered_kv.tiers.objects.open_store import open_store

log = logging.getLogger(__name__)

FILLED_SHARE = 7 / 8
"""The largest share of a tier that loading fills. The rest is for blocks that workers store."""
INDEX_SHARE = 7 / 8  # of the index that may be in use after a mount
_EVENTS_AT_ONCE = 500  # with the engine's lock held: under 5 ms
_SHOWN_AT_ONCE = 16  # in memory, where each block is also added to a policy
_WINDOW_BYTES, _WINDOW_SHARE = 64 << 20, 1 / 16  # (share of host) within this many bytes of blocks, those of one pack are read together
READS_AHEAD = 4
_PROBLEMS_KEPT = 100

Source = Frame | TieredKVError
"""A block's frame, or the error if it is damaged or missing."""
_Placed = tuple[MountedBlock, Frame, Location]


class _LoadBatch(NamedTuple):
    """Blocks that are read together. `read`: returns the frame of each block, or its error."""

    blocks: list[MountedBlock]
    nbytes: int
    read: Callable[[], list[Source]]


@dataclass
class _LoadJob:
    """The loading of one mount, or of resharded blocks."""

    blocks: Sequence[MountedBlock]
    batches: Iterable[_LoadBatch] = ()
    host: list[BlockKey] = field(default_factory=list)
    disk: int = 0
    nbytes: int = 0
    damaged: int = 0
    too_lossy: int = 0
    problems: list[str] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    done: Future[None] | None = None


class CheckpointLoader:
    """Mounts blocks of checkpoints on one node, and loads them into its tiers, one mount at a time (`steps.LoadSteps`)."""

    def __init__(self, node: CheckpointHost) -> None:
        self._node = node
        self._storage = node.storage
        self._thread = DaemonThreads(1, "tkv-fill", stand_back)  # the thread starts at the first use
        self._copying = DaemonThreads(node.config.io_threads, "tkv-fill", stand_back)
        """Several threads, because copying takes the longest: the system allocates untouched memory page by page."""
        self._lock = threading.Lock()
        self._job: _LoadJob | None = None
        self.models: dict[BlockKey, dict[str, Any]] = {}
        """By root, the checkpoints' descriptions of models (`ModelInfo.as_message`). Workers describe them again when they attach."""

    def capacity(self) -> LoadCapacity:
        with self._node.running():
            host, disk = self._storage.host, self._storage.disk
            index = self._storage.index
            host_bytes = int(host.capacity_bytes * FILLED_SHARE) - host.used_bytes
            disk_bytes = int(disk.capacity_bytes * FILLED_SHARE) - disk.used_bytes if disk else 0
            blocks = int(index.capacity_blocks * INDEX_SHARE) - len(index)
            return LoadCapacity(max(host_bytes, 0), max(disk_bytes, 0), max(blocks, 0))

    def mount(self, request: MountRequest) -> int:
        with self._lock:
            self._check_idle()
            store = open_store(request.url, setting="url", create=False, environ=request.credentials or None)
            first = self._storage.mounted.mount(store, request.packs)
            self._learn(request.models)
            admits = self._storage.allowance.admits
            allowed = [each for each in request.blocks if admits(each.key, each.info.root, each.location.codec, None)]
            too_lossy = len(request.blocks) - len(allowed)
            self._storage.allowance.refuse(Tier.CHECKPOINT.label, too_lossy)
            mounted = self._add_to_index(allowed, first)
            self._job = _LoadJob(mounted, self._batches(mounted), too_lossy=too_lossy)
        self._node.report()
        return len(mounted)

    def _learn(self, models: Mapping[BlockKey, dict[str, Any]]) -> None:
        """Record a checkpoint's descriptions of models, and the weight epochs that they name."""
        self.models |= models
        for root, message in models.items():
            self._node.epochs.learn(root, ModelInfo.of_message(message).known_namespace())

    def _add_to_index(self, blocks: Sequence[MountedBlock], first: int) -> list[MountedBlock]:
        """Add blocks to the index, so that they are hits, until it is full. Returns the blocks that were added.

        `first`: the number of the mount's first pack.
        """
        room, mounted = self.capacity().blocks, []
        for start in range(0, len(blocks), _EVENTS_AT_ONCE):
            with self._node.running():
                known = self._node.engine.machine.blocks
                events = []
                for each in blocks[start : start + _EVENTS_AT_ONCE]:
                    if self._node.epochs.is_closed(each.info.root):
                        continue
                    room -= each.key not in known
                    if room < 0:
                        break
                    block = each._replace(location=each.location._replace(tier=Tier.CHECKPOINT, segment=first + each.location.segment))
                    self._storage.mounted.hold(block.location.stored_bytes)
                    events.append(ev.Recovered(block.info, block.location, block.uses))
                    mounted.append(block)
                self._node.engine.handle(events)
            if room < 0:
                break
        return mounted

    def load(self, max_rate: float | None = None) -> None:
        with self._lock:
            job = self._job
            if job is None or job.done is not None:
                raise TieredKVError(Kind.STORAGE, "no mounted blocks to load: mount a checkpoint first, and load it once")
            job.done = self._thread.submit(self._run, job, max_rate)

    def reshard(self, request: ReshardRequest) -> None:
        with self._lock:
            self._check_idle()
            store = open_store(request.url, setting="url", create=False, environ=request.credentials or None)
            self._learn(request.models)
            resharder = Resharder(self._storage.mounted, self._storage.mounted.mount(store, request.packs))
            batches = (_LoadBatch(*each) for each in resharder.batches(request.blocks, self._is_missing))
            job = self._job = _LoadJob([each.block for each in request.blocks], batches)
            job.done = self._thread.submit(self._run, job, request.max_rate)

    def progress(self) -> LoadProgress:
        job = self._job or _LoadJob([])
        is_done, error = outcome_of(job.done, "loading the checkpoint") if job.done is not None else (True, None)
        counts = len(job.blocks), len(job.host), job.disk, job.nbytes, job.damaged
        return LoadProgress(*counts, list(job.problems), is_done, error, job.too_lossy)

    def thin_out(self) -> None:
        """Unmount blocks that only a checkpoint has if more than INDEX_SHARE of the index is in use. Call with the engine's lock."""
        missing = int(self._storage.index.capacity_blocks * (1 - INDEX_SHARE)) - self._storage.index_room
        if missing > 0 and self._node.engine.machine.blocks_by_tier[Tier.CHECKPOINT]:
            self._node.engine.handle([ev.Unmounted(missing)])

    def stats(self) -> LoadStats | None:
        """Returns the state of loading for the node's figures, or None if nothing was restored."""
        if self._job is None:
            return None
        now = self.progress()
        return {
            "blocks": now.mounted,
            "nearer": now.host + now.disk,
            "damaged": now.damaged,
            "too_lossy": now.too_lossy,
            "is_done": now.is_done,
            "error": str(now.error) if now.error else None,
        }

    def stop(self) -> None:
        job = self._job
        if job is not None and job.done is not None:
            job.stopping.set()
            wait([job.done])  # its error, if any, is in `progress`

    def close(self) -> None:
        """Stop loading, and end the threads."""
        self.stop()
        self._thread.shutdown()
        self._copying.shutdown()

    def _check_idle(self) -> None:
        if self._job is not None and self._job.done is not None and not self._job.done.done():
            raise TieredKVError(Kind.STORAGE, "this node is still loading another checkpoint; try again when it is done")

    # On the loading thread

    def _run(self, job: _LoadJob, max_rate: float | None) -> None:
        pace = Pace(max_rate)
        batches = iter(job.batches)
        threads = DaemonThreads(READS_AHEAD, "tkv-fill", stand_back)
        ahead: deque[tuple[_LoadBatch, Future[list[Source]]]] = deque()
        with threads, closing(self._node.open_session()) as session:
            try:
                while not job.stopping.is_set():
                    for each in islice(batches, READS_AHEAD - len(ahead)):
                        pace.spend(each.nbytes, job.stopping)
                        ahead.append((each, threads.submit(each.read)))
                    if not ahead or not self._loaded(job, session, *ahead.popleft()):
                        break
            finally:
                for _, future in ahead:
                    future.cancel()
        self._node.engine.handle([ev.Ranked(job.host[::-1])])  # hottest last; the policy takes later ones for hotter

    def _batches(self, blocks: Sequence[MountedBlock]) -> Iterator[_LoadBatch]:
        """Yields the mounted blocks that are in no faster tier yet, in batches from one pack each."""
        most_bytes = int(min(_WINDOW_BYTES, self._node.config.host * _WINDOW_SHARE))
        for window in _windows(blocks, most_bytes):
            for run in runs_of(filter(self._is_only_mounted, window), min(READ_BYTES, most_bytes)):
                yield _LoadBatch(run.blocks, run.nbytes, partial(self._read, run))

    def _read(self, run: PackRange) -> list[Source]:
        """Read the frames of a run with one request. If that fails, as it may on a slow link, read them block by block."""
        try:
            return self._storage.mounted.read_run(run)
        except TieredKVError as error:
            if len(run.blocks) == 1 or error.kind is not Kind.STORAGE or error.context.get("missing"):
                raise
            log.info("reading %d bytes at once failed, reading them block by block: %s", run.nbytes, str(error))
        return [source for each in runs_of(run.blocks, 1) for source in self._storage.mounted.read_run(each)]

    def _is_missing(self, key: BlockKey) -> bool:
        return key not in self._node.engine.machine.blocks

    def _is_only_mounted(self, block: MountedBlock) -> bool:
        """Returns whether the block is still a hit, and has no copy in a faster tier."""
        known = self._node.engine.machine.blocks.get(block.key)
        return known is not None and known.best == block.location

    def _loaded(self, job: _LoadJob, session: NodeSession, batch: _LoadBatch, reading: Future[list[Source]]) -> bool:
        """Store a batch in host memory, and the blocks that do not fit there on disk. Returns False if some blocks found no room."""
        try:
            sources = reading.result()
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            sources = [error] * len(batch.blocks)
        job.nbytes += batch.nbytes
        good: list[tuple[MountedBlock, Frame]] = []
        for block, source in zip(batch.blocks, sources, strict=True):
            if isinstance(source, TieredKVError):
                self._drop_damaged(job, block, source)
            elif not self._storage.allowance.admits(block.key, block.info.root, source.codec.id, source.error):
                self._drop_too_lossy(job, block)
            else:
                good.append((block, source))
        rest = self._to_host(job, session, good)
        return not rest or self._to_disk(job, rest)

    def _drop_damaged(self, job: _LoadJob, block: MountedBlock, error: TieredKVError) -> None:
        job.damaged += 1
        message = f"block {block.key.hex()} cannot be restored: {error}"
        log.warning("%s", message)
        if len(job.problems) < _PROBLEMS_KEPT:
            job.problems.append(message)
        self._node.engine.handle([ev.Lost(block.key, block.location)])

    def _drop_too_lossy(self, job: _LoadJob, block: MountedBlock) -> None:
        """Remove a mounted block whose error, known only after reading it, is larger than the settings allow."""
        job.too_lossy += 1
        self._storage.allowance.refuse(Tier.CHECKPOINT.label, 1)
        self._node.engine.handle([ev.Lost(block.key, block.location, GoneCause.TOO_LOSSY)])

    def _to_host(self, job: _LoadJob, session: NodeSession, blocks: list[tuple[MountedBlock, Frame]]) -> list[tuple[MountedBlock, Frame]]:
        """Copy blocks to host memory in parallel, without evicting others. Returns the blocks that found no room."""
        locations = self._reserve(session, blocks)
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
                self._drop_damaged(job, block, error)
        return blocks[len(placed) :]

    def _show(self, job: _LoadJob, session: NodeSession, outcomes: Sequence[tuple[_Placed, TieredKVError | None]]) -> None:
        """Show the blocks that were copied to host memory without error, so that they are hits there."""
        events = []
        with self._node.running():
            for (block, _, location), error in outcomes:
                if error is None:
                    del session.reserved[location.offset]
                    events.append(ev.Recovered(block.info, location, block.uses))
                    job.host.append(block.key)
            self._node.engine.handle(events)

    def _put(self, placed: _Placed) -> TieredKVError | None:
        """Write a block to its extent. Returns the error if its frame cannot be decoded."""
        block, frame, location = placed
        try:
            self._storage.put(BlockData.of(frame), location, block.info)
        except TieredKVError as error:
            return TieredKVError(error.kind, str(error))  # the original's traceback would keep a reference to the arena
        return None

    def _reserve(self, session: NodeSession, blocks: list[tuple[MountedBlock, Frame]]) -> list[Location]:
        """Reserve free extents for the blocks, in order, until there is no room. Returns their locations."""
        host = self._storage.host
        locations: list[Location] = []
        with self._node.running():
            for block, frame in blocks:
                form = self._storage.form_of(frame, block.info.root)
                if host.used_bytes + form.nbytes > host.capacity_bytes * FILLED_SHARE:
                    break
                offsets = self._storage.reserve(Tier.HOST, form.nbytes, 1, Room.COMPRESSED if form.codec else Room.STAGING)
                if not offsets:
                    break
                session.reserved[offsets[0]] = form.nbytes
                locations.append(Location(Tier.HOST, form.codec, 0, offsets[0], form.nbytes, frame.raw_bytes))
        return locations

    def _to_disk(self, job: _LoadJob, blocks: list[tuple[MountedBlock, Frame]]) -> bool:
        """Append blocks to the disk tier. Returns False if it has no room for all of them without evicting others."""
        disk = self._storage.disk
        if disk is None:
            return False
        records = [Record(block.info, frame.pieces, frame.codec.id, frame.raw_bytes) for block, frame in blocks]
        placed = self._node.engine.below(Tier.DISK, lambda: self._append(disk, blocks, records)).result()
        job.disk += placed
        return placed == len(blocks)

    def _append(self, disk: DiskTier, blocks: list[tuple[MountedBlock, Frame]], records: list[Record]) -> int:
        """Append all blocks if they fit without evicting others, else none. Returns how many were appended."""
        nbytes = sum(frame.nbytes for _, frame in blocks)
        if disk.used_bytes + nbytes > disk.capacity_bytes * FILLED_SHARE or disk.needs_reclaim(nbytes, len(blocks)) is not None:
            return 0
        results = disk.append(records)
        self._node.engine.handle(
            ev.Recovered(block.info, result.location, block.uses)
            for (block, _), result in zip(blocks, results, strict=True)
            if result.location is not None
        )
        return sum(result.location is not None for result in results)


def _windows(blocks: Sequence[MountedBlock], least_bytes: float) -> Iterator[list[MountedBlock]]:
    """Yields the blocks in order, in windows of at least `least_bytes`. Consecutive blocks of one pack are in one window."""
    window: list[MountedBlock] = []
    nbytes = 0
    for block in blocks:
        if nbytes >= least_bytes and block.location.segment != window[-1].location.segment:
            yield window
            window, nbytes = [], 0
        window.append(block)
        nbytes += block.location.stored_bytes
    if window:
        yield window
