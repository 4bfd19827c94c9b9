"""A node's part in writing a checkpoint: what it holds at one moment, and the packs that it is asked to write of that.

The moment is `snapshot`. What it told is still written when it leaves the cache meanwhile: its bytes are set aside as they go,
up to an eighth of host memory. Frames are copied out of the tiers a few MiB at a time, so that nothing is held while a store takes
its time, and written by threads that stand back behind those that serve workers.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs.base import byte_view
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.store.movement import Block
from tiered_kv.threads import DaemonThreads
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objects.open_store import open_store
from tiered_kv.tiers.objects.packs import PackInfo, PackWriter, grown_bytes, record_bytes

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

log = logging.getLogger(__name__)

PACK_BYTES = 32 << 20
SET_ASIDE_SHARE = 1 / 8  # of host
UNASKED_S = 30.0
"""With nobody asking how it goes for so long, the writing ends: who wanted it is gone."""
_AT_ONCE_BYTES, _AT_ONCE_SHARE = 8 << 20, 1 / 16  # of host: frames that are held in place together
PACKS_AT_ONCE = 3  # written side by side, while one more is filled
_NICE = 10


class Seen(NamedTuple):
    """A block that a node held at the moment of a snapshot: its place in its chain, its best copy, and its uses since it was stored."""

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey
    depth: int | None
    tier: int
    codec: int
    stored_bytes: int
    raw_bytes: int
    hits: int


class Snapshot(NamedTuple):
    """All blocks that were asked for, the last used first, and by root what workers said of the models (`ModelFacts.as_message`)."""

    blocks: list[Seen]
    models: dict[BlockKey, dict]


class Written(NamedTuple):
    """How writing goes: blocks and bytes of frames so far, the packs (those not told before), and blocks that were gone.

    `error`: what ended it, if that was no success.
    """

    blocks: int
    nbytes: int
    packs: list[PackInfo]
    left: list[BlockKey]
    is_done: bool
    error: TieredKVError | None = None


@dataclass
class _Job:
    """The writing of one checkpoint. `ticket`: whose it is."""

    ticket: str = ""
    keys: Sequence[BlockKey] = ()
    blocks: int = 0
    nbytes: int = 0
    packs: list[PackInfo] = field(default_factory=list)
    left: list[BlockKey] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    asked_s: float = field(default_factory=time.monotonic)
    done: Future | None = None


class Saving:
    """Writes packs of one node's blocks, for one checkpoint at a time.

    Who wants one chooses a ticket for it; what he asks for afterwards holds for that one only, not for another's that came meanwhile.
    """

    def __init__(self, node: "Node") -> None:
        self._node = node
        self._thread = DaemonThreads(1, "tkv-save", stand_back)  # starts none before it is used
        self._lock = threading.Lock()
        self._job: _Job | None = None
        self._pending: dict[BlockKey, BlockKey] = {}  # to be written: their roots; guarded by the engine's lock
        self._aside: dict[BlockKey, Record] = {}
        self._aside_bytes = 0
        self.last: dict | None = None
        """The last checkpoint that is known to be complete, see `note`."""

    def steps(self) -> dict[str, Callable[..., object]]:
        """Returns the steps of writing a checkpoint, by the names under which a command calls them."""
        return {
            "snapshot": self.snapshot,
            "save": self.save,
            "written": self.written,
            "stop_saving": self.stop,
            "note_saved": self.note,
        }

    def snapshot(self, tiers: Sequence[int] | None = None, min_hits: int = 0, ticket: str = "") -> Snapshot:
        """What is committed now, in these tiers (None: everywhere but in objects), and was used so often since it was stored.

        Raises (kind `storage`, `busy`) while another checkpoint is being written, until whoever wants that lets go of it by `stop`.
        Holds the engine's lock for some 0.3 µs a block, during which no store is answered; fetches go on.
        """
        wanted = {tier for tier in Tier if tier is not Tier.OBJECTS} if tiers is None else {Tier(tier) for tier in tiers}
        with self._lock:
            self._must_be_free_for(ticket)
            with self._node.running():
                self._node.engine.drain_touches()
                blocks = dict(self._node.engine.machine.blocks)
                used = self._node.storage.index.used()
                self._expect({key: block.root for key, block in blocks.items() if block.root is not None})
                self._job = _Job(ticket)  # so that what is set aside is let go again when nobody goes on
            order = dict.fromkeys([*(key for key in used if key in blocks), *reversed(blocks)])
            seen = [each for key in order if (each := self._seen(key, blocks[key], wanted, min_hits)) is not None]
            present = {each.root for each in seen}
            models = self._node.filling.models | {root: facts.as_message() for root, facts in self._node.storage.coder.facts().items()}
            return Snapshot(seen, {root: message for root, message in models.items() if root in present})

    def _seen(self, key: BlockKey, block: Block, wanted: Container[Tier], min_hits: int) -> Seen | None:
        """A block that was there a moment ago, if it is wanted: it may have moved, or have been set aside."""
        if block.root is None or block.uses <= min_hits:
            return None
        copies = dict(block.copies)
        at = min((location for tier, location in copies.items() if tier in wanted), default=None)
        if at is None and not copies and Tier.HOST in wanted and (record := self._aside.get(key)):
            at = Location(Tier.HOST, record.codec, 0, 0, record_bytes(record), record.raw_bytes)
        if at is None:
            return None
        depth = block.depth if block.parent is not None else block.depth or 0
        return Seen(key, block.parent, block.root, depth, int(at.tier), at.codec, at.stored_bytes, at.raw_bytes, block.uses - 1)

    def save(
        self,
        url: str,
        keys: Sequence[BlockKey],
        max_rate: float | None = None,
        pack_bytes: int = PACK_BYTES,
        environ: Mapping[str, str] | None = None,
        ticket: str = "",
    ) -> None:
        """Begin to write packs of these blocks of the last snapshot, in this order, to the store at `url`, where a folder must be there.

        `max_rate`: bytes a second at most. `environ`: credentials of who wants it. How it goes is asked by `written`. Raises (kinds
        `config`, `storage`).
        """
        with self._lock:
            self._must_be_of(ticket)
            if self._job is None or self._job.done is not None:
                raise TieredKVError(Kind.STORAGE, "there is no snapshot to write blocks of; it may have been given up")
            store = open_store(url, setting="url", create=False, environ=environ or None)
            self._narrow(keys)
            job = self._job
            job.keys, job.asked_s = keys, time.monotonic()
            job.done = self._thread.submit(self._run, job, store, max_rate, pack_bytes)

    def written(self, packs_told: int = 0, ticket: str = "") -> Written:
        """How it goes; raises (kind `storage`) when nothing was begun."""
        self._must_be_of(ticket)
        job = self._job
        if job is None or job.done is None:
            raise TieredKVError(Kind.STORAGE, "nothing is being written, or the node was restarted meanwhile")
        job.asked_s = time.monotonic()
        is_done, error = ended(job.done, "writing")
        return Written(job.blocks, job.nbytes, job.packs[packs_told:], list(job.left), is_done, error)

    def note(self, checkpoint: dict) -> None:
        """Remember a checkpoint that is complete, as JSON-ready facts for `stats`."""
        self.last = checkpoint

    def stop(self, ticket: str | None = None) -> None:
        """End the writing, or give the snapshot up; packs that are complete stay. Returns when no more is written.

        `ticket`: of that checkpoint only; None: whose it may be.
        """
        job = self._job
        if job is None or ticket not in (None, job.ticket):
            return
        job.stopping.set()
        if job.done is not None:
            wait([job.done])  # however it ends: `written` tells
        with self._lock:
            if self._job is not job:
                return
            self._job = None
            self._expect({})

    def beat(self) -> None:
        """Give up what nobody has asked for any more."""
        job = self._job
        if job is not None and time.monotonic() - job.asked_s > UNASKED_S:
            job.stopping.set()
            if job.done is None or job.done.done():
                self.stop()

    def close(self) -> None:
        """Stop, and end the thread."""
        self.stop()
        self._thread.shutdown()

    def _must_be_free_for(self, ticket: str) -> None:
        job = self._job
        if job is None:
            return
        is_anothers = job.ticket != ticket and time.monotonic() - job.asked_s <= UNASKED_S
        if is_anothers or (job.done is not None and not job.done.done()):
            message = "another checkpoint is being written by this node; it ends within a minute if nobody waits for it any more"
            raise TieredKVError(Kind.STORAGE, message, busy=True)

    def _must_be_of(self, ticket: str) -> None:
        if self._job is not None and self._job.ticket != ticket:
            raise TieredKVError(Kind.STORAGE, "another checkpoint was begun on this node meanwhile; try again when it has ended")

    # What leaves meanwhile

    def _expect(self, roots: dict[BlockKey, BlockKey]) -> None:
        """From now on set these blocks aside when they leave, and no others."""
        with self._node.engine.lock:
            self._pending, self._aside, self._aside_bytes = roots, {}, 0
            self._node.engine.on_gone = self._set_aside if roots else None

    def _narrow(self, keys: Sequence[BlockKey]) -> None:
        """Expect those only that are to be written."""
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
            parent = self._node.storage.host.lineage(location.offset).parent
            record = Record(key, [frame], location.codec, location.raw_bytes, parent, root)
            self._aside[key] = record
            self._aside_bytes += record_bytes(record)

    # Writing, on the thread

    def _run(self, job: _Job, store, max_rate: float | None, pack_bytes: int) -> None:
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
    def _finished(job: _Job, info: PackInfo) -> None:
        job.packs.append(info)
        job.blocks += len(info.entries)
        job.nbytes += sum(entry.stored_bytes for entry in info.entries)

    def _packs(self, job: _Job, store, pack_bytes: int) -> Iterator[PackWriter]:
        writer = PackWriter(store)
        for record in self._records(job):
            if len(writer) and writer.nbytes + grown_bytes(record_bytes(record)) > pack_bytes:
                yield writer
                writer = PackWriter(store)
            writer.add(record)
        if len(writer):
            yield writer

    def _records(self, job: _Job) -> Iterator[Record]:
        """The blocks' frames, copied."""
        for keys in self._batches(job.keys):
            rest = keys
            while rest:
                records = []
                with self._node.pinned(rest) as here:
                    blocks, copied = self._node.engine.machine.blocks, _copied(list(self._node.storage.frames(here)))
                    for (key, root, at), frame in zip(here, copied, strict=False):
                        records.append(Record(key, [frame], at.codec, at.raw_bytes, blocks[key].parent, root))
                done, rest = rest[: len(records) + 1], rest[len(records) + 1 :]
                yield from self._taken(job, done, records)

    def _taken(self, job: _Job, keys: Sequence[BlockKey], records: list[Record]) -> Iterator[Record]:
        """Records of all keys but the last, which if there is one was not to be had; it may have been set aside."""
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
        """As many keys at a time as make up some MiB."""
        most_bytes = min(_AT_ONCE_BYTES, self._node.config.host * _AT_ONCE_SHARE)
        blocks, batch, nbytes = self._node.engine.machine.blocks, [], 0
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
    """Keeps a rate: whoever spends bytes waits until they are due."""

    def __init__(self, max_rate: float | None) -> None:
        self._rate = max_rate
        self._due_s = time.monotonic()

    def spend(self, nbytes: int, stopping: threading.Event) -> None:
        """Wait for the turn of so many bytes, or until `stopping`."""
        if self._rate is None:
            return
        now_s = time.monotonic()
        self._due_s = max(self._due_s, now_s)
        stopping.wait(self._due_s - now_s)
        self._due_s += nbytes / self._rate


def ended(job: Future, doing: str) -> tuple[bool, TieredKVError | None]:
    """Whether what a thread does has ended, and what ended it, if that was no success."""
    is_done = job.done()
    error = job.exception() if is_done and not job.cancelled() else None
    if error is not None and not isinstance(error, TieredKVError):
        error = TieredKVError(Kind.STORAGE, f"{doing} failed: {error!r}")
    return is_done, error


def stand_back(nice: int = _NICE) -> None:
    """Have this thread wait for others where there are too few cores."""
    with suppress(OSError):  # not everywhere a thread's own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def _copied(frames: Sequence[FramePieces]) -> list[memoryview]:
    """Each frame in one piece, copied out of memory that is given back, to one buffer: the system makes a large one at less cost."""
    views = [[byte_view(piece) for piece in pieces] for pieces in frames]
    buffer, end = np.empty(sum(view.nbytes for pieces in views for view in pieces), np.uint8), 0
    copies = []
    for pieces in views:
        start = end
        for view in pieces:
            buffer[end : end + view.nbytes] = np.frombuffer(view, np.uint8)  # lets other threads go on
            end += view.nbytes
        copies.append(memoryview(buffer[start:end]))
    return copies
