"""The engine: carries out what the machine decides, with bounded threads, under one lock.

Show, Hide and Free happen at once, in the machine's order. Copies run on `io_threads` threads without the lock; their
outcome is the machine's next event. `freed` wakes those who wait for room.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from tiered_kv.blocks import Location, Tier
from tiered_kv.clock import Clock
from tiered_kv.keys import BlockKey
from tiered_kv.store import events as ev
from tiered_kv.store.machine import StoreMachine

log = logging.getLogger(__name__)

COPY_BATCH_BYTES = 8 << 20


class Index(Protocol):
    """What readers look keys up in."""

    def put(self, key: BlockKey, location: Location) -> object: ...
    def remove(self, key: BlockKey) -> object: ...
    def harvest(self) -> list[tuple[BlockKey, int, int]]: ...


class Mover(Protocol):
    """Moves bytes between tiers; knows frames and tiers, decides nothing."""

    def fits(self, nbytes: int) -> bool:
        """Whether the host tier could hold a block of `nbytes` if it were empty."""

    def reserve(self, nbytes: int, count: int) -> list[int]:
        """Offsets of up to `count` host extents for blocks of `nbytes`."""

    def free(self, location: Location) -> None:
        """Give the bytes of one copy, or of a reserved host extent, back."""

    def to_disk(self, copies: Sequence[ev.Copy]) -> list[Location | None]:
        """Write blocks to disk; None for one that could not be written."""

    def to_host(self, copy: ev.Copy, location: Location) -> bool:
        """Read a block into the reserved extent at `location`; False if it is gone or damaged."""

    def disk_room(self, copies: Sequence[ev.Copy]) -> tuple[int, list[BlockKey]] | None:
        """The segment that must go before these copies can be written, with its blocks; None if there is room."""

    def drop_segment(self, segment: int) -> None:
        """Remove a segment whose blocks were reported lost."""


class Engine:
    """One node's store: machine, index and tiers moved in step. Thread-safe."""

    def __init__(
        self, machine: StoreMachine, index: Index, mover: Mover, clock: Clock, io_threads: int, batch_bytes: int = COPY_BATCH_BYTES
    ) -> None:
        self.machine = machine
        self.lock = threading.RLock()
        self.freed = threading.Condition(self.lock)
        self.journal: dict[BlockKey, bool] = {}
        """Keys that became visible (True) or invisible (False) since somebody last emptied it."""
        self._index = index
        self._mover = mover
        self._clock = clock
        self._batch_bytes = batch_bytes
        self._pool = ThreadPoolExecutor(io_threads, thread_name_prefix="tkv-io")
        self._disk_turn = threading.Lock()  # one appender at a time, so that a batch stays together
        self._leaving_bytes = 0
        self._batches = 0
        self._closed = False

    def handle(self, events: Iterable[ev.Event]) -> None:
        """Let the machine decide about the events in order, and carry the decisions out."""
        with self.lock:
            copies: list[ev.Copy] = []
            for event in events:
                for instruction in self.machine.handle(event):
                    if isinstance(instruction, ev.Copy):
                        copies.append(instruction)
                    else:
                        self._apply(instruction)
            self._start(copies)

    def reserve(self, nbytes: int, count: int, tail: BlockKey | None, wait_s: float) -> list[int]:
        """Host extents for up to `count` new blocks; makes room for them, waits at most `wait_s` for the first.

        Fewer than asked is back-pressure: pack these, commit them, ask again. None at all after the wait: refused.
        """
        if not self._mover.fits(nbytes):
            return []  # and nobody else has to go for it
        with self.lock:
            offsets = self._mover.reserve(nbytes, count)
            if len(offsets) == count:
                return offsets
            self.drain_touches()
            deadline_s = self._clock.now_s() + wait_s
            while not self._closed:
                missing = (count - len(offsets)) * nbytes
                self.handle([ev.Needed(Tier.HOST, max(missing - self._leaving_bytes, 0), tail)])
                offsets += self._mover.reserve(nbytes, count - len(offsets))
                left_s = deadline_s - self._clock.now_s()
                if offsets or left_s <= 0 or not self._leaving_bytes:
                    return offsets or self._defragment(nbytes, tail)
                self.freed.wait(left_s)
            return offsets

    def _defragment(self, nbytes: int, tail: BlockKey | None) -> list[int]:
        """Room was made, but in pieces: give up more blocks until one extent fits, or nothing is left to give."""
        while not self._leaving_bytes:
            blocks_before = self.machine.blocks_by_tier[Tier.HOST]
            self.handle([ev.Needed(Tier.HOST, nbytes, tail)])
            offsets = self._mover.reserve(nbytes, 1)
            if offsets or self.machine.blocks_by_tier[Tier.HOST] == blocks_before:
                return offsets
        return []

    def drain_touches(self) -> None:
        """Tell the machine which blocks the workers have used since the last time."""
        with self.lock:
            if not self._closed and (touched := self._index.harvest()):
                self.handle([ev.Touched(key) for key, _, _ in touched])

    def settle(self) -> None:
        """Wait until no copy is under way."""
        with self.lock:
            self.freed.wait_for(lambda: not self._batches)

    def close(self) -> None:
        """Finish the copies under way and stop the threads."""
        with self.lock:
            self._closed = True
            self.freed.notify_all()
        self._pool.shutdown(wait=True)

    def _apply(self, instruction: ev.Instruction) -> None:
        key = instruction.key
        if isinstance(instruction, ev.Show):
            self._index.put(key, instruction.location)
            self.journal[key] = True
        elif isinstance(instruction, ev.Hide):
            self._index.remove(key)
            self.journal[key] = False
        else:
            self._mover.free(instruction.location)
            self.freed.notify_all()

    def _start(self, copies: list[ev.Copy]) -> None:
        for target, run in ((Tier.DISK, self._demote), (Tier.HOST, self._promote)):
            for batch in _batches([copy for copy in copies if copy.target is target], self._batch_bytes):
                self._batches += 1
                if target is Tier.DISK:
                    self._leaving_bytes += _size(batch)
                if self._closed:
                    self._finish(batch, [ev.CopyFailed(copy.key, target) for copy in batch])
                else:
                    self._pool.submit(self._guarded, run, batch)

    def _guarded(self, run, batch: list[ev.Copy]) -> None:
        """Boundary of the background threads: whatever fails, the sources stay and the machine hears of it."""
        failed: list[ev.Event] = []
        try:
            run(batch)
        except Exception:
            log.exception("copying %d blocks to %s failed", len(batch), batch[0].target.label)
            failed = [ev.CopyFailed(copy.key, copy.target) for copy in batch]
        self._finish(batch, failed)

    def _finish(self, batch: list[ev.Copy], failed: list[ev.Event]) -> None:
        with self.lock:
            self._batches -= 1
            if batch[0].target is Tier.DISK:
                self._leaving_bytes -= _size(batch)
            self.handle(failed)
            self.freed.notify_all()

    def _demote(self, batch: list[ev.Copy]) -> None:
        with self._disk_turn:
            while (full := self._mover.disk_room(batch)) is not None:
                segment, keys = full
                self.handle([ev.Lost(key) for key in keys])
                self._mover.drop_segment(segment)
            locations = self._mover.to_disk(batch)
            # Within the turn, so that nobody drops a segment whose blocks the machine has not heard of.
            self.handle(
                ev.Copied(copy.key, location) if location else ev.CopyFailed(copy.key, copy.target)
                for copy, location in zip(batch, locations, strict=True)
            )

    def _promote(self, batch: list[ev.Copy]) -> None:
        for copy in batch:
            nbytes = copy.source.raw_bytes
            offsets = self.reserve(nbytes, 1, copy.key, wait_s=0)
            if offsets:
                self._promote_to(copy, Location(Tier.HOST, 0, 0, offsets[0], nbytes, nbytes))
            else:
                self.handle([ev.CopyFailed(copy.key, copy.target)])

    def _promote_to(self, copy: ev.Copy, location: Location) -> None:
        good = False
        try:
            good = self._mover.to_host(copy, location)
        finally:
            with self.lock:
                if good:
                    self.handle([ev.Copied(copy.key, location)])
                else:
                    self._mover.free(location)
                    self.handle([ev.CopyFailed(copy.key, copy.target), ev.Lost(copy.key, copy.source)])
                    self.freed.notify_all()


def _size(batch: list[ev.Copy]) -> int:
    return sum(copy.source.stored_bytes for copy in batch)


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
