"""Seals: checksums of the blocks in host memory, made soon after a block is stored and compared periodically (scrubbing).

One thread of the lowest priority does both. It seals while no worker stores, because each of its steps takes the interpreter's lock
from the thread that answers a worker. It hashes without that lock and without the engine's. A block's bytes never
change while the machine lists its location, so a result counts only if that location is still the same object afterwards.
A block that does not match its seal is dropped, and is a miss from then on. Code that reads a block to copy it elsewhere compares the
seal itself (`BlockData.verify`). docs/design/022 has the figures.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tiered_kv.blocks import Location, Tier
from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.writer import stand_back
from tiered_kv.node.storage import NodeStorage
from tiered_kv.protocol.messages import SealStats
from tiered_kv.store import events as ev
from tiered_kv.store.engine import Engine

log = logging.getLogger(__name__)

SCRUB_BYTES_PER_S = 64 << 20
PASS_EVERY_S = 10.0
"""The shortest time from the start of one pass over all blocks to the next: a small memory need not be read all the time."""
LOOK_EVERY_S = 0.1
QUIET_S = 0.02
"""Blocks are sealed when no block has been stored for this long, or when the first of them has waited for `SEAL_WITHIN_S`."""
SEAL_WITHIN_S = 0.5
BACKLOG_MAX = 1 << 16  # blocks; further ones are sealed by the pass over all blocks
BATCH_BYTES, BATCH_BLOCKS = 4 << 20, 64
WAIT_FOR_QUIET_S = 0.3
"""The longest time that a pass waits, before each batch, for copies between tiers to end and for stores to pause."""
_NICE = 19


class _HostBlock(NamedTuple):
    """A block and its location in host memory, as the machine listed them at one moment."""

    key: BlockKey
    location: Location


class Seals:
    """Seals and scrubs the blocks in one node's host memory, drops damaged ones, and repairs index slots. Thread-safe."""

    def __init__(self, engine: Engine, storage: NodeStorage) -> None:
        self._engine = engine
        self._storage = storage
        self._backlog: deque[BlockKey] = deque(engine.machine.blocks, maxlen=BACKLOG_MAX)
        self._suspects: dict[BlockKey, None] = {}  # damaged, but pinned by a reader
        self._unscrubbed: deque[BlockKey] = deque()  # blocks that the current pass has not reached
        self._next_pass_s = self._quiet_until_s = 0.0
        self._waiting_since_s = self._stored_s = float("-inf")  # when the first block of the backlog was queued, and the last
        self._counts: Counter[str] = Counter()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tkv-seal", daemon=True)
        storage.on_suspect = self._suspect

    def start(self) -> None:
        """Start sealing and scrubbing."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Unsealed blocks stay unsealed. May be called twice."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def committed(self, keys: Iterable[BlockKey]) -> None:
        """Queue blocks that were stored without a seal, for the thread to seal. No store waits for it. Call with the engine's lock.

        The thread seals them about `LOOK_EVERY_S` after the stores pause. If stores do not pause, it waits for at most `SEAL_WITHIN_S`.
        """
        self._stored_s = time.monotonic()
        if not self._backlog:
            self._waiting_since_s = self._stored_s
        self._backlog.extend(keys)

    def stats(self) -> SealStats:
        """Returns counts since the node started: blocks sealed, scrubbed, and flipped (dropped as damaged), and index slots mended.

        `unsealed`: how many blocks wait for a seal now.
        """
        return {
            "sealed": self._counts["sealed"],
            "scrubbed": self._counts["scrubbed"],
            "flipped": self._counts["flipped"],
            "slots_mended": self._counts["slots_mended"],
            "unsealed": len(self._backlog),
        }

    def examine(self, key: BlockKey) -> None:
        """Check a block that a worker could not read: repair its index slot, and drop the block if its bytes are damaged."""
        with self._engine.lock:
            self.mend_slots([key])
            block = self._block(key)
            if block is not None and not (self._storage.host.judge(*block)[0] and self._storage.decoded(*block) is not None):
                self._drop(block)

    def mend_slots(self, keys: Iterable[BlockKey]) -> None:
        """Repair index slots that differ from the machine. Checks `keys`, and all blocks if one of them is wrong.

        Call with the engine's lock.
        """
        index, blocks = self._storage.index, self._engine.machine.blocks
        wrong = [key for key in keys if index.get(key) != (blocks[key].best if key in blocks else None)]
        if wrong or (len(index) != len(blocks) and len(index) < index.capacity_blocks):
            mended = index.reconcile({key: block.best for key, block in blocks.items()})
            self._counts["slots_mended"] += mended
            log.warning("%d slots of the index were damaged and have been rewritten", mended)

    def scrub(self) -> None:
        """Compare all blocks with their seals now, without pacing. Blocks without a seal get one."""
        with self._engine.lock:
            keys = deque(self._engine.machine.blocks)
        while keys:
            self._scrub_some(keys)

    def _run(self) -> None:
        """Seal and scrub blocks until the node closes. An error is logged, and the next round tries again."""
        stand_back(_NICE)
        rest_s = 0.0
        while not self._closing.wait(rest_s or LOOK_EVERY_S):
            try:
                self._drop_suspects()
                while self._backlog and self._is_due() and not self._closing.is_set():
                    self._seal_some()
                rest_s = self._scrub_paced()
            except Exception:
                log.exception("checking the blocks in host memory failed")

    def _is_due(self) -> bool:
        """Returns whether the backlog is to be sealed now: the stores have paused, or its first block has waited long enough."""
        now_s = time.monotonic()
        return now_s - self._stored_s >= QUIET_S or now_s - self._waiting_since_s >= SEAL_WITHIN_S

    def _seal_some(self) -> None:
        """Seal a batch of the backlog."""
        is_sealed = self._storage.host.headers.is_sealed
        self._look(self._take_batch(self._backlog, lambda location: not is_sealed(location.offset)))

    def _scrub_paced(self) -> float:
        """Scrub a batch of the current pass if it is due. Returns how many seconds to wait before the next call."""
        now_s = time.monotonic()
        if not self._unscrubbed:
            if now_s < self._next_pass_s:
                return LOOK_EVERY_S
            with self._engine.lock:
                self._unscrubbed.extend(self._engine.machine.blocks)
            if not self._unscrubbed:
                return LOOK_EVERY_S
            self._next_pass_s = now_s + PASS_EVERY_S
        is_quiet = not self._engine.is_busy and now_s - self._stored_s >= QUIET_S
        if not is_quiet and now_s < self._quiet_until_s:
            return LOOK_EVERY_S
        self._quiet_until_s = now_s + WAIT_FOR_QUIET_S
        return self._scrub_some(self._unscrubbed) / SCRUB_BYTES_PER_S

    def _scrub_some(self, keys: deque[BlockKey]) -> int:
        with self._engine.lock:
            self.mend_slots([keys[at] for at in range(min(len(keys), BATCH_BLOCKS))])
        batch = self._take_batch(keys, lambda _: True)
        self._counts["scrubbed"] += self._look(batch)
        return sum(block.location.stored_bytes for block in batch)

    def _take_batch(self, keys: deque[BlockKey], is_wanted: Callable[[Location], bool]) -> list[_HostBlock]:
        """Remove up to `BATCH_BLOCKS` keys from the front of a queue. Returns their blocks in host memory, about `BATCH_BYTES` at most.

        Blocks for whose location `is_wanted` is false are left out.
        """
        batch: list[_HostBlock] = []
        nbytes, left = 0, BATCH_BLOCKS
        with self._engine.lock:
            while keys and nbytes < BATCH_BYTES and left:
                left -= 1
                block = self._block(keys.popleft())
                if block is not None and is_wanted(block.location):
                    batch.append(block)
                    nbytes += block.location.stored_bytes
        return batch

    def _look(self, batch: list[_HostBlock]) -> int:
        """Hash blocks without a lock, then seal those without a seal, and drop those that are damaged. Returns how many are undamaged."""
        host = self._storage.host
        verdicts = [host.judge(*block) for block in batch]
        sound = 0
        with self._engine.lock:
            for block, (is_sound, digest) in zip(batch, verdicts, strict=True):
                present = self._block(block.key)
                if present is None or present.location is not block.location:
                    continue  # it was moved or evicted, and its extent may belong to another block now
                sound += is_sound
                if not is_sound:
                    self._drop(block)
                elif digest is not None:
                    matches = host.headers.matches(block.location.offset, digest)  # another thread may have sealed it since
                    if matches is None:
                        host.headers.seal(block.location.offset, digest)
                        self._counts["sealed"] += 1
                    elif not matches:
                        self._drop(block)
        return sound

    def _suspect(self, key: BlockKey) -> None:
        """Check a block that could not be copied elsewhere. If it is damaged, drop it."""
        with self._engine.lock:
            block = self._block(key)
            if block is not None and not self._storage.host.judge(*block)[0]:
                self._drop(block)

    def _drop_suspects(self) -> None:
        """Drop damaged blocks that were pinned by a reader when they were found, and no longer are."""
        for key in list(self._suspects):
            with self._engine.lock:
                if self._block(key) is None:
                    del self._suspects[key]
                elif not self._is_in_use(key):
                    self._suspect(key)
                    self._suspects.pop(key, None)

    def _block(self, key: BlockKey) -> _HostBlock | None:
        """Returns the block if it is in host memory, else None. Call with the engine's lock."""
        block = self._engine.machine.blocks.get(key)
        location = block.copies.get(Tier.HOST) if block else None
        return None if location is None else _HostBlock(key, location)

    def _is_in_use(self, key: BlockKey) -> bool:
        """Returns whether the block is being read or copied, so that its bytes must not be freed."""
        machine = self._engine.machine
        return machine.blocks[key].copying_to is not None or machine.pinned(key)

    def _drop(self, block: _HostBlock) -> None:
        """Drop a damaged copy. While it is being read, only note it as a suspect. Call with the engine's lock."""
        if self._block(block.key) != block:
            return
        if block.key not in self._suspects:
            self._counts["flipped"] += 1
            log.warning("block %s is damaged in host memory and is dropped from it", block.key.hex())
        if self._is_in_use(block.key):
            self._suspects[block.key] = None
        else:
            self._engine.handle([ev.Lost(block.key, block.location)])
