"""Seals: checksums of the blocks in host memory, made soon after a block was stored and compared again and again.

One thread of the lowest priority does both. It hashes without the interpreter's lock and without the engine's: a block's bytes
never change while its location is the machine's, so a result counts only if that location is still the same object afterwards.
What does not match is given up, and is a miss from then on. Whoever reads a block to copy it elsewhere compares the seal by
itself (`BlockData.verify`). docs/design/022 has the figures.
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
from tiered_kv.store import events as ev
from tiered_kv.store.engine import Engine

log = logging.getLogger(__name__)

SCRUB_BYTES_PER_S = 64 << 20
PASS_EVERY_S = 10.0
"""No pass over all blocks begins sooner than this after the one before: a small memory need not be read all the time."""
LOOK_EVERY_S = 0.1
BACKLOG_MAX = 1 << 16  # blocks; what is beyond is sealed by the pass over all blocks
BATCH_BYTES, BATCH_BLOCKS = 4 << 20, 64
WAIT_FOR_QUIET_S = 1.0
"""A pass waits so long at most for copies between tiers that are under way, before each batch."""
_NICE = 19


class _Block(NamedTuple):
    """A block in host memory, as the machine knows it at one moment."""

    key: BlockKey
    location: Location


class Seals:
    """Seals, scrubs and gives up blocks of one node's host memory; keeps the index's slots what the machine says. Thread-safe."""

    def __init__(self, engine: Engine, storage: NodeStorage) -> None:
        self._engine = engine
        self._storage = storage
        self._backlog: deque[BlockKey] = deque(engine.machine.blocks, maxlen=BACKLOG_MAX)
        self._suspects: dict[BlockKey, None] = {}  # found to be damaged, and read by somebody
        self._unscrubbed: deque[BlockKey] = deque()  # of the present pass
        self._next_pass_s = self._quiet_until_s = 0.0
        self._counts: Counter[str] = Counter()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tkv-seal", daemon=True)
        storage.on_suspect = self._suspect

    def start(self) -> None:
        """Begin to seal and to scrub."""
        self._thread.start()

    def close(self) -> None:
        """Stop; what is not sealed stays so. May be called twice."""
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join()

    def committed(self, keys: Iterable[BlockKey]) -> None:
        """Have blocks sealed that were stored without a seal; within about `LOOK_EVERY_S`, so that no store pays for it."""
        self._backlog.extend(keys)

    def stats(self) -> dict:
        """Blocks since the node began: sealed, scrubbed, flipped (given up for damage), slots mended; and how many wait for a seal."""
        names = ("sealed", "scrubbed", "flipped", "slots_mended")
        return {name: self._counts[name] for name in names} | {"unsealed": len(self._backlog)}

    def examine(self, key: BlockKey) -> None:
        """Find out at once what a worker met at a block: mend the index's slot, or give the block up if its bytes are damaged."""
        with self._engine.lock:
            self.mend_slots([key])
            block = self._block(key)
            if block is not None and not (self._storage.host.judge(*block)[0] and self._storage.decoded(*block) is not None):
                self._give_up(block)

    def mend_slots(self, keys: Iterable[BlockKey]) -> None:
        """Make the index say of these blocks what the machine knows; the engine's lock is held."""
        index, blocks = self._storage.index, self._engine.machine.blocks
        wrong = [key for key in keys if index.get(key) != (blocks[key].best if key in blocks else None)]
        if wrong or (len(index) != len(blocks) and len(index) < index.capacity_blocks):
            mended = index.reconcile({key: block.best for key, block in blocks.items()})
            self._counts["slots_mended"] += mended
            log.warning("%d slots of the index were damaged and are written anew", mended)

    def scrub(self) -> None:
        """Compare all blocks with their seals now, as fast as it goes; seals those without."""
        with self._engine.lock:
            keys = deque(self._engine.machine.blocks)
        while keys:
            self._scrub_some(keys)

    def _run(self) -> None:
        """Boundary of the thread: a look that fails is logged, the next one is tried."""
        stand_back(_NICE)
        rest_s = 0.0
        while not self._closing.wait(rest_s or LOOK_EVERY_S):
            try:
                self._settle_suspects()
                while self._backlog and not self._closing.is_set():
                    self._look(self._taken(self._backlog, lambda block: not self._storage.host.headers.is_sealed(block.location.offset)))
                rest_s = self._scrub_paced()
            except Exception:
                log.exception("blocks in host memory could not be checked")

    def _scrub_paced(self) -> float:
        """Scrub a batch of the present pass, if it is time; returns for how many seconds to rest."""
        now_s = time.monotonic()
        if not self._unscrubbed:
            if now_s < self._next_pass_s:
                return LOOK_EVERY_S
            with self._engine.lock:
                self._unscrubbed.extend(self._engine.machine.blocks)
            if not self._unscrubbed:
                return LOOK_EVERY_S
            self._next_pass_s = now_s + PASS_EVERY_S
        if not self._engine.is_busy:
            self._quiet_until_s = now_s + WAIT_FOR_QUIET_S
        elif now_s < self._quiet_until_s:
            return LOOK_EVERY_S
        return self._scrub_some(self._unscrubbed) / SCRUB_BYTES_PER_S

    def _scrub_some(self, keys: deque[BlockKey]) -> int:
        with self._engine.lock:
            self.mend_slots([keys[at] for at in range(min(len(keys), BATCH_BLOCKS))])
        batch = self._taken(keys, lambda _: True)
        self._counts["scrubbed"] += self._look(batch)
        return sum(block.location.stored_bytes for block in batch)

    def _taken(self, keys: deque[BlockKey], is_wanted: Callable[["_Block"], bool]) -> list[_Block]:
        """The first blocks of a list, which are taken off it, as far as they are in host memory and wanted."""
        batch, nbytes, left = [], 0, BATCH_BLOCKS
        with self._engine.lock:
            while keys and nbytes < BATCH_BYTES and left:
                left -= 1
                block = self._block(keys.popleft())
                if block is not None and is_wanted(block):
                    batch.append(block)
                    nbytes += block.location.stored_bytes
        return batch

    def _look(self, batch: list[_Block]) -> int:
        """Hash blocks without a lock, then seal those without a seal and give damaged ones up; returns how many were sound."""
        host = self._storage.host
        verdicts = [host.judge(*block) for block in batch]
        sound = 0
        with self._engine.lock:
            for block, (is_sound, digest) in zip(batch, verdicts, strict=True):
                present = self._block(block.key)
                if present is None or present.location is not block.location:
                    continue  # it left, and its bytes may be another's by now
                sound += is_sound
                if not is_sound:
                    self._give_up(block)
                elif digest is not None:
                    host.headers.seal(block.location.offset, digest)
                    self._counts["sealed"] += 1
        return sound

    def _suspect(self, key: BlockKey) -> None:
        """Find out whether a block that could not be copied elsewhere is damaged."""
        with self._engine.lock:
            block = self._block(key)
            if block is not None and not self._storage.host.judge(*block)[0]:
                self._give_up(block)

    def _settle_suspects(self) -> None:
        """Give up damaged blocks that somebody read when they were found."""
        for key in list(self._suspects):
            with self._engine.lock:
                if self._block(key) is None:
                    del self._suspects[key]
                elif not self._is_read(key):
                    self._suspect(key)
                    self._suspects.pop(key, None)

    def _block(self, key: BlockKey) -> _Block | None:
        """The block, if it is in host memory; the engine's lock is held."""
        block = self._engine.machine.blocks.get(key)
        location = block.copies.get(Tier.HOST) if block else None
        return None if location is None else _Block(key, location)

    def _is_read(self, key: BlockKey) -> bool:
        """Whether somebody reads the block's bytes, so that they must stay."""
        machine = self._engine.machine
        return machine.blocks[key].copying_to is not None or machine.pinned(key)

    def _give_up(self, block: _Block) -> None:
        """Drop a damaged copy, or remember to while somebody reads it; the engine's lock is held."""
        if self._block(block.key) != block:
            return
        if block.key not in self._suspects:
            self._counts["flipped"] += 1
            log.warning("block %s is damaged in host memory and is given up there", block.key.hex())
        if self._is_read(block.key):
            self._suspects[block.key] = None
        else:
            self._engine.handle([ev.Lost(block.key, block.location)])
