"""Where a worker reads blocks: the node's shared memory, its device pool and its disk segments, all without asking the node.

A block in memory is copied first and believed after: its slot's sequence number must be what it was before the copy (a
seqlock), the copy must have happened, and in host memory the header in front of the bytes must name the block's key: so a damaged
slot is a miss. Of a block that is coded there, the frame is copied, believed, and then decoded straight
to where its tokens belong. A block on disk is believed because its frame's checksum binds it to its key.
Blocks in objects or a checkpoint, and on a device that this process does not see, are hidden: the node has to bring them.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from itertools import islice
from typing import NamedTuple, TypeVar

import torch

from tiered_kv import forking
from tiered_kv.blocks import AWAY, Location, Tier
from tiered_kv.client.decoders import Decoders
from tiered_kv.client.kv_copy import ArenaBlocks, Run, runs_of
from tiered_kv.codecs import CODECS
from tiered_kv.codecs.frame import Frame, open_frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.layout import KVLayout
from tiered_kv.memory.pool import DevicePool
from tiered_kv.memory.view import NodeView, Slot
from tiered_kv.threads import DaemonThreads
from tiered_kv.tiers.disk.segments import SegmentReader
from tiered_kv.tiers.host import ExtentHeaders

log = logging.getLogger(__name__)

T = TypeVar("T")

READS_AHEAD = 4
"""Disk blocks that are read at the same time for one worker; each takes a block's memory."""
LOOK_AGAIN_S = 0.01  # at the clock, while a disk is slow
_IN_MEMORY = (Tier.DEVICE, Tier.HOST)
_CODEC_IDS = frozenset(codec.id for codec in CODECS)
_MAY_HIDE = {int(Tier.DEVICE), *map(int, AWAY)}


class Found(NamedTuple):
    """A block of a prompt that the index shows."""

    key: BlockKey
    slot: Slot


class BlockSource:
    """One worker's view of its node's blocks, for one layout. `verifies`: whether raw blocks are compared with their seals."""

    def __init__(
        self,
        view: NodeView,
        segments: SegmentReader | None,
        layout: KVLayout,
        *,
        has_device: bool = False,
        verifies: bool = False,
    ) -> None:
        self._view = view
        self._disk = DiskReader(segments) if segments is not None else None
        self._layout = layout
        self._device = DeviceReader(view, layout) if has_device else None
        self.arena = ArenaBlocks(view.arena, layout)
        self._headers = ExtentHeaders(view.arena)
        self.verifies = verifies
        """Whether blocks are hashed when they are stored, and when they are fetched."""
        self._decoders = Decoders()
        self._doubted: list[BlockKey] = []
        self.invalidated = 0
        """Blocks that were changed while they were copied, so that the copy was thrown away."""

    def measure(self, timed: Callable[[str, Callable], Callable]) -> None:
        """As `Client.measure`: what looks up, copies and decodes."""
        self.find, self.lookup_all = timed("look-up", self.find), timed("look-up", self.lookup_all)
        self._read_memory = timed("copy", self._read_memory)
        self._decode = timed("decode", self._decode)

    def find(self, keys: Sequence[BlockKey]) -> list[Found]:
        """The leading keys that the index shows. About 0.7 µs a block, no call."""
        if not self._view.live:
            return []
        return list(map(Found, keys, self._view.lookup_leading(keys, self._layout.block_bytes)))

    def lookup_all(self, keys: Sequence[BlockKey]) -> list[Slot | None]:
        """For every key what the index shows; None also where that cannot be right."""
        if not self._view.live:
            return [None] * len(keys)
        slots = [self._view.lookup(key) for key in keys]
        raw_bytes = self._layout.block_bytes
        return [slot if slot is not None and slot.raw_bytes == raw_bytes and slot.codec in _CODEC_IDS else None for slot in slots]

    def hidden(self, found: Sequence[Found]) -> list[BlockKey]:
        """Those of the found blocks that this process cannot read where they are."""
        tiers = {slot.tier for _, slot in found}
        hiding = {tier for tier in tiers & _MAY_HIDE if tier != Tier.DEVICE or not self._sees_device()}
        return [key for key, slot in found if slot.tier in hiding] if hiding else []

    def _sees_device(self) -> bool:
        return self._device is not None and self._device.blocks() is not None

    def read(self, found: Sequence[Found], kv_L2HND: torch.Tensor, expired: Callable[[], bool]) -> list[Found]:
        """Copy or decode the found blocks to the first tokens of `kv`; those that came whole, up to the first that did not.

        Blocks on disk, and coded ones, count as missing once `expired()`.
        """
        done = 0
        while done < len(found):
            tier, is_coded, end = found[done].slot.tier, bool(found[done].slot.codec), done + 1
            while end < len(found) and found[end].slot.tier == tier and bool(found[end].slot.codec) == is_coded:
                end += 1
            good = self._read_alike(found[done:end], done, kv_L2HND, expired)
            if done + good < end and self._read_again(found[done + good].key, done + good, kv_L2HND, expired):
                good += 1
                end = done + good
            done += good
            if done < end:
                break
        return list(found[:done])

    def _read_alike(self, found: Sequence[Found], first: int, kv: torch.Tensor, expired: Callable[[], bool]) -> int:
        """Read blocks of one tier that are all coded or all not; how many of them, from the first on, were had."""
        slot = found[0].slot
        if slot.tier not in _IN_MEMORY:
            return self._read_disk(found, first, kv, expired)
        return self._read_coded(found, first, kv, expired) if slot.codec else self._read_memory(found, first, kv)

    def _read_coded(self, found: Sequence[Found], first: int, kv: torch.Tensor, expired: Callable[[], bool]) -> int:
        """Decode blocks that are coded in host memory; how many of them, from the first on, before `expired()`."""

        def read(each: Found, block: int) -> bool:
            frame = None if expired() else self._frame(each)
            return frame is not None and self._decode(each.key, frame, block, kv)

        with self._decoders.side_by_side() as results:
            for block, each in enumerate(found, first):
                results.add(read, each, block)
        return results.leading

    def _frame(self, found: Found) -> Frame | None:
        """The frame of a block in host memory, copied; None if it changed meanwhile, or is none."""
        slot = found.slot
        data = self._view.extent(slot.offset, slot.stored_bytes).numpy().copy()
        if not self._view.valid(slot):
            self.invalidated += 1
            return None
        try:
            return open_frame(data, found.key)
        except TieredKVError as error:
            self._doubt(found.key, error)
            return None

    def _decode(self, key: BlockKey, frame: Frame, block: int, kv: torch.Tensor) -> bool:
        """Whether a frame gave the block that belongs to these tokens of `kv`."""
        t = self._layout.block_tokens
        try:
            frame.decode_kv(kv.detach()[..., block * t : (block + 1) * t, :])
        except TieredKVError as error:
            self._doubt(key, error)
            return False
        return True

    def _doubt(self, key: BlockKey, error: TieredKVError) -> None:
        log.warning("block %s cannot be read: %s", key.hex(), error)
        self._doubted.append(key)

    def doubted(self) -> list[BlockKey]:
        """Blocks that were not what the index shows, since this was last asked."""
        doubted, self._doubted = self._doubted, []
        if damaged := self._view.damaged:
            doubted += [damaged.pop() for _ in range(len(damaged))]
        return doubted

    def digest(self, offset: int, nbytes: int) -> int:
        """The digest of what was packed at `offset`."""
        return self._headers.digest(offset, nbytes)

    def _read_memory(self, found: Sequence[Found], first: int, kv: torch.Tensor) -> int:
        """Copy blocks of one tier in memory; how many of them, from the first on, did not change during the copy."""
        offsets = [each.slot.offset for each in found]
        runs, named = runs_of(offsets, first), len(found)
        if found[0].slot.tier == Tier.HOST:
            for run in runs:
                self.arena.unpack(run, kv)
            _settle(kv)
            named = self._named(found, offsets)  # before `valid`: what that says holds for the headers as well
        elif self._device is None or not self._device.unpack(runs, kv):
            return 0
        if named == len(found) and self._view.all_valid([each.slot for each in found]):
            return named
        for count, each in enumerate(found):
            if not self._view.valid(each.slot):
                self.invalidated += 1
                return count
            if count == named:
                self._doubt(each.key, TieredKVError(Kind.CORRUPT, "the bytes in host memory are not those that were stored under it"))
                return count
        return len(found)

    def _named(self, found: Sequence[Found], offsets: Sequence[int]) -> int:
        """How many blocks, from the first on, have headers that name their keys; with `verify_host`, and seals that match."""
        if not self.verifies and self._headers.name_all(offsets, [each.key for each in found]):
            return len(found)
        is_its_own = self._is_sealed_for if self.verifies else self._headers.names
        return next((count for count, (key, slot) in enumerate(found) if not is_its_own(slot.offset, key)), len(found))

    def _is_sealed_for(self, offset: int, key: BlockKey) -> bool:
        """Whether the header names the key, and header and bytes are what the seal was made of; so far none is no fault."""
        headers = self._headers
        return headers.names(offset, key) and headers.matches(offset, headers.digest(offset, self._layout.block_bytes)) is not False

    def _read_disk(self, found: Sequence[Found], first: int, kv: torch.Tensor, expired: Callable[[], bool]) -> int:
        """Copy blocks of a lower tier; how many of them, from the first on, could be read before `expired()`."""
        if self._disk is None or found[0].slot.tier != Tier.DISK:
            return 0
        with self._decoders.side_by_side() as results:
            for block, (each, frame) in enumerate(zip(found, self._disk.frames(found, expired), strict=False), first):
                results.add(self._decode, each.key, frame, block, kv)
        return results.leading

    def _read_again(self, key: BlockKey, block: int, kv: torch.Tensor, expired: Callable[[], bool]) -> bool:
        """One more try for a block that moved while it was read: it may be in another place by now."""
        found = self.find([key])
        return bool(found) and key not in self._doubted and self._read_alike(found, block, kv, expired) == 1

    def touch(self, used: Sequence[Found | Slot]) -> None:
        """Tell the policy what was used, the deepest block first."""
        if used:
            self._view.touch([each.slot if isinstance(each, Found) else each for each in reversed(used)])

    def tally(self, asked: int, hit: int, saved_tokens: int = 0, saved_us: int = 0) -> None:
        """Add to the node's count of blocks asked for and had, and of the prefill that this saved."""
        self._view.tally(asked, hit, saved_tokens, saved_us)

    @property
    def live(self) -> bool:
        """Whether the node has not shut down on purpose."""
        return self._view.live

    @property
    def generation(self) -> int:
        """Which of the node's lives this is; read it before reserving, for `guard`."""
        return self._view.generation

    def guard(self, ranges: Sequence[tuple[int, int]], generation: int) -> AbstractContextManager[bool]:
        """Hold the reserved (offset, bytes) ranges of the arena while packing; false when the node has another life by now."""
        return self._view.guard(ranges, generation)

    @property
    def peers(self) -> int:
        """Other nodes that live, as far as this one knows."""
        return self._view.peers if self._view.live else 0

    @property
    def reason_of_miss(self) -> str:
        """Why a block that the index does not show is a miss."""
        return "not stored here, or evicted" if self._view.live else "the node is closed"

    @property
    def retries(self) -> int:
        """Look-ups and reads that met a block being changed."""
        return self._view.retries + self.invalidated

    def close(self) -> None:
        """Give mapped memory and open segments back."""
        self.arena = self._headers = None
        if self._device is not None:
            self._device.close()
        self._decoders.close()
        self._view.close()
        if self._disk is not None:
            self._disk.close()


class DiskReader:
    """Reads blocks from the node's segments on threads of its own, some ahead, so that a disk that hangs holds nobody up."""

    def __init__(self, segments: SegmentReader) -> None:
        self._segments = segments
        self._threads = DaemonThreads(READS_AHEAD, "tkv-read")  # starts none before it is used

    def frames(self, found: Sequence[Found], expired: Callable[[], bool]) -> Iterator[Frame]:
        """The verified frame of each block in turn, up to the first that cannot be read, or that is not here when it is `expired()`.

        What a thread reads lies in memory of its own: one that comes too late writes to nobody's tensor.
        """
        ahead: deque[Future[Frame | None]] = deque()
        rest = iter(found)
        try:
            while not expired():
                ahead += (self._threads.submit(self._read, each) for each in islice(rest, READS_AHEAD - len(ahead)))
                frame = _outcome(ahead.popleft(), expired) if ahead else None
                if frame is None:
                    return
                yield frame
        finally:
            for future in ahead:
                future.cancel()

    def _read(self, found: Found) -> Frame | None:
        slot = found.slot
        location = Location(Tier.DISK, slot.codec, slot.segment, slot.offset, slot.stored_bytes, slot.raw_bytes)
        try:
            return self._segments.read(location, found.key)
        except TieredKVError as error:
            log.info("block %s is not readable on disk: %s", found.key.hex(), error)
            return None

    def close(self) -> None:
        """Let go of the segments' files; waits for no read. A file that is being read is closed by its last reader."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._segments.close()


def _outcome(future: Future[T], expired: Callable[[], bool]) -> T | None:
    """What a read gives; None if it is not done when it is `expired()`."""
    while not future.done() and not expired():
        wait([future], LOOK_AGAIN_S)
    return future.result() if future.done() else None


class DeviceReader:
    """The node's device pool as this process sees it; opened when first needed, and again after the node was restarted."""

    def __init__(self, view: NodeView, layout: KVLayout) -> None:
        self._view = view
        self._layout = layout
        self._pool: DevicePool | None = None
        self._blocks: ArenaBlocks | None = None
        self._generation = -1
        self._lock = threading.Lock()
        forking.register(self)

    def after_fork(self) -> None:
        """In a child process: a thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def blocks(self) -> ArenaBlocks | None:
        """The blocks of the pool of the node's present life; None where this process cannot map it."""
        return self._present()[1]

    def _present(self) -> tuple[DevicePool | None, ArenaBlocks | None]:
        generation = self._view.generation
        with self._lock:
            if generation != self._generation:
                self._open(generation)
            return self._pool, self._blocks

    def _open(self, generation: int) -> None:
        self.close()
        try:
            self._pool = DevicePool.open(self._view.directory)
        except TieredKVError as error:
            log.warning("blocks on the device come by host memory: %s", error)
            self._generation = generation
        if self._pool is not None and self._pool.generation == generation:  # else the node is about to make a new one
            self._blocks = ArenaBlocks(self._pool.tensor, self._layout)
            self._generation = generation

    def unpack(self, runs: Iterable[Run], kv: torch.Tensor) -> bool:
        """Copy runs of blocks to their tokens of `kv`; returns when it has happened.

        False where the pool cannot be read, or the node has begun another life with another pool meanwhile.
        """
        pool, blocks = self._present()
        runs = list(runs)
        if pool is None or blocks is None or not all(map(blocks.holds, runs)):
            return False
        with pool.copies(kv) as ticket:
            for run in runs:
                blocks.unpack(run, kv)
        ticket.wait()
        return pool.generation == self._view.generation

    def close(self) -> None:
        """Let go of the pool."""
        self._blocks = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _settle(kv: torch.Tensor) -> None:
    """Wait until the copies into `kv` have happened; on the CPU they have."""
    if kv.device.type != "cpu":
        torch.accelerator.synchronize(kv.device)
