"""The checkpoint tier: blocks read from the packs of mounted checkpoints. It is the coldest tier, and never written to."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.codecs.frame import Frame, open_frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.tiers.objects.packs import read_frame
from tiered_kv.tiers.objects.store import ObjectStore

READ_BYTES = 32 << 20  # a whole pack: some servers read all of an object for any range of it
_GAP_BYTES = 256 << 10  # reading so many unneeded bytes between two blocks costs less than a second request


class MountedBlock(NamedTuple):
    """A block of a checkpoint, its location, and its number of uses. `location.segment` is its pack's number."""

    info: BlockInfo
    location: Location
    uses: int = 1

    @property
    def key(self) -> BlockKey:
        """The block's key."""
        return self.info.key


class MountedPacks:
    """The packs of all mounted checkpoints, numbered in the order of mounting. Thread-safe."""

    def __init__(self) -> None:
        self._packs: list[tuple[ObjectStore, str]] = []
        self._stores: list[ObjectStore] = []
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._closed = False

    @property
    def used_bytes(self) -> int:
        """Bytes of the frames that are mounted now."""
        return self._used_bytes

    capacity_bytes = used_bytes
    """The mounted bytes; this tier has no cap."""

    def mount(self, store: ObjectStore, names: Sequence[str]) -> int:
        """Add packs of a store. Returns the first pack's number; the next packs have the next numbers. `close` closes the store."""
        with self._lock:
            if self._closed:
                store.close()
                raise TieredKVError(Kind.CLOSED, "the node is closed")
            self._stores.append(store)
            first = len(self._packs)
            self._packs += [(store, name) for name in names]
            return first

    def hold(self, nbytes: int) -> None:
        """Add `nbytes` to `used_bytes`: the size of frames that become visible to readers."""
        with self._lock:
            self._used_bytes += nbytes

    def forget(self, location: Location) -> None:
        """Subtract the size of a block that readers no longer find from `used_bytes`. The checkpoint keeps the block's bytes."""
        self.hold(-location.stored_bytes)

    def read(self, location: Location, key: BlockKey, namespace: bytes | None = None) -> Frame:
        """Read and verify the frame at `location`, by one ranged read. Raises (kinds `storage`, `corrupt`) if it is missing or damaged."""
        store, name = self._pack(location.segment)
        frame = read_frame(store, name, location.offset, location.stored_bytes, key, namespace)
        _check(frame, location, name)
        return frame

    def read_run(self, run: "PackRange") -> list[Frame | TieredKVError]:
        """Read and verify the frames of neighbouring blocks by one ranged read. Returns for each its frame, or the error found in it.

        Raises (kinds `storage`, `corrupt`) if the range cannot be read.
        """
        store, name = self._pack(run.segment)
        data = store.get_range(name, run.offset, run.nbytes)
        found: list[Frame | TieredKVError] = []
        for block in run.blocks:
            start = block.location.offset - run.offset
            try:
                frame = open_frame(data[start : start + block.location.stored_bytes], block.key, block.info.root)
                _check(frame, block.location, name)
                found.append(frame)
            except TieredKVError as error:
                found.append(error)
        return found

    def close(self) -> None:
        """Close the stores."""
        with self._lock:
            self._closed = True
            for store in self._stores:
                store.close()

    def _pack(self, segment: int) -> tuple[ObjectStore, str]:
        if self._closed:
            raise TieredKVError(Kind.CLOSED, "the checkpoint is no longer mounted")
        return self._packs[segment]


class PackRange(NamedTuple):
    """Neighbouring blocks of one pack, in the order of their offsets, and the range that contains them."""

    segment: int
    offset: int
    nbytes: int
    blocks: list[MountedBlock]


def runs_of(blocks: Iterable[MountedBlock], most_bytes: int = READ_BYTES) -> Iterator[PackRange]:
    """Yields the blocks in few runs of neighbours, at most `most_bytes` each. Runs of one pack are consecutive."""
    by_pack: dict[int, list[MountedBlock]] = {}
    for block in blocks:
        by_pack.setdefault(block.location.segment, []).append(block)
    for segment, in_pack in by_pack.items():
        in_pack.sort(key=lambda block: block.location.offset)
        start, run = in_pack[0].location.offset, [in_pack[0]]
        for block in in_pack[1:]:
            end, (_, _, _, offset, nbytes, _) = _end(run[-1]), block.location
            if offset - end > _GAP_BYTES or offset + nbytes - start > most_bytes:
                yield PackRange(segment, start, end - start, run)
                start, run = offset, []
            run.append(block)
        yield PackRange(segment, start, _end(run[-1]) - start, run)


def _end(block: MountedBlock) -> int:
    return block.location.offset + block.location.stored_bytes


def _check(frame: Frame, location: Location, name: str) -> None:
    if (location.tier, location.codec, location.raw_bytes) != (Tier.CHECKPOINT, frame.codec.id, frame.raw_bytes):
        raise TieredKVError(
            Kind.CORRUPT,
            f"pack {name}: the frame at {location} has codec {frame.codec.id} and {frame.raw_bytes} raw bytes, not those of this location",
            object=name,
        )
