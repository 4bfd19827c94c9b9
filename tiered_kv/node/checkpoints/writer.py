"""A node's part in writing a checkpoint: takes a snapshot of its blocks, and writes the requested ones to packs.

A block of the snapshot is written even if it is evicted meanwhile: its bytes are set aside at its eviction, up to an eighth of host
memory. Frames are copied out of the tiers a few MiB at a time, so that no block is pinned while the store is slow. The writing
threads have a lower priority than those that serve workers.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.codecs.base import byte_view
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.host import CheckpointHost
from tiered_kv.node.checkpoints.steps import (
    Snapshot,
    SnapshotEntry,
    SnapshotRequest,
    WriteRequest,
    WriteStatus,
    WriteStatusRequest,
    WrittenCheckpoint,
)
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.store.movement import Block
from tiered_kv.threads import DaemonThreads
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objects.open_store import open_store
from tiered_kv.tiers.objects.packs import PackInfo, PackWriter, grown_bytes, record_bytes
from tiered_kv.tiers.objects.store import ObjectStore

log = logging.getLogger(__name__)

SET_ASIDE_SHARE = 1 / 8  # of host
UNASKED_S = 30.0
"""Writing stops if its status has not been requested for this long: then the command that started it has ended."""
_AT_ONCE_BYTES, _AT_ONCE_SHARE = 8 << 20, 1 / 16  # of host: the frames that are pinned together
PACKS_AT_ONCE = 3  # written in parallel, while one more is filled
_NICE = 10


@dataclass
class _WriteJob:
    """The writing of one checkpoint. `done` is None until writing has started."""

    ticket: str = ""
    keys: Sequence[BlockKey] = ()
    blocks: int = 0
    nbytes: int = 0
    packs: list[PackInfo] = field(default_factory=list)
    left: list[BlockKey] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    asked_s: float = field(default_factory=time.monotonic)
    done: Future[None] | None = None


class CheckpointWriter:
    """Writes packs of one node's blocks, for one checkpoint at a time (`steps.WriteSteps`).

    The caller names each checkpoint with a ticket. Later calls apply only to the checkpoint with that ticket. `loaded_models`:
    returns the descriptions of models that came with restored checkpoints, by root.
    """

    def __init__(self, node: CheckpointHost, loaded_models: Callable[[], Mapping[BlockKey, dict[str, Any]]]) -> None:
        self._node = node
        self._loaded_models = loaded_models
        self._thread = DaemonThreads(1, "tkv-save", stand_back)  # the thread starts at the first use
        self._lock = threading.Lock()
        self._job: _WriteJob | None = None
        self._pending: dict[BlockKey, BlockKey] = {}  # the roots of the blocks to write; guarded by the engine's lock
        self._aside: dict[BlockKey, Record] = {}
        self._aside_bytes = 0
        self.last: WrittenCheckpoint | None = None
        """The last checkpoint that is known to be complete, see `note`."""

    def snapshot(self, request: SnapshotRequest) -> Snapshot:
        tiers = request.tiers
        wanted = {tier for tier in Tier if tier is not Tier.OBJECTS} if tiers is None else {Tier(tier) for tier in tiers}
        with self._lock:
            self._check_idle(request.ticket)
            with self._node.running():
                self._node.engine.drain_touches()
                blocks = dict(self._node.engine.machine.blocks)
                used = self._node.storage.index.used()
                self._expect({key: block.root for key, block in blocks.items() if block.root is not None})
                self._job = _WriteJob(request.ticket)  # so that `beat` frees the set-aside blocks if the caller never continues
            order = dict.fromkeys([*(key for key in used if key in blocks), *reversed(blocks)])
            entries = [each for key in order if (each := self._entry(key, blocks[key], wanted, request.min_hits)) is not None]
            present = {each.root for each in entries}
            described = {root: info.as_message() for root, info in self._node.storage.encoder.models().items()}
            models = {**self._loaded_models(), **described}
            return Snapshot(entries, {root: message for root, message in models.items() if root in present})

    def _entry(self, key: BlockKey, block: Block, wanted: Container[Tier], min_hits: int) -> SnapshotEntry | None:
        """Returns the snapshot's entry of a block, or None if the block does not match the request.

        The block may have moved or been set aside since `block` was copied for the snapshot.
        """
        if block.root is None or block.uses <= min_hits:
            return None
        copies = dict(block.copies)
        at = min((location for tier, location in copies.items() if tier in wanted), default=None)
        if at is None and not copies and Tier.HOST in wanted and (record := self._aside.get(key)):
            at = Location(Tier.HOST, record.codec, 0, 0, record_bytes(record), record.raw_bytes)
        if at is None:
            return None
        depth = block.depth if block.parent is not None else block.depth or 0
        return SnapshotEntry(key, block.parent, block.root, depth, int(at.tier), at.codec, at.stored_bytes, at.raw_bytes, block.uses - 1)

    def write(self, request: WriteRequest) -> None:
        with self._lock:
            self._check_ticket(request.ticket)
            if self._job is None or self._job.done is not None:
                raise TieredKVError(Kind.STORAGE, "there is no snapshot whose blocks could be written; it may have been dropped")
            store = open_store(request.url, setting="url", create=False, environ=request.credentials or None)
            self._narrow(request.keys)
            job = self._job
            job.keys, job.asked_s = request.keys, time.monotonic()
            job.done = self._thread.submit(self._run, job, store, request.max_rate, request.pack_bytes)

    def status(self, request: WriteStatusRequest) -> WriteStatus:
        self._check_ticket(request.ticket)
        job = self._job
        if job is None or job.done is None:
            raise TieredKVError(Kind.STORAGE, "nothing is being written; the node may have been restarted since writing started")
        job.asked_s = time.monotonic()
        is_done, error = outcome_of(job.done, "writing")
        return WriteStatus(job.blocks, job.nbytes, job.packs[request.known_packs :], list(job.left), is_done, error)

    def note(self, checkpoint: WrittenCheckpoint) -> None:
        self.last = checkpoint

    def stop(self, ticket: str | None = None) -> None:
        job = self._job
        if job is None or ticket not in (None, job.ticket):
            return
        job.stopping.set()
        if job.done is not None:
            wait([job.done])  # its error, if any, is in `status`
        with self._lock:
            if self._job is not job:
                return
            self._job = None
            self._expect({})

    def beat(self) -> None:
        """Stop writing if its status has not been requested for `UNASKED_S`."""
        job = self._job
        if job is not None and time.monotonic() - job.asked_s > UNASKED_S:
            job.stopping.set()
            if job.done is None or job.done.done():
                self.stop()

    def close(self) -> None:
        """Stop writing, and end the thread."""
        self.stop()
        self._thread.shutdown()

    def _check_idle(self, ticket: str) -> None:
        """Raise (kind `storage`, `busy`) while a checkpoint with another ticket is being written."""
        job = self._job
        if job is None:
            return
        is_foreign = job.ticket != ticket and time.monotonic() - job.asked_s <= UNASKED_S
        if is_foreign or (job.done is not None and not job.done.done()):
            message = "another checkpoint is being written by this node; if its command has died, the node stops writing within a minute"
            raise TieredKVError(Kind.STORAGE, message, busy=True)

    def _check_ticket(self, ticket: str) -> None:
        if self._job is not None and self._job.ticket != ticket:
            raise TieredKVError(Kind.STORAGE, "another checkpoint was begun on this node meanwhile; try again when it has ended")

    # Blocks evicted since the snapshot

    def _expect(self, roots: dict[BlockKey, BlockKey]) -> None:
        """Set aside these blocks when they are evicted, and no others. `roots`: their roots by key."""
        with self._node.engine.lock:
            self._pending, self._aside, self._aside_bytes = roots, {}, 0
            self._node.engine.on_gone = self._set_aside if roots else None

    def _narrow(self, keys: Sequence[BlockKey]) -> None:
        """Set aside only those of the expected blocks that will be written."""
        with self._node.engine.lock:
            self._pending = {key: self._pending[key] for key in keys if key in self._pending}
            self._aside = {key: record for key in keys if (record := self._aside.get(key))}
            self._aside_bytes = sum(map(record_bytes, self._aside.values()))

    def _set_aside(self, key: BlockKey, location: Location) -> None:
        root = self._pending.pop(key, None)
        most_bytes = self._node.config.host * SET_ASIDE_SHARE
        if root is None or location.tier is not Tier.HOST or self._aside_bytes + location.stored_bytes > most_bytes:
            return
        for frame in _copied(list(self._node.storage.frames([(key, root, location)]))):
            parent = self._node.storage.host.header(location.offset).info.parent
            record = Record(BlockInfo(key, parent, root), [frame], location.codec, location.raw_bytes)
            self._aside[key] = record
            self._aside_bytes += record_bytes(record)

    # On the writing thread

    def _run(self, job: _WriteJob, store: ObjectStore, max_rate: float | None, pack_bytes: int) -> None:
        pace = Pace(max_rate)
        with store, DaemonThreads(PACKS_AT_ONCE, "tkv-save", stand_back) as threads:
            under_way: list[Future[PackInfo]] = []
            try:
                for writer in self._packs(job, store, pack_bytes):
                    pace.spend(writer.nbytes, job.stopping)
                    while len(under_way) >= PACKS_AT_ONCE:
                        self._finished(job, under_way.pop(0).result())
                    under_way.append(threads.submit(writer.finish))
                    if job.stopping.is_set():
                        raise TieredKVError(Kind.STORAGE, "writing was stopped")
                while under_way:
                    self._finished(job, under_way.pop(0).result())
            finally:
                for future in under_way:
                    future.cancel()
                self._expect({})

    @staticmethod
    def _finished(job: _WriteJob, info: PackInfo) -> None:
        job.packs.append(info)
        job.blocks += len(info.entries)
        job.nbytes += sum(entry.stored_bytes for entry in info.entries)

    def _packs(self, job: _WriteJob, store: ObjectStore, pack_bytes: int) -> Iterator[PackWriter]:
        writer = PackWriter(store)
        for record in self._records(job):
            if len(writer) and writer.nbytes + grown_bytes(record_bytes(record)) > pack_bytes:
                yield writer
                writer = PackWriter(store)
            writer.add(record)
        if len(writer):
            yield writer

    def _records(self, job: _WriteJob) -> Iterator[Record]:
        """Yields a record with a copied frame for each block that is still available."""
        for keys in self._batches(job.keys):
            rest = keys
            while rest:
                records = []
                with self._node.pinned(rest) as pinned:
                    blocks, copied = self._node.engine.machine.blocks, _copied(list(self._node.storage.frames(pinned)))
                    for (key, root, at), frame in zip(pinned, copied, strict=False):
                        records.append(Record(BlockInfo(key, blocks[key].parent, root), [frame], at.codec, at.raw_bytes))
                done, rest = rest[: len(records) + 1], rest[len(records) + 1 :]
                yield from self._completed(job, done, records)

    def _completed(self, job: _WriteJob, keys: Sequence[BlockKey], records: list[Record]) -> Iterator[Record]:
        """Yields the records of `keys`.

        If there are fewer records than keys, the last key could not be read. Its set-aside copy is yielded instead, if there is one.
        """
        with self._node.engine.lock:
            for key in keys:
                self._pending.pop(key, None)
            if len(keys) > len(records):
                missing = self._aside.pop(keys[-1], None)
                if missing is None:
                    job.left.append(keys[-1])
                else:
                    records.append(missing)
                    self._aside_bytes -= record_bytes(missing)
        yield from records

    def _batches(self, keys: Sequence[BlockKey]) -> Iterator[list[BlockKey]]:
        """Yields the keys in batches of a few MiB of frames."""
        most_bytes = min(_AT_ONCE_BYTES, self._node.config.host * _AT_ONCE_SHARE)
        blocks = self._node.engine.machine.blocks
        batch: list[BlockKey] = []
        nbytes = 0
        for key in keys:
            block = blocks.get(key)
            batch.append(key)
            nbytes += block.best.stored_bytes if block is not None else 0
            if nbytes >= most_bytes:
                yield batch
                batch, nbytes = [], 0
        if batch:
            yield batch


class Pace:
    """Limits a rate, in bytes per second; None for no limit."""

    def __init__(self, max_rate: float | None) -> None:
        self._rate = max_rate
        self._due_s = time.monotonic()

    def spend(self, nbytes: int, stopping: threading.Event) -> None:
        """Wait until `nbytes` more bytes are within the rate, or until `stopping` is set."""
        if self._rate is None:
            return
        now_s = time.monotonic()
        self._due_s = max(self._due_s, now_s)
        stopping.wait(self._due_s - now_s)
        self._due_s += nbytes / self._rate


def outcome_of(job: Future[None], task: str) -> tuple[bool, TieredKVError | None]:
    """Returns whether a thread's task has ended, and the error if it failed. `task`: its name in the error."""
    is_done = job.done()
    error = job.exception() if is_done and not job.cancelled() else None
    if error is None or isinstance(error, TieredKVError):
        return is_done, error
    return is_done, TieredKVError(Kind.STORAGE, f"{task} failed: {error!r}")


def stand_back(nice: int = _NICE) -> None:
    """Lower the priority of the calling thread, so that others run first if there are too few cores."""
    with suppress(OSError):  # not every system has priorities per thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def _copied(frames: Sequence[FramePieces]) -> list[memoryview]:
    """Returns a copy of each frame, as one piece. All copies share one buffer, because allocating a large one costs less."""
    views = [[byte_view(piece) for piece in pieces] for pieces in frames]
    buffer, end = np.empty(sum(view.nbytes for pieces in views for view in pieces), np.uint8), 0
    copies = []
    for pieces in views:
        start = end
        for view in pieces:
            buffer[end : end + view.nbytes] = np.frombuffer(view, np.uint8)  # releases the GIL
            end += view.nbytes
        copies.append(memoryview(buffer[start:end]))
    return copies
