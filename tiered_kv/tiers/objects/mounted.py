"""Blocks that lie in the packs of a checkpoint and are read from there: the coldest tier, to which nothing is ever written."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs.frame import Frame, open_frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.tiers.objects.packs import read_frame
from tiered_kv.tiers.objects.store import ObjectStore

READ_BYTES = 32 << 20  # a whole pack: some servers read all of an object for any range of it
_GAP_BYTES = 256 << 10  # of other blocks between two that are wanted: reading them costs less than a second request


class MountedBlock(NamedTuple):
    """A block of a checkpoint: its place in its chain, where it lies, and its uses. `location.segment` is its pack's number."""

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey
    depth: int
    location: Location
    uses: int = 1


class MountedPacks:
    """The packs of any number of checkpoints by numbers of their own. Thread-safe; only reads what it is told is there."""

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
    """What is mounted; there is no cap."""

    def mount(self, store: ObjectStore, names: Sequence[str]) -> int:
        """Add packs of a store, which is closed with this tier; the number of the first, the others follow."""
        with self._lock:
            if self._closed:
                store.close()
                raise TieredKVError(Kind.CLOSED, "the node is closed")
            self._stores.append(store)
            first = len(self._packs)
            self._packs += [(store, name) for name in names]
            return first

    def hold(self, nbytes: int) -> None:
        """Count frames that are shown from now on."""
        with self._lock:
            self._used_bytes += nbytes

    def forget(self, location: Location) -> None:
        """The block at `location` is not shown any more; its bytes stay where they are, they are somebody else's."""
        self.hold(-location.stored_bytes)

    def read(self, location: Location, key: BlockKey, namespace: bytes | None = None) -> Frame:
        """The verified frame at `location`, by one ranged read. Raises (kinds `storage`, `corrupt`) where it is not."""
        store, name = self._pack(location.segment)
        frame = read_frame(store, name, location.offset, location.stored_bytes, key, namespace)
        _check(frame, location, name)
        return frame

    def read_run(self, run: "Run") -> list[Frame | TieredKVError]:
        """The verified frames of a run by one ranged read: for each block its frame, or what is wrong with it.

        Raises (kinds `storage`, `corrupt`) where the range cannot be had.
        """
        store, name = self._pack(run.segment)
        data = store.get_range(name, run.offset, run.nbytes)
        found: list[Frame | TieredKVError] = []
        for block in run.blocks:
            start = block.location.offset - run.offset
            try:
                frame = open_frame(data[start : start + block.location.stored_bytes], block.key, block.root)
                _check(frame, block.location, name)
                found.append(frame)
            except TieredKVError as error:
                found.append(error)
        return found

    def close(self) -> None:
        """Let go of the stores."""
        with self._lock:
            self._closed = True
            for store in self._stores:
                store.close()

    def _pack(self, segment: int) -> tuple[ObjectStore, str]:
        if self._closed:
            raise TieredKVError(Kind.CLOSED, "the checkpoint is not mounted any more")
        return self._packs[segment]


class Run(NamedTuple):
    """Blocks that lie near each other in one pack, in the order of their offsets, and the range that holds them."""

    segment: int
    offset: int
    nbytes: int
    blocks: list[MountedBlock]


def runs_of(blocks: Iterable[MountedBlock], most_bytes: int = READ_BYTES) -> Iterator[Run]:
    """The blocks as few runs of at most `most_bytes` each, those of one pack together."""
    by_pack: dict[int, list[MountedBlock]] = {}
    for block in blocks:
        by_pack.setdefault(block.location.segment, []).append(block)
    for segment, lying in by_pack.items():
        lying.sort(key=lambda block: block.location.offset)
        start, run = lying[0].location.offset, [lying[0]]
        for block in lying[1:]:
            end, (_, _, _, offset, nbytes, _) = _end(run[-1]), block.location
            if offset - end > _GAP_BYTES or offset + nbytes - start > most_bytes:
                yield Run(segment, start, end - start, run)
                start, run = offset, []
            run.append(block)
        yield Run(segment, start, _end(run[-1]) - start, run)


def _end(block: MountedBlock) -> int:
    return block.location.offset + block.location.stored_bytes


def _check(frame: Frame, location: Location, name: str) -> None:
    if (location.tier, location.codec, location.raw_bytes) != (Tier.CHECKPOINT, frame.codec.id, frame.raw_bytes):
        raise TieredKVError(Kind.CORRUPT, f"pack {name}: {location} does not describe the frame that lies there", object=name)
