"""The place of a node's blocks: its shared memory and its disk folder, and the way of bytes between them.

This is the engine's `Mover`: it knows index, tiers and frames, and decides nothing.
"""

import fcntl
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs import RawCodec
from tiered_kv.codecs.frame import encode_frame, frame_bytes, open_pieces
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.locks import locked_ranges
from tiered_kv.memory.shared import NodeFiles, reclaim_stale
from tiered_kv.service.link import FramePieces
from tiered_kv.store import events as ev
from tiered_kv.store.engine import COPY_BATCH_BYTES
from tiered_kv.tiers.disk import DiskTier, Record
from tiered_kv.tiers.host import HostTier, Lineage

log = logging.getLogger(__name__)

_RAW = RawCodec()
_UNKNOWN_ROOT = bytes(KEY_BYTES)


class Place:
    """Files, index and tiers of one node. Not thread-safe but for `to_disk`, `to_host`, `frames` and `unpack`.

    Files that a node of the same ids left behind are taken over; `restore` says what is in them.
    """

    def __init__(self, config: Config, cluster_id: str, node_id: str) -> None:
        reclaim_stale(config.shm_path, time.monotonic_ns())
        self._files, self._inherited = NodeFiles.open_or_create(config.shm_path, cluster_id, node_id, config.host, config.disk)
        self.directory = self._files.directory
        try:
            self.disk = _disk_tier(config, cluster_id, node_id) if config.disk else None
        except TieredKVError:
            self._files.close() if self._inherited else self._files.remove()
            raise
        self.index = IndexWriter(self._files)
        self.host = HostTier(self._files.arena.tensor())
        self._abandoned: dict[int, int] = {}  # extents by their start, that somebody may still be writing to
        self.beat()

    def restore(self) -> list[ev.Committed]:
        """What the files of a former node hold, the least recently used first, to be reported to the machine."""
        if self._inherited:
            self.index.rebuild()
        on_disk = {key: location for key, location in self.index.items() if location.tier is Tier.DISK}
        unknown = self.disk.adopt(on_disk) if self.disk else on_disk
        foreign = [key for key, location in self.index.items() if location.tier is Tier.HOST and not self._claim(key, location)]
        for key in [*unknown, *foreign]:
            self.index.remove(key)
        if self._inherited:
            self._quarantine()
            log.info("took over %d blocks; %d could not be", len(self.index), len(unknown) + len(foreign))
        last_use = {key: tick for key, _, tick in self.index.harvest()}
        blocks = sorted(self.index.items(), key=lambda item: last_use.get(item[0], 0))
        return [self._committed(key, location) for key, location in blocks]

    def _claim(self, key: BlockKey, location: Location) -> bool:
        """Whether the extent of an index entry is its own, by its header."""
        try:
            self.host.claim(location.offset, location.stored_bytes)
        except TieredKVError:
            return False
        try:
            ours = self.host.lineage(location.offset).key == key
        except TieredKVError:
            ours = False
        if not ours:
            self.host.free(location.offset)
        return ours

    def _committed(self, key: BlockKey, location: Location) -> ev.Committed:
        if location.tier is Tier.HOST:
            _, parent, root = self.host.lineage(location.offset)
            return ev.Committed(key, parent, root, location)
        return ev.Committed(key, None, None, location)

    def _quarantine(self) -> None:
        """Keep free ranges out of use that a worker of the former node is still packing into."""
        for start, nbytes in locked_ranges(self._files.arena_fd, self.host.extents.free_ranges()):
            self.host.extents.claim(start, nbytes)
            self._abandoned[start] = nbytes

    @property
    def index_room(self) -> int:
        """How many more blocks the index can show."""
        return self.index.capacity_blocks - len(self.index)

    @property
    def batch_bytes(self) -> int:
        """How much to write to disk in one go: a small disk must not lose most of its blocks for one batch."""
        return min(COPY_BATCH_BYTES, self.disk.segment_bytes) if self.disk else COPY_BATCH_BYTES

    def fits(self, nbytes: int) -> bool:
        return self.host.fits(nbytes)

    def reserve(self, nbytes: int, count: int) -> list[int]:
        return self.host.reserve(nbytes, count)

    def free(self, location: Location) -> None:
        if location.tier is Tier.HOST:
            self.host.free(location.offset)
        elif self.disk:
            self.disk.forget(location)

    def abandon(self, reserved: Mapping[int, int]) -> None:
        """Take back the extents of a session that ended: at once, or once nobody holds a lock on them any more."""
        for offset, nbytes in reserved.items():
            start, length = self.host.extent_range(offset, nbytes)
            self._abandoned[start] = length
        self._free_abandoned()

    def _free_abandoned(self) -> None:
        for start, nbytes in list(self._abandoned.items()):
            if not locked_ranges(self._files.arena_fd, [(start, nbytes)]):
                self.host.extents.free(start)
                del self._abandoned[start]

    def to_disk(self, copies: Sequence[ev.Copy]) -> list[Location | None]:
        records = []
        for copy in copies:
            raw = self.host.payload(copy.source.offset, copy.source.stored_bytes)
            records.append(Record(copy.key, encode_frame(copy.key, copy.root or _UNKNOWN_ROOT, _RAW, raw), _RAW.id, copy.source.raw_bytes))
        answers = self.disk.append(records)
        refused = Counter(answer.refused for answer in answers if answer.refused)
        for reason, count in refused.items():
            log.warning("disk: %d of %d blocks were not written: %s", count, len(answers), reason)
        return [answer.location for answer in answers]

    def to_host(self, copy: ev.Copy, location: Location) -> bool:
        try:
            frame = self.disk.read(copy.source, copy.key)
            frame.decode(self.host.payload(location.offset, location.raw_bytes))
        except TieredKVError as error:
            log.warning("block %s on disk is given up: %s", copy.key.hex(), str(error))  # the error itself holds on to the arena
            return False
        self.host.sign(location.offset, Lineage(copy.key, copy.parent, copy.root))
        return True

    def disk_room(self, copies: Sequence[ev.Copy]) -> tuple[int, list[BlockKey]] | None:
        crowded = self.index_room < self.index.capacity_blocks // 10
        segment = self.disk.oldest_sealed() if crowded else None
        if segment is None:
            fitting = [
                size for size in (frame_bytes(_RAW, copy.source.stored_bytes) for copy in copies) if size <= self.disk.max_frame_bytes
            ]
            segment = self.disk.needs_reclaim(sum(fitting))
        return None if segment is None else (segment, self.disk.keys_in(segment))

    def drop_segment(self, segment: int) -> None:
        self.disk.reclaim(segment)

    def frames(self, blocks: Iterable[tuple[BlockKey, BlockKey | None, Location]]) -> Iterator[FramePieces]:
        """Blocks (key, root, location) as frames, up to the first that cannot be read. Host payloads are views: pin them."""
        for key, root, location in blocks:
            try:
                if location.tier is Tier.HOST:
                    raw = self.host.payload(location.offset, location.stored_bytes)
                else:
                    raw = torch.empty(location.raw_bytes, dtype=torch.uint8)
                    self.disk.read(location, key).decode(raw)
            except TieredKVError as error:
                log.warning("block %s cannot be served: %s", key.hex(), str(error))
                return
            yield encode_frame(key, root or _UNKNOWN_ROOT, _RAW, raw)

    def unpack(self, key: BlockKey, pieces: FramePieces, payload: torch.Tensor) -> bool:
        """Whether the frame is undamaged and that of `key`; its block is then in `payload`."""
        try:
            open_pieces(pieces, key).decode(payload)
        except (TieredKVError, ValueError, TypeError) as error:  # a peer may send anything, also what is no frame at all
            log.warning("a frame for block %s was refused: %s", key.hex(), str(error))
            return False
        return True

    def usage(self) -> dict[str, dict]:
        """Bytes used and allowed, by tier."""
        tiers = [self.host, self.disk] if self.disk else [self.host]
        return {tier.name: {"used_bytes": tier.used_bytes, "capacity_bytes": tier.capacity_bytes} for tier in tiers}

    def beat(self) -> None:
        """Say that the node lives, and look after what dead workers held."""
        self.index.beat(time.monotonic_ns())
        if self._abandoned:
            self._free_abandoned()

    def check(self, blocks: Mapping[BlockKey, object], reservations: Iterable[Mapping[int, int]]) -> None:
        """Assert that index, tiers and reservations are those of these machine blocks."""
        self.index.check()
        self.host.check()
        if self.disk:
            self.disk.check()
        assert dict(self.index.items()) == {key: block.best for key, block in blocks.items()}
        used = [location.offset for block in blocks.values() for tier, location in block.copies.items() if tier is Tier.HOST]
        used += [offset for reserved in reservations for offset in reserved]
        starts = [self.host.extent_range(offset, 0)[0] for offset in used] + list(self._abandoned)
        assert sorted(starts) == self.host.extents.offsets(), "extents leaked, or are used twice"

    def close(self, remove: bool) -> None:
        """Let go of everything; with `remove`, readers see a closed node and all files are deleted."""
        if remove:
            self.index.close_state()
        self.index.close()
        self.host.close()
        if self.disk:
            self.disk.close(remove)
        self._files.remove() if remove else self._files.close()


def _disk_tier(config: Config, cluster_id: str, node_id: str) -> DiskTier:
    root, own = Path(config.disk_root), f"tkv-{cluster_id}-{node_id}"
    try:
        root.mkdir(mode=0o700, parents=config.disk_path is None, exist_ok=True)
        _remove_stale(root, own)
    except OSError as error:
        message = f"disk_path: cannot use {root} for disk segments: {error.strerror}"
        raise TieredKVError(Kind.STORAGE, message, setting="disk_path", path=str(root)) from error
    return DiskTier(root / own, config.disk, config.disk_segment, owner=cluster_id)


def _remove_stale(root: Path, own: str) -> None:
    """Remove the folders of other nodes that are dead, for nobody could make sense of their segments."""
    for folder in root.glob("tkv-*"):
        if folder.name == own:
            continue
        try:
            fd = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # not ours to judge
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # its node lives
        finally:
            os.close(fd)
