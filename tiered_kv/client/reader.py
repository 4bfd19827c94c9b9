"""Reads blocks from the node's shared memory, device pool and disk segments, without a call to the node.

A block in memory is copied first and verified after the copy has finished: the sequence number of its slot must be the same as before
(a seqlock), and in host memory the header in front of the bytes must name the block's key. So a damaged slot is a miss. If the block
is encoded, its frame is copied and verified, then decoded straight into the tensor of the fetch. A block on disk is verified by its
frame's checksum, which includes the key. Some blocks are hidden from this process: those in objects or a checkpoint, and those on a
device that it cannot map. The node must load them into host memory first.
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
from tiered_kv.client.counts import CountPages
from tiered_kv.client.decoders import Decoders
from tiered_kv.client.kv_copy import ArenaBlocks, CopyRun, runs_of
from tiered_kv.client.page_copy import Pages
from tiered_kv.client.profile import Timed
from tiered_kv.codecs import CODECS
from tiered_kv.codecs.frame import Frame, open_frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.layout import Layout
from tiered_kv.memory.pool import DevicePool
from tiered_kv.memory.view import NodeView, Slot
from tiered_kv.threads import DaemonThreads
from tiered_kv.tiers.disk.segments import SegmentReader
from tiered_kv.tiers.host import ExtentHeaders

log = logging.getLogger(__name__)

T = TypeVar("T")

READS_AHEAD = 4
"""The most blocks on disk that are read at the same time for one worker. Each needs memory for one block."""
LOOK_AGAIN_S = 0.01  # the interval of checks for the deadline, while a disk is slow
_IN_MEMORY = (Tier.DEVICE, Tier.HOST)
_CODEC_IDS = frozenset(codec.id for codec in CODECS)
_MAY_HIDE = {int(Tier.DEVICE), *map(int, AWAY)}


class FoundBlock(NamedTuple):
    """A block's key, and the contents of its slot in the index."""

    key: BlockKey
    slot: Slot


class DiskMeter(NamedTuple):
    """`is_over()`: whether to give up a read from disk before its deadline. `now_s()`: the clock.

    `note(read, wanted, seconds)`: called after a read with the bytes that were read and wanted.
    """

    is_over: Callable[[], bool]
    now_s: Callable[[], float]
    note: Callable[[int, int, float], None]


class BlockSource:
    """One worker's view of its node's blocks, for one layout.

    `verifies`: whether fetches compare uncompressed blocks with their seals (the setting `verify_host`).
    """

    def __init__(
        self,
        view: NodeView,
        segments: SegmentReader | None,
        layout: Layout,
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
        """Whether uncompressed blocks are hashed when they are stored and when they are fetched."""
        self._decoders = Decoders()
        self.counts = CountPages(view.directory if view.identity else None, layout)
        """The counts that the node reads for its metrics."""
        self._doubted: list[BlockKey] = []
        self.invalidated = 0
        """The number of copies thrown away because the block changed during the copy."""

    def measure(self, timed: Timed) -> None:
        """As `Client.measure`, for look-ups, copies and decoding."""
        vars(self).update(
            find=timed("look-up", self.find),
            lookup_all=timed("look-up", self.lookup_all),
            _read_memory=timed("copy", self._read_memory),
            _decode=timed("decode", self._decode),
        )

    def find(self, keys: Sequence[BlockKey]) -> list[FoundBlock]:
        """Returns the leading keys that the index contains, with their slots. About 0.7 µs a block, no call."""
        if not self._view.live:
            return []
        return list(map(FoundBlock, keys, self._view.lookup_leading(keys, self._layout.block_bytes)))

    def lookup_all(self, keys: Sequence[BlockKey]) -> list[Slot | None]:
        """Returns each key's slot; None if the index does not contain the key, or if the slot is invalid for this layout."""
        if not self._view.live:
            return [None] * len(keys)
        slots = [self._view.lookup(key) for key in keys]
        raw_bytes = self._layout.block_bytes
        return [slot if slot is not None and slot.raw_bytes == raw_bytes and slot.codec in _CODEC_IDS else None for slot in slots]

    @staticmethod
    def tiers_of(found: Sequence[FoundBlock]) -> set[int]:
        """Returns the tiers of the found blocks."""
        return {slot.tier for _, slot in found}

    def hidden(self, found: Sequence[FoundBlock], tiers: set[int] | None = None) -> list[BlockKey]:
        """Returns the keys of the found blocks that this process cannot read itself. `tiers`: their tiers, if the caller has them."""
        tiers = self.tiers_of(found) if tiers is None else tiers
        hiding = {tier for tier in tiers & _MAY_HIDE if tier != Tier.DEVICE or not self._sees_device()}
        return [key for key, slot in found if slot.tier in hiding] if hiding else []

    def _sees_device(self) -> bool:
        return self._device is not None and self._device.blocks() is not None

    def read(
        self, found: Sequence[FoundBlock], kv_L2HND: torch.Tensor, expired: Callable[[], bool], meter: DiskMeter | None = None
    ) -> list[FoundBlock]:
        """Copy or decode the found blocks to the first tokens of `kv`. Returns the blocks before the first that could not be read.

        Once `expired()` is true, blocks on disk and encoded blocks are no longer read. `meter` measures the reads from disk.
        """
        done = 0
        while done < len(found):
            tier, is_coded, end = found[done].slot.tier, bool(found[done].slot.codec), done + 1
            while end < len(found) and found[end].slot.tier == tier and bool(found[end].slot.codec) == is_coded:
                end += 1
            good = self._read_alike(found[done:end], done, kv_L2HND, expired, meter)
            if done + good < end and self._read_again(found[done + good].key, done + good, kv_L2HND, expired, meter):
                good += 1
                end = done + good
            done += good
            if done < end:
                break
        return list(found[:done])

    def _read_alike(
        self, found: Sequence[FoundBlock], first: int, kv: torch.Tensor, expired: Callable[[], bool], meter: DiskMeter | None = None
    ) -> int:
        """Read blocks of one tier that are all encoded or all uncompressed. Returns how many leading blocks were read."""
        slot = found[0].slot
        if slot.tier not in _IN_MEMORY:
            return self._read_disk(found, first, kv, expired, meter)
        return self._read_coded(found, first, kv, expired) if slot.codec else self._read_memory(found, first, kv)

    def _read_coded(self, found: Sequence[FoundBlock], first: int, kv: torch.Tensor, expired: Callable[[], bool]) -> int:
        """Decode encoded blocks in host memory until `expired()` is true. Returns how many leading blocks were decoded."""

        def read(each: FoundBlock, block: int) -> bool:
            frame = None if expired() else self._frame(each)
            return frame is not None and self._decode(each.key, frame, block, kv)

        with self._decoders.side_by_side() as results:
            for block, each in enumerate(found, first):
                results.add(read, each, block)
        return results.leading

    def _frame(self, found: FoundBlock) -> Frame | None:
        """Returns a copy of the frame of a block in host memory; None if the block changed meanwhile, or the frame is invalid."""
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
        """Decode a frame to the tokens of `block` in `kv`. Returns whether that succeeded."""
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
        """Returns the keys of the blocks and slots that were found damaged since the last call."""
        doubted, self._doubted = self._doubted, []
        if damaged := self._view.damaged:
            doubted += [damaged.pop() for _ in range(len(damaged))]
        return doubted

    def digest(self, offset: int, nbytes: int) -> int:
        """Returns the digest of the `nbytes` bytes at `offset` of the arena."""
        return self._headers.digest(offset, nbytes)

    def _read_memory(self, found: Sequence[FoundBlock], first: int, kv: torch.Tensor) -> int:
        """Copy uncompressed blocks of one tier in memory. Returns how many leading blocks did not change during the copy."""
        offsets = [each.slot.offset for each in found]
        runs = runs_of(offsets, first)
        if found[0].slot.tier == Tier.HOST:
            for run in runs:
                self.arena.unpack(run, kv)
            _settle(kv)
            return self._believed(found, offsets)
        if self._device is None or not self._device.unpack(runs, kv):
            return 0
        return self._believed(found, None)

    def read_pages(self, found: Sequence[FoundBlock], pages: Pages, blocks: Sequence[int]) -> int:
        """Copy uncompressed blocks in host memory to the pages of an engine's `blocks`.

        Returns how many leading blocks were copied without damage or change.
        """
        offsets = [each.slot.offset for each in found]
        pages.scatter(self.memory, offsets, blocks)
        return self._believed(found, offsets)

    @property
    def memory(self) -> torch.Tensor:
        """The node's arena, 1-D uint8."""
        return self._view.arena

    def _believed(self, found: Sequence[FoundBlock], offsets: Sequence[int] | None) -> int:
        """Returns how many leading blocks did not change while they were copied.

        `offsets`: the payload offsets of blocks in host memory, whose headers are compared too; None for blocks on the device.
        """
        # The headers are compared before `all_valid`, so that its result covers them too.
        named = len(found) if offsets is None else self._named(found, offsets)
        if named == len(found) and self._view.all_valid([each.slot for each in found]):
            return named
        for count, each in enumerate(found):
            if not self._view.valid(each.slot):
                self.invalidated += 1
                return count
            if count == named:
                self._doubt(each.key, TieredKVError(Kind.CORRUPT, "its header or seal does not match its key or bytes in host memory"))
                return count
        return len(found)

    def _named(self, found: Sequence[FoundBlock], offsets: Sequence[int]) -> int:
        """Returns how many leading blocks have a header that names their key, and with `verify_host` also a seal that matches."""
        if not self.verifies and self._headers.name_all(offsets, [each.key for each in found]):
            return len(found)
        is_its_own = self._is_sealed_for if self.verifies else self._headers.names
        return next((count for count, (key, slot) in enumerate(found) if not is_its_own(slot.offset, key)), len(found))

    def _is_sealed_for(self, offset: int, key: BlockKey) -> bool:
        """Returns whether the header names the key, and the seal matches header and bytes. A block without a seal passes."""
        headers = self._headers
        return headers.names(offset, key) and headers.matches(offset, headers.digest(offset, self._layout.block_bytes)) is not False

    def _read_disk(
        self, found: Sequence[FoundBlock], first: int, kv: torch.Tensor, expired: Callable[[], bool], meter: DiskMeter | None
    ) -> int:
        """Read and decode blocks on disk until `expired()` is true. Returns how many leading blocks were read."""
        if self._disk is None or found[0].slot.tier != Tier.DISK:
            return 0
        begun_s, read = meter.now_s() if meter else 0.0, 0
        frames = self._disk.frames(found, lambda: expired() or meter.is_over()) if meter else self._disk.frames(found, expired)
        with self._decoders.side_by_side() as results:
            for block, (each, frame) in enumerate(zip(found, frames, strict=False), first):
                results.add(self._decode, each.key, frame, block, kv)
                read += each.slot.stored_bytes
        if meter:
            meter.note(read, sum(each.slot.stored_bytes for each in found), meter.now_s() - begun_s)
        return results.leading

    def _read_again(self, key: BlockKey, block: int, kv: torch.Tensor, expired: Callable[[], bool], meter: DiskMeter | None = None) -> bool:
        """Try once more to read a block that may have moved during the read. Returns whether that succeeded."""
        found = self.find([key])
        return bool(found) and key not in self._doubted and self._read_alike(found, block, kv, expired, meter) == 1

    def touch(self, used: Sequence[FoundBlock | Slot]) -> None:
        """Report used blocks to the node's eviction policy, the deepest block first."""
        if used:
            self._view.touch([each.slot if isinstance(each, FoundBlock) else each for each in reversed(used)])

    def tally(self, asked: int, hit: int, saved_tokens: int = 0, saved_us: int = 0) -> None:
        """Add to the node's counts of requested blocks, hits, and saved prefill tokens and microseconds."""
        self._view.tally(asked, hit, saved_tokens, saved_us)

    def tally_declined(self, label: str, tokens: int) -> None:
        """Add to the node's counts of tokens that were not loaded because computing them is faster. `label`: of the tier that had them."""
        self._view.tally_declined(label, tokens)

    @property
    def live(self) -> bool:
        """False once the node has shut down in an orderly way. A node that was killed still counts as live."""
        return self._view.live

    @property
    def generation(self) -> int:
        """The generation of the node's present life. Read it before reserving extents, and pass it to `guard`."""
        return self._view.generation

    def guard(self, ranges: Sequence[tuple[int, int]], generation: int) -> AbstractContextManager[bool]:
        """A context for packing into reserved (offset, bytes) ranges of the arena.

        Yields True, or False if the node's generation is no longer `generation`: it was restarted, and nothing may be written.
        """
        return self._view.guard(ranges, generation)

    @property
    def peers(self) -> int:
        """The number of other live nodes that the node knows of."""
        return self._view.peers if self._view.live else 0

    @property
    def reason_of_miss(self) -> str:
        """The reason why a block that the index does not contain is a miss, in words."""
        return "not stored here, or evicted" if self._view.live else "the node is closed"

    @property
    def retries(self) -> int:
        """The number of look-ups and reads during which the block changed."""
        return self._view.retries + self.invalidated

    def close(self) -> None:
        """Unmap memory and close open segments. Later reads raise `AttributeError` or `ValueError`, as do reads that are running."""
        for name in ("arena", "_headers"):  # their tensors keep the memory mapped
            vars(self).pop(name, None)
        if self._device is not None:
            self._device.close()
        self._decoders.close()
        self.counts.close()
        self._view.close()
        if self._disk is not None:
            self._disk.close()


class DiskReader:
    """Reads blocks from the node's segments in threads of its own, up to READS_AHEAD in advance. A hanging disk blocks no caller."""

    def __init__(self, segments: SegmentReader) -> None:
        self._segments = segments
        self._threads = DaemonThreads(READS_AHEAD, "tkv-read")  # threads start when they are first needed

    def frames(self, found: Sequence[FoundBlock], expired: Callable[[], bool]) -> Iterator[Frame]:
        """Yields the verified frame of each block. Ends at the first block that cannot be read, or once `expired()` is true.

        Threads read into memory of their own, so that a late read cannot write to the caller's tensor.
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

    def _read(self, found: FoundBlock) -> Frame | None:
        slot = found.slot
        location = Location(Tier.DISK, slot.codec, slot.segment, slot.offset, slot.stored_bytes, slot.raw_bytes)
        try:
            return self._segments.read(location, found.key)
        except TieredKVError as error:
            log.info("block %s cannot be read from disk: %s", found.key.hex(), error)
            return None

    def close(self) -> None:
        """Close the segments' files without waiting for reads. A file that is being read is closed by its last reader."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._segments.close()


def _outcome(future: Future[T], expired: Callable[[], bool]) -> T | None:
    """Returns the result of a read, or None if the read is not done when `expired()` becomes true."""
    while not future.done() and not expired():
        wait([future], LOOK_AGAIN_S)
    return future.result() if future.done() else None


class DeviceReader:
    """This process's mapping of the node's device pool. It is opened at its first use, and again after a restart of the node."""

    def __init__(self, view: NodeView, layout: Layout) -> None:
        self._view = view
        self._layout = layout
        self._pool: DevicePool | None = None
        self._blocks: ArenaBlocks | None = None
        self._identity = -1
        self._lock = threading.Lock()
        forking.register(self)

    def after_fork(self) -> None:
        """Renew the lock in a child process: a thread of the parent may have held it."""
        self._lock = threading.Lock()

    def blocks(self) -> ArenaBlocks | None:
        """Returns the blocks in the pool of the node's present life; None if this process cannot map the pool."""
        return self._present()[1]

    def _present(self) -> tuple[DevicePool | None, ArenaBlocks | None]:
        identity = self._view.identity
        with self._lock:
            if identity != self._identity:
                self._open(identity)
            return self._pool, self._blocks

    def _open(self, identity: int) -> None:
        self.close()
        try:
            self._pool = DevicePool.open(self._view.directory)
        except TieredKVError as error:
            log.warning("cannot map the node's device pool, so its blocks are read through host memory: %s", error)
            self._identity = identity
        # If they differ, the node is about to create a new pool, or the files mapped here were removed and the pool is a later node's.
        if self._pool is not None and self._pool.generation == identity:
            self._blocks = ArenaBlocks(self._pool.tensor, self._layout)
            self._identity = identity

    def unpack(self, runs: Iterable[CopyRun], kv: torch.Tensor) -> bool:
        """Copy runs of blocks to their tokens of `kv`, and wait until the copy has finished.

        Returns False if the pool cannot be read, or if the node was restarted with another pool meanwhile.
        """
        pool, blocks = self._present()
        runs = list(runs)
        if pool is None or blocks is None or not all(map(blocks.holds, runs)):
            return False
        with pool.copies(kv) as ticket:
            for run in runs:
                blocks.unpack(run, kv)
        ticket.wait()
        return pool.generation == self._view.identity

    def close(self) -> None:
        """Unmap the pool."""
        self._blocks = None
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _settle(kv: torch.Tensor) -> None:
    """Wait until the copies into `kv` have finished. Copies on the CPU have finished already."""
    if not kv.is_cpu:
        torch.accelerator.synchronize(kv.device)
