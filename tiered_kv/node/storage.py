"""A node's storage: shared memory, device pool, disk folder and packs, and the transfer of blocks between them.

This is the engine's `Mover`: it handles index, tiers and frames, and makes no decisions.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TypeVar, cast

import torch

from tiered_kv.blocks import AWAY, PEER, BlockInfo, Location, Tier
from tiered_kv.codecs import codec_by_id
from tiered_kv.codecs.frame import Frame, open_frame, open_pieces
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.pinned import register_host, unregister_host
from tiered_kv.memory.shared import NodeFiles, reclaim_stale
from tiered_kv.node.allowance import Allowance
from tiered_kv.node.compression import BlockData, BlockEncoder, EncodedFrame, put, raw_frame
from tiered_kv.node.quarantine import ExtentQuarantine
from tiered_kv.node.recovery import CROWDED_PART, Recovery
from tiered_kv.node.tier_factory import device_tier, disk_tier, objects_tier, own_name
from tiered_kv.protocol.messages import TierStats
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.store import events as ev
from tiered_kv.store.engine import COPY_BATCH_BYTES, BlockFormat, EncodedBlock, FillOutcome, Room
from tiered_kv.store.movement import Block
from tiered_kv.store.shrinking import FULL_SHARE, staging_bytes
from tiered_kv.threads import DaemonThreads, work_alone
from tiered_kv.tiers.device import DeviceTier
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.host import FRAME_DIGEST, BlockHeader, HostTier
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objects.mounted import MountedPacks
from tiered_kv.tiers.objects.tier import ObjectsTier

log = logging.getLogger(__name__)
T = TypeVar("T")

REQUESTS_AT_ONCE = 8  # to object storage, where a request takes some 50 ms whatever its size
AGING_SEGMENTS = 2
"""When a tier has room left for fewer segments than this, its oldest one is copied to a lower tier."""


class NodeStorage:
    """Files, index and tiers of one node. Only `append`, `coded`, `fill`, `keep`, `frames` and `put` are thread-safe.

    It takes over files that a node with the same ids left behind; `restore` returns their blocks. `mounted_bytes`: the bytes of
    checkpoint blocks that the index should have room for.
    """

    def __init__(self, config: Config, cluster_id: str, node_id: str, mounted_bytes: int = 0) -> None:
        self.encoder = BlockEncoder(config)
        self.allowance = Allowance(self.encoder)
        reclaim_stale(config.shm_path, time.monotonic_ns())
        lower_bytes = config.disk + (config.objects_cap if config.objects else 0) + mounted_bytes
        self._files, self._inherited = NodeFiles.open_or_create(config.shm_path, cluster_id, node_id, config.host, lower_bytes)
        self.directory = self._files.directory
        self.keeps_disk = config.disk_path is not None
        self._objects_folder = config.objects_folder and f"{config.objects_folder}/{own_name(cluster_id, node_id)}"
        self.logs: dict[Tier, DiskTier | ObjectsTier] = {}
        self.mounted = MountedPacks()
        self.device: DeviceTier | None = None
        with ExitStack() as undo:
            undo.callback(self._files.close if self._inherited else self._files.remove)
            undo.callback(self._close_tiers, remove=not self._inherited)
            if config.disk:
                self.logs[Tier.DISK] = disk_tier(config, cluster_id, node_id)
            if config.objects:
                self.logs[Tier.OBJECTS] = objects_tier(config, cluster_id, node_id)
            self.index = IndexWriter(self._files)
            undo.callback(self.index.close)
            self._arena = self._files.arena.tensor()
            undo.callback(delattr, self, "_arena")
            self.host = HostTier(self._arena)
            undo.callback(self.host.close)
            self._recovery: Recovery | None = Recovery(self.index, self.host, self.logs, self.allowance, inherited=self._inherited)
            if config.device:
                self.device = device_tier(config, self.directory, self.index.identity)
            undo.pop_all()
        assert self._files.arena_fd is not None
        self._is_pinned = self.device is not None and self.device.pool.device.type == "cuda" and register_host(self._arena)
        self._memory: dict[Tier, HostTier | DeviceTier] = {Tier.HOST: self.host}
        if self.device:
            self._memory[Tier.DEVICE] = self.device
        self.quarantine = ExtentQuarantine(self.host, self._files.arena_fd)
        self._device_turn = threading.Lock()  # only one thread at a time may use the pool
        self._device_errors: dict[int, float] = {}  # by offset: errors of blocks that were lossy before they were copied to the device
        self._requests = DaemonThreads(REQUESTS_AT_ONCE, "tkv-get")  # starts its threads at the first use
        self.checksum_failures: Counter[Tier] = Counter()
        """By tier: blocks that were damaged when they were read there. `Seals.stats` has those of host memory."""
        self.write_refusals: Counter[tuple[str, str]] = Counter()
        """By reason and codec: blocks that a lower tier did not write."""
        self.on_suspect: Callable[[BlockKey], object] = lambda key: None
        """Called with the key of a block in host memory that proved to be damaged when it was read."""
        self.beat()

    @property
    def disk(self) -> DiskTier | None:
        """The disk tier, if the node has one."""
        return cast("DiskTier | None", self.logs.get(Tier.DISK))

    @property
    def capacities(self) -> dict[Tier, int]:
        """The cap of each tier in bytes."""
        return {tier: store.capacity_bytes for tier, store in self._tiers().items()}

    def _tiers(self) -> dict[Tier, HostTier | DeviceTier | DiskTier | ObjectsTier]:
        """Returns all tiers of the node. Mounted checkpoints are not among them."""
        return {**self._memory, **self.logs}

    def restore(self) -> list[ev.Recovered]:
        """Returns the blocks in a former node's files, the least recently used first, for the machine. Call it once."""
        recovery, self._recovery = self._recovery, None
        assert recovery is not None
        found = recovery.restore(self.free)
        if self._inherited:
            self.quarantine.find_writers()
        return found

    # The engine's mover

    @property
    def index_room(self) -> int:
        """The number of blocks that the index still has room for."""
        return self.index.capacity_blocks - len(self.index)

    def batch_bytes(self, tier: Tier) -> int:
        """As `Mover.batch_bytes`: a pack for objects, and at most a segment for disk, so that a batch evicts few blocks of a small tier."""
        if tier is Tier.OBJECTS:
            return self.logs[tier].segment_bytes
        return min(COPY_BATCH_BYTES, self.logs[tier].segment_bytes) if tier in self.logs else COPY_BATCH_BYTES

    def fits(self, tier: Tier, nbytes: int) -> bool:
        return self._memory[tier].fits(nbytes)

    def reserve(self, tier: Tier, nbytes: int, count: int, room: Room) -> list[int]:
        if tier is not Tier.HOST or not self.encoder.shrinks or room is Room.ANYWHERE:
            return self._memory[tier].reserve(nbytes, count)
        capacity_bytes = self.host.capacity_bytes
        if room is Room.COMPRESSED:
            return self.host.reserve_apart(nbytes, staging_bytes(capacity_bytes))
        return self.host.stage(nbytes, count, staging_bytes(capacity_bytes), int(capacity_bytes * FULL_SHARE))

    def free(self, location: Location) -> None:
        if location.tier is Tier.DEVICE:
            self._device_errors.pop(location.offset, None)
        if location.tier in self._memory:
            self._memory[location.tier].free(location.offset)
        elif location.tier is Tier.CHECKPOINT:
            self.mounted.forget(location)
        else:
            self.logs[location.tier].forget(location)

    # Blocks from one tier to another

    def form(self, copy: ev.Copy) -> BlockFormat:
        source = copy.source
        if copy.target is not Tier.HOST:
            return BlockFormat(0, source.raw_bytes)
        return self.form_in_host(BlockFormat(source.codec, source.stored_bytes), source.raw_bytes, copy.info.root)

    def form_of(self, frame: Frame, root: BlockKey | None) -> BlockFormat:
        """Returns the block format that a frame from a peer gets in host memory."""
        return self.form_in_host(BlockFormat(frame.codec.id, frame.nbytes), frame.raw_bytes, root)

    def form_in_host(self, present: BlockFormat, raw_bytes: int, root: BlockKey | None) -> BlockFormat:
        """Returns the block format in host memory of a block: its `present` format if host memory keeps frames of its model, else raw."""
        return present if present.codec and self.encoder.keeps_frames(root) else BlockFormat(0, raw_bytes)

    def fill(self, copies: Sequence[ev.Copy], locations: Sequence[Location]) -> list[FillOutcome]:
        if locations[0].tier is Tier.DEVICE:
            return self._to_device(copies, locations)
        read = self._requests.map if copies[0].source.tier in AWAY else map
        return list(read(self._load, copies, locations))

    def _load(self, copy: ev.Copy, location: Location) -> FillOutcome:
        try:
            block = self._read(copy.key, copy.source)
            self.put(block, location, copy.info)
        except TieredKVError as error:
            away = copy.source.tier in AWAY and error.kind is not Kind.CORRUPT and not error.context.get("missing")
            why = str(error)  # the error object itself would keep the arena mapped
            self._note_damage(copy.source.tier, error)
            log.warning("block %s in %s cannot be read: %s", copy.key.hex(), copy.source.tier.label, why)
            return FillOutcome.LATER if away else FillOutcome.GONE
        return FillOutcome.DONE

    def put(self, block: BlockData, location: Location, info: BlockInfo) -> int:
        """Write a block, raw or as its frame, into a reserved extent of host memory. Then write its header and its seal.

        Returns the block's digest. Raises (kind `corrupt`) if the block does not decode or is too lossy.
        """
        self.allowance.check(block, info)
        payload = self.host.payload(location.offset, location.stored_bytes)
        if location.codec:
            assert block.frame is not None
            put(block.frame.pieces, payload)
        elif block.frame is not None:
            block.frame.decode(payload)
        else:
            payload.copy_(block.decoded())
        digest = FRAME_DIGEST if location.codec else self.host.headers.digest(location.offset, location.stored_bytes)
        self.sign(location, info, block.error, digest)
        return digest

    def sign(self, location: Location, info: BlockInfo, error: float = 0.0, digest: int | None = None) -> None:
        """Write the header of an extent in host memory: its block, codec and sizes. With a digest, the header also gets a seal."""
        _, codec, _, offset, nbytes, raw_bytes = location
        self.host.sign(offset, BlockHeader(info, codec, nbytes, raw_bytes, error), FRAME_DIGEST if codec else digest)

    def coded(self, copy: ev.Copy) -> EncodedFrame | None:
        return self._try_read(copy.key, copy.source, lambda block: self.encoder.coded(copy, block))

    def settle_in(self) -> None:
        work_alone()

    def keep(self, copy: ev.Copy, coded: EncodedBlock, offset: int) -> Location:
        assert isinstance(coded, EncodedFrame)
        location = Location(Tier.HOST, coded.codec, 0, offset, coded.nbytes, coded.raw_bytes)
        put(coded.pieces, self.host.payload(offset, coded.nbytes))
        self.sign(location, copy.info)
        return location

    def append(self, tier: Tier, copies: Sequence[ev.Copy], coded: Sequence[EncodedBlock | None]) -> list[Location | None]:
        pairs = [(copy, block) for copy, block in zip(copies, coded, strict=True) if isinstance(block, EncodedFrame)]
        records = [Record(copy.info, block.pieces, block.codec, block.raw_bytes) for copy, block in pairs]
        answers = iter(self.logs[tier].append(records))
        locations: list[Location | None] = []
        refused: Counter[str] = Counter()
        for block in coded:
            answer = next(answers) if block is not None else None
            locations.append(answer.location if answer else None)
            if answer and answer.refused:
                refused[answer.refused] += 1
                assert isinstance(block, EncodedFrame)
                self.write_refusals[answer.refused.value, codec_by_id(block.codec).name] += 1
        for reason, count in refused.items():
            log.warning("%s: %d of %d blocks were not written: %s", tier.label, count, len(copies), reason)
        return locations

    def _read(self, key: BlockKey, location: Location) -> BlockData:
        """Returns the block at `location`. A block in host memory is returned as a view of its bytes. Raises if it cannot be read."""
        if location.tier is Tier.DEVICE:
            assert self.device is not None
            raw = torch.empty(location.raw_bytes, dtype=torch.uint8)
            with self._device_turn:
                self.device.pool.copy_out(location.offset, location.raw_bytes, raw).wait()
            return BlockData(raw, error=self._device_errors.get(location.offset, 0.0))
        if location.tier is not Tier.HOST:
            store = self.mounted if location.tier is Tier.CHECKPOINT else self.logs[location.tier]
            return BlockData.of(store.read(location, key))
        payload = self.host.payload(location.offset, location.stored_bytes)
        if location.codec:
            return BlockData.of(open_frame(payload, key))._replace(verify=lambda: self.host.verify(key, location))
        return BlockData(payload, error=self.host.header(location.offset).error, verify=lambda: self.host.verify(key, location))

    def decoded(self, key: BlockKey, location: Location) -> BlockData | None:
        """Returns a block with its raw bytes and their error; None if it is damaged, or its codec is not known here."""
        return self._try_read(key, location, lambda block: block._replace(raw=block.decoded()))

    def _try_read(self, key: BlockKey, location: Location, use: Callable[[BlockData], T]) -> T | None:
        """Read a block and call `use` with it. Returns its result, or None, with a line in the log, if that fails."""
        try:
            return use(self._read(key, location))
        except TieredKVError as error:
            log.warning("block %s in %s cannot be read: %s", key.hex(), location.tier.label, str(error))
            self._note_damage(location.tier, error)
            if location.tier is Tier.HOST and error.kind is Kind.CORRUPT:
                self.on_suspect(key)
            return None

    def _note_damage(self, tier: Tier, error: TieredKVError) -> None:
        if error.kind is Kind.CORRUPT and not error.context.get("too_lossy") and tier is not Tier.HOST:
            self.checksum_failures[tier] += 1

    def segment_to_go(self, tier: Tier, sizes: Sequence[int]) -> int | None:
        log_tier = self.logs[tier]
        is_lowest = tier is max(self.logs)  # blocks dropped from another tier may also be in a lower one, and keep their slots
        crowded = is_lowest and self.index_room < self.index.capacity_blocks // CROWDED_PART
        segment = log_tier.oldest_sealed() if crowded else None
        if segment is None:
            fitting = [nbytes for nbytes in sizes if nbytes <= log_tier.max_frame_bytes]
            segment = log_tier.needs_reclaim(sum(fitting), len(fitting))
        return segment

    def segment_to_age(self, tier: Tier) -> int | None:
        log_tier = self.logs[tier]
        ahead_bytes = min(AGING_SEGMENTS * log_tier.segment_bytes, log_tier.capacity_bytes // 4)
        return log_tier.oldest_sealed() if log_tier.capacity_bytes - log_tier.used_bytes < ahead_bytes else None

    def keys_in(self, tier: Tier, segment: int) -> list[BlockKey]:
        return self.logs[tier].keys_in(segment)

    def segment_bytes(self, tier: Tier) -> int:
        return self.logs[tier].segment_bytes

    def reinsert(self, tier: Tier, segment: int, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, Location]]:
        assert tier is Tier.DISK
        assert self.disk is not None
        return self.disk.reinsert(segment, keys)

    def drop_segment(self, tier: Tier, segment: int) -> None:
        self.logs[tier].reclaim(segment)

    def _to_device(self, copies: Sequence[ev.Copy], locations: Sequence[Location]) -> list[FillOutcome]:
        assert self.device is not None
        blocks = [self.decoded(copy.key, copy.source) for copy in copies]  # keeps their bytes alive until the copies have ended
        with self._device_turn:
            tickets = []
            for block, location in zip(blocks, locations, strict=True):
                if block is not None:
                    tickets.append(self.device.pool.copy_in(location.offset, block.decoded()))
                    if block.error:
                        self._device_errors[location.offset] = block.error
            for ticket in tickets:
                ticket.wait()
        return [self._verified(copy, block) for copy, block in zip(copies, blocks, strict=True)]

    def _verified(self, copy: ev.Copy, block: BlockData | None) -> FillOutcome:
        """Returns the outcome of a copy of `block` to the device. The bytes are verified here, after they were copied."""
        try:
            if block is None:
                return FillOutcome.GONE
            block.verify()
        except TieredKVError as error:
            log.warning("block %s in %s cannot be copied to the device: %s", copy.key.hex(), copy.source.tier.label, str(error))
            self.on_suspect(copy.key)
            return FillOutcome.GONE
        return FillOutcome.DONE

    # Peers

    def frames(self, blocks: Iterable[tuple[BlockKey, BlockKey | None, Location]]) -> Iterator[FramePieces]:
        """Yields blocks (key, root, location) as frames, up to the first that cannot be read.

        Frames of blocks in host memory are views, so the caller must pin the blocks.
        """
        for key, root, location in blocks:
            pieces = self._frame(key, root, location)
            if pieces is None:
                return
            yield pieces

    def _frame(self, key: BlockKey, root: BlockKey | None, location: Location) -> FramePieces | None:
        return self._try_read(key, location, lambda block: raw_frame(key, root, block))

    def sealed_header(self, key: BlockKey, location: Location) -> bytes | None:
        """Returns the header of a raw block in host memory, with its seal. A block without a seal is verified and sealed first.

        Returns b"" for a frame, and None if the block is damaged. The block must stay pinned during the call.
        """
        if location.codec:
            return b""
        if not self.host.headers.is_sealed(location.offset) and self._try_read(key, location, lambda block: block.verify() or True) is None:
            return None
        return self.host.headers.sealed(location.offset)

    def opened(self, key: BlockKey, pieces: FramePieces, root: BlockKey) -> Frame | None:
        """Returns the frame in `pieces` from a peer, or None if it is damaged, not of `key`, or too lossy for the model of `root`."""
        return self._admitted(key, root, lambda: open_pieces(pieces, key))

    def opened_whole(self, key: BlockKey, buffer: memoryview, root: BlockKey) -> Frame | None:
        """As `opened`, for a frame that fills `buffer`."""
        return self._admitted(key, root, lambda: open_frame(buffer, key))

    def _admitted(self, key: BlockKey, root: BlockKey, read: Callable[[], Frame]) -> Frame | None:
        try:
            frame = read()
            if self.allowance.admits(key, root, frame.codec.id, frame.error):
                return frame
            self.allowance.refuse(PEER, 1, frame.codec.id)
            return None
        except (TieredKVError, ValueError, TypeError) as error:  # a peer may send anything, even bytes that are no frame
            log.warning("a frame from a peer for block %s was refused: %s", key.hex(), str(error))
            return None

    # Figures

    def usage(self) -> dict[str, TierStats]:
        """Returns bytes used and allowed by tier, the fastest first."""
        sizes = {tier: (store.used_bytes, store.capacity_bytes) for tier, store in self._tiers().items()}
        if self.mounted.used_bytes:
            sizes[Tier.CHECKPOINT] = self.mounted.used_bytes, self.mounted.capacity_bytes
        return {tier.label: {"used_bytes": used, "capacity_bytes": capacity} for tier, (used, capacity) in sorted(sizes.items())}

    def beat(self) -> None:
        """Write the node's heartbeat, and free extents of dead workers."""
        self.index.beat(time.monotonic_ns())
        self.quarantine.release()

    def is_in_place(self) -> bool:
        """Returns whether the node's directory and the socket in it still have their names."""
        return self._files.is_in_place() and self._files.sock_path.exists()

    def check(self, blocks: Mapping[BlockKey, Block], reservations: Iterable[Mapping[int, int]]) -> None:
        """Assert that index, tiers and reservations agree with the machine's `blocks`, and that no tier is above its cap."""
        self.index.check()
        for store in self._tiers().values():
            store.check()
            assert store.used_bytes <= store.capacity_bytes
        assert dict(self.index.items()) == {key: block.best for key, block in blocks.items()}
        used = [location.offset for block in blocks.values() for tier, location in block.copies.items() if tier is Tier.HOST]
        used += [offset for reserved in reservations for offset in reserved]
        starts = [self.host.extent_range(offset, 0)[0] for offset in used] + self.quarantine.starts()
        assert sorted(starts) == self.host.extents.offsets(), "extents of host memory are leaked or used twice"

    def close(self, remove: bool) -> None:
        """Close everything. With `remove`, readers see a closed node, and all files are deleted except a configured disk folder.

        Shared memory is closed first, because only a disk or an object store can hang.
        """
        self._requests.shutdown()
        if remove:
            self.index.close_state()
        self.index.close()
        if self._is_pinned:
            unregister_host(self._arena)
        del self._arena
        self.host.close()
        self._files.remove() if remove else self._files.close()
        self._close_tiers(remove)
        if remove and self._objects_folder:
            with suppress(OSError):  # it may not exist, or have files that could not be deleted
                os.rmdir(self._objects_folder)

    def withdraw(self) -> None:
        """Show readers a closed node and delete the files in shared memory. Threads that hang may still read the mapped memory."""
        self._files.withdraw()

    def _close_tiers(self, remove: bool) -> None:
        self.mounted.close()
        if self.device:
            self.device.pool.close(remove)
        for tier, log_tier in self.logs.items():
            log_tier.close(remove and not (tier is Tier.DISK and self.keeps_disk))
