"""The place of a node's blocks: its shared memory, its device pool, its disk folder and its packs, and the way of bytes between them.

This is the engine's `Mover`: it knows index, tiers and frames, and decides nothing.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TypeVar

import torch

from tiered_kv.blocks import AWAY, PEER, Location, Tier
from tiered_kv.codecs.frame import Frame, open_frame, open_pieces
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.pinned import register_host, unregister_host
from tiered_kv.memory.shared import NodeFiles, reclaim_stale
from tiered_kv.node.allowance import Allowance
from tiered_kv.node.compression import BlockData, CodedBlock, Coder, put, raw_frame
from tiered_kv.node.quarantine import ExtentQuarantine
from tiered_kv.node.recovery import CROWDED_PART, Recovery
from tiered_kv.node.tier_factory import device_tier, disk_tier, objects_tier, own_name
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.store import events as ev
from tiered_kv.store.engine import COPY_BATCH_BYTES, Filled, Form, Room
from tiered_kv.store.shrinking import FULL_SHARE, staging_bytes
from tiered_kv.threads import DaemonThreads, work_alone
from tiered_kv.tiers.device import DeviceTier
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.host import FRAME_DIGEST, HostTier, Lineage
from tiered_kv.tiers.log import LogTier, Record
from tiered_kv.tiers.objects.mounted import MountedPacks

log = logging.getLogger(__name__)
T = TypeVar("T")

REQUESTS_AT_ONCE = 8  # to object storage, where one takes some 50 ms whatever its size
AGING_SEGMENTS = 2
"""With room for fewer segments than this left, the oldest one is copied down."""


class NodeStorage:
    """Files, index and tiers of one node. Not thread-safe but for `append`, `coded`, `fill`, `keep`, `frames` and `put`.

    Files that a node of the same ids left behind are taken over; `restore` says what is in them. `mounted_bytes`: how much of a
    checkpoint the index should have room for.
    """

    def __init__(self, config: Config, cluster_id: str, node_id: str, mounted_bytes: int = 0) -> None:
        self.coder = Coder(config)
        self.allowance = Allowance(self.coder)
        reclaim_stale(config.shm_path, time.monotonic_ns())
        lower_bytes = config.disk + (config.objects_cap if config.objects else 0) + mounted_bytes
        self._files, self._inherited = NodeFiles.open_or_create(config.shm_path, cluster_id, node_id, config.host, lower_bytes)
        self.directory = self._files.directory
        self.keeps_disk = config.disk_path is not None
        self._objects_folder = config.objects_folder and f"{config.objects_folder}/{own_name(cluster_id, node_id)}"
        self.logs: dict[Tier, LogTier] = {}
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
                self.device = device_tier(config, self.directory, self.index.generation)
            undo.pop_all()
        self._is_pinned = self.device is not None and self.device.pool.device.type == "cuda" and register_host(self._arena)
        self._memory = {Tier.HOST: self.host} | ({Tier.DEVICE: self.device} if self.device else {})
        self.quarantine = ExtentQuarantine(self.host, self._files.arena_fd)
        self._device_turn = threading.Lock()  # the pool is for one thread at a time
        self._device_errors: dict[int, float] = {}  # by offset, of blocks that were lossy before they came there
        self._requests = DaemonThreads(REQUESTS_AT_ONCE, "tkv-get")  # starts no thread before it is used
        self.on_suspect: Callable[[BlockKey], object] = lambda key: None
        """Called for a block in host memory whose bytes were found to be damaged."""
        self.beat()

    @property
    def disk(self) -> DiskTier | None:
        return self.logs.get(Tier.DISK)  # type: ignore[return-value]

    @property
    def capacities(self) -> dict[Tier, int]:
        """The caps of the tiers that there are."""
        return {tier: store.capacity_bytes for tier, store in (self._memory | self.logs).items()}

    def restore(self) -> list[ev.Recovered]:
        """Returns what the files of a former node hold, the least recently used first, for the machine. To be called once."""
        recovery, self._recovery = self._recovery, None
        assert recovery is not None
        found = recovery.restore(self.free)
        if self._inherited:
            self.quarantine.find_writers()
        return found

    # The engine's mover

    @property
    def index_room(self) -> int:
        """How many more blocks the index can show."""
        return self.index.capacity_blocks - len(self.index)

    def batch_bytes(self, tier: Tier) -> int:
        """A batch for objects is a pack; a small tier must not lose most of its blocks for one batch."""
        if tier is Tier.OBJECTS:
            return self.logs[tier].segment_bytes
        return min(COPY_BATCH_BYTES, self.logs[tier].segment_bytes) if tier in self.logs else COPY_BATCH_BYTES

    def fits(self, tier: Tier, nbytes: int) -> bool:
        return self._memory[tier].fits(nbytes)

    def reserve(self, tier: Tier, nbytes: int, count: int, room: Room) -> list[int]:
        if tier is not Tier.HOST or not self.coder.shrinks or room is Room.ANYWHERE:
            return self._memory[tier].reserve(nbytes, count)
        capacity_bytes = self.host.capacity_bytes
        if room is Room.APART:
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

    def form(self, copy: ev.Copy) -> Form:
        source = copy.source
        if copy.target is not Tier.HOST:
            return Form(0, source.raw_bytes)
        return self._form_in_host(Form(source.codec, source.stored_bytes), source.raw_bytes, copy.root)

    def form_of(self, frame: Frame, root: BlockKey) -> Form:
        """What the block of a frame that a peer sent will be in host memory."""
        return self._form_in_host(Form(frame.codec.id, frame.nbytes), frame.raw_bytes, root)

    def _form_in_host(self, present: Form, raw_bytes: int, root: BlockKey | None) -> Form:
        """A block that is coded stays so where host memory keeps frames of its model, else it lies there raw."""
        return present if present.codec and self.coder.keeps_frames(root) else Form(0, raw_bytes)

    def fill(self, copies: Sequence[ev.Copy], locations: Sequence[Location]) -> list[Filled]:
        if locations[0].tier is Tier.DEVICE:
            return self._to_device(copies, locations)
        read = self._requests.map if copies[0].source.tier in AWAY else map
        return list(read(self._fill, copies, locations))

    def _fill(self, copy: ev.Copy, location: Location) -> Filled:
        try:
            held = self._held(copy.key, copy.source)
            self.put(held, location, Lineage(copy.key, copy.parent, copy.root, copy.depth))
        except TieredKVError as error:
            away = copy.source.tier in AWAY and error.kind is not Kind.CORRUPT and not error.context.get("missing")
            why = str(error)  # the error itself holds on to the arena
            log.warning("block %s in %s cannot be read: %s", copy.key.hex(), copy.source.tier.label, why)
            return Filled.LATER if away else Filled.GONE
        return Filled.DONE

    def put(self, held: BlockData, location: Location, lineage: Lineage) -> int:
        """Write a block, raw or as its frame, into a reserved extent of host memory, then sign and seal it.

        Returns its digest. Raises (kind `corrupt`), also for a block that may not be shown.
        """
        self.allowance.check(held, lineage)
        payload = self.host.payload(location.offset, location.stored_bytes)
        if location.codec:
            put(held.frame.pieces, payload)
        elif held.frame is not None:
            held.frame.decode(payload)
        else:
            payload.copy_(held.raw)
        digest = FRAME_DIGEST if location.codec else self.host.headers.digest(location.offset, location.stored_bytes)
        self.sign(location, lineage, held.error, digest)
        return digest

    def sign(self, location: Location, lineage: Lineage, error: float = 0.0, digest: int | None = None) -> None:
        """Say whose bytes lie in an extent of host memory, and how; with their digest the extent is sealed."""
        key, parent, root, depth, *_ = lineage
        _, codec, _, offset, nbytes, raw_bytes = location
        self.host.sign(offset, Lineage(key, parent, root, depth, codec, nbytes, raw_bytes, error), FRAME_DIGEST if codec else digest)

    def coded(self, copy: ev.Copy) -> CodedBlock | None:
        return self._attempted(copy.key, copy.source, lambda held: self.coder.coded(copy, held))

    def settle_in(self) -> None:
        work_alone()

    def keep(self, copy: ev.Copy, coded: CodedBlock, offset: int) -> Location:
        location = Location(Tier.HOST, coded.codec, 0, offset, coded.nbytes, coded.raw_bytes)
        put(coded.pieces, self.host.payload(offset, coded.nbytes))
        self.sign(location, Lineage(copy.key, copy.parent, copy.root, copy.depth))
        return location

    def append(self, tier: Tier, copies: Sequence[ev.Copy], coded: Sequence[CodedBlock | None]) -> list[Location | None]:
        pairs = [(copy, block) for copy, block in zip(copies, coded, strict=True) if block is not None]
        records = [Record(copy.key, block.pieces, block.codec, block.raw_bytes, copy.parent, copy.root) for copy, block in pairs]
        answers = iter(self.logs[tier].append(records))
        locations = []
        refused: Counter[str] = Counter()
        for block in coded:
            answer = next(answers) if block is not None else None
            locations.append(answer.location if answer else None)
            if answer and answer.refused:
                refused[answer.refused] += 1
        for reason, count in refused.items():
            log.warning("%s: %d of %d blocks were not written: %s", tier.label, count, len(copies), reason)
        return locations

    def _held(self, key: BlockKey, location: Location) -> BlockData:
        """The block where it lies, its bytes or frame being views of host memory where they are there; raises if it cannot be read."""
        if location.tier is Tier.DEVICE:
            raw = torch.empty(location.raw_bytes, dtype=torch.uint8)
            with self._device_turn:
                self.device.pool.copy_out(location.offset, location.raw_bytes, raw).wait()
            return BlockData(raw, error=self._device_errors.get(location.offset, 0.0))
        if location.tier is not Tier.HOST:
            place = self.mounted if location.tier is Tier.CHECKPOINT else self.logs[location.tier]
            return BlockData.of(place.read(location, key))
        payload = self.host.payload(location.offset, location.stored_bytes)
        if location.codec:
            return BlockData.of(open_frame(payload, key))._replace(verify=lambda: self.host.verify(key, location))
        return BlockData(payload, error=self.host.lineage(location.offset).error, verify=lambda: self.host.verify(key, location))

    def decoded(self, key: BlockKey, location: Location) -> BlockData | None:
        """The raw bytes of a block, and the error that they carry; None if it is damaged, or its codec is not known here."""
        return self._attempted(key, location, lambda held: held._replace(raw=held.decoded()))

    def _attempted(self, key: BlockKey, location: Location, use: Callable[[BlockData], T]) -> T | None:
        try:
            return use(self._held(key, location))
        except TieredKVError as error:
            log.warning("block %s in %s cannot be read: %s", key.hex(), location.tier.label, str(error))
            if location.tier is Tier.HOST and error.kind is Kind.CORRUPT:
                self.on_suspect(key)
            return None

    def segment_to_go(self, tier: Tier, sizes: Sequence[int]) -> int | None:
        place = self.logs[tier]
        is_lowest = tier is max(self.logs)  # elsewhere a block that goes may be below as well, and keep its slot
        crowded = is_lowest and self.index_room < self.index.capacity_blocks // CROWDED_PART
        segment = place.oldest_sealed() if crowded else None
        if segment is None:
            fitting = [nbytes for nbytes in sizes if nbytes <= place.max_frame_bytes]
            segment = place.needs_reclaim(sum(fitting), len(fitting))
        return segment

    def segment_to_age(self, tier: Tier) -> int | None:
        place = self.logs[tier]
        ahead_bytes = min(AGING_SEGMENTS * place.segment_bytes, place.capacity_bytes // 4)
        return place.oldest_sealed() if place.capacity_bytes - place.used_bytes < ahead_bytes else None

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

    def _to_device(self, copies: Sequence[ev.Copy], locations: Sequence[Location]) -> list[Filled]:
        blocks = [self.decoded(copy.key, copy.source) for copy in copies]  # kept until the copies have happened
        with self._device_turn:
            tickets = []
            for block, location in zip(blocks, locations, strict=True):
                if block is not None:
                    tickets.append(self.device.pool.copy_in(location.offset, block.raw))
                    if block.error:
                        self._device_errors[location.offset] = block.error
            for ticket in tickets:
                ticket.wait()
        return [self._copied_whole(copy, block) for copy, block in zip(copies, blocks, strict=True)]

    def _copied_whole(self, copy: ev.Copy, block: BlockData | None) -> Filled:
        """How the copy of a block went that `decoded` gave: its bytes are verified now that they were read."""
        try:
            if block is None:
                return Filled.GONE
            block.verify()
        except TieredKVError as error:
            log.warning("block %s in %s cannot be copied: %s", copy.key.hex(), copy.source.tier.label, str(error))
            self.on_suspect(copy.key)
            return Filled.GONE
        return Filled.DONE

    # Peers

    def frames(self, blocks: Iterable[tuple[BlockKey, BlockKey | None, Location]]) -> Iterator[FramePieces]:
        """Blocks (key, root, location) as frames, up to the first that cannot be read. Of host memory these are views: pin them."""
        for key, root, location in blocks:
            pieces = self._attempted(key, location, lambda held, key=key, root=root: raw_frame(key, root, held))
            if pieces is None:
                return
            yield pieces

    def opened(self, key: BlockKey, pieces: FramePieces, root: BlockKey) -> Frame | None:
        """The frame that a peer sent, if it is undamaged, that of `key`, and may be shown as a block below `root`."""
        try:
            frame = open_pieces(pieces, key)
            if self.allowance.admits(key, root, frame.codec.id, frame.error):
                return frame
            self.allowance.refuse(PEER, 1)
            return None
        except (TieredKVError, ValueError, TypeError) as error:  # a peer may send anything, also what is no frame at all
            log.warning("a frame for block %s was refused: %s", key.hex(), str(error))
            return None

    # Figures

    def usage(self) -> dict[str, dict]:
        """Bytes used and allowed, by tier, the fastest first."""
        places = self._memory | self.logs | ({Tier.CHECKPOINT: self.mounted} if self.mounted.used_bytes else {})
        return {
            tier.label: {"used_bytes": places[tier].used_bytes, "capacity_bytes": places[tier].capacity_bytes} for tier in sorted(places)
        }

    def beat(self) -> None:
        """Say that the node lives, and look after what dead workers held."""
        self.index.beat(time.monotonic_ns())
        self.quarantine.release()

    def is_in_place(self) -> bool:
        """Whether the directory and the socket in it still have their names."""
        return self._files.is_in_place() and self._files.sock_path.exists()

    def check(self, blocks: Mapping[BlockKey, object], reservations: Iterable[Mapping[int, int]]) -> None:
        """Assert that index, tiers and reservations are those of these machine blocks, and that no tier is above its cap."""
        self.index.check()
        for place in (self._memory | self.logs).values():
            place.check()
            assert place.used_bytes <= place.capacity_bytes
        assert dict(self.index.items()) == {key: block.best for key, block in blocks.items()}
        used = [location.offset for block in blocks.values() for tier, location in block.copies.items() if tier is Tier.HOST]
        used += [offset for reserved in reservations for offset in reserved]
        starts = [self.host.extent_range(offset, 0)[0] for offset in used] + self.quarantine.starts()
        assert sorted(starts) == self.host.extents.offsets(), "extents leaked, or are used twice"

    def close(self, remove: bool) -> None:
        """Let go of everything; with `remove`, readers see a closed node and all files are deleted but for a disk folder that was named.

        Shared memory comes first: what hangs is a disk or an object store.
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
            with suppress(OSError):  # it may be gone, or hold what could not be deleted
                os.rmdir(self._objects_folder)

    def withdraw(self) -> None:
        """Show readers a closed node and delete the files in shared memory, while threads that hang may still look into them."""
        self._files.withdraw()

    def _close_tiers(self, remove: bool) -> None:
        self.mounted.close()
        if self.device:
            self.device.pool.close(remove)
        for tier, place in self.logs.items():
            if tier is Tier.DISK:
                place.close(remove=remove and not self.keeps_disk)
            else:
                place.close(remove)
