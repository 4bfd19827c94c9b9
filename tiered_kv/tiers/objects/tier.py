"""The objects tier (cold): packs of frames on object storage, under a hard byte cap.

A segment of this tier is a pack, which is one object. Nothing is appended to a pack, so every pack is sealed. An object's name contains
the pack's number and digest, so a listing of the store shows all packs. An append returns when its packs are durable. `append` and
`reclaim` delete objects; `forget` never does, because its caller may hold locks that must not be held during a request.

All bytes of all packs, footers included, count against the cap from before the upload until after the deletion.
"""

import errno
import logging
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from tiered_kv import blocks
from tiered_kv.blocks import Location
from tiered_kv.codecs.frame import MAX_FRAME_BYTES, Frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.threads import DaemonThreads
from tiered_kv.tiers.disk.footer import Entry, footer_bytes
from tiered_kv.tiers.log import AppendResult, LogTier, Record, RecoveredBlock, Refusal
from tiered_kv.tiers.objects.packs import PackInfo, PackWriter, grown_bytes, pack_prefix, read_footer, read_frame, record_bytes
from tiered_kv.tiers.objects.store import ObjectStore

log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

PACK_BYTES = 32 << 20
MIN_CAPACITY_BYTES = 64 << 10
_PACKS_MIN = 8
_PARALLEL = 4
_FRAME_BYTES_MIN = 1024  # the smallest frame that `needs_reclaim` assumes when it reserves room for footers
_NUMBERS = 1 << 32  # the shared index keeps a segment as u32
_PREFIX = re.compile(r"(\d{10})-")


@dataclass(eq=False)
class _Pack:
    """A pack in the store, and the keys of its live blocks by offset, in the order written."""

    name: str
    nbytes: int
    live: dict[int, BlockKey] = field(default_factory=dict)


class _Planned(NamedTuple):
    """A pack to be uploaded under `number`. `records`: indexes in the batch. The pack's bytes are already reserved."""

    number: int
    writer: PackWriter
    records: list[int]


class ObjectsTier(LogTier):
    """Blocks in packs of up to `segment_bytes` in `store`, which no other tier uses and which is closed with this tier.

    Thread-safe: appends run one at a time, reads never wait for them. A pack is at most an eighth of the cap; a larger frame
    has a pack of its own. Each append writes at least one pack, so append in large batches. An upload needs memory for at
    most four packs.

    The constructor makes no request. If the store does not answer, appends are refused (`IO_ERROR`), reads raise (kind
    `storage`, a miss) within the store's deadline, and no pack is dropped.

    Raises `TieredKVError` (kind `config`, setting `objects`) for a cap too small.
    """

    name = blocks.Tier.OBJECTS.label

    def __init__(self, store: ObjectStore, capacity_bytes: int, segment_bytes: int = PACK_BYTES) -> None:
        if capacity_bytes < MIN_CAPACITY_BYTES:
            message = f"objects: must be at least {MIN_CAPACITY_BYTES} bytes, got {capacity_bytes}"
            raise TieredKVError(Kind.CONFIG, message, setting="objects")
        self._store = store
        self._capacity_bytes = capacity_bytes
        self.segment_bytes = min(segment_bytes, capacity_bytes // _PACKS_MIN)
        self._writing = threading.RLock()  # held while packs are uploaded or listed; taken before _state
        self._state = threading.Lock()  # held while the bookkeeping changes, never during a request
        self._packs: dict[int, _Pack] = {}
        self._unwanted: dict[str, int] = {}  # to be deleted: the bytes of each, which count until it is gone
        self._used_bytes = 0
        self._next = 1
        self._listed = False
        self._failing = False  # the last deletion failed
        self._closed = False

    @property
    def next_segment(self) -> int:
        return self._next

    @property
    def max_frame_bytes(self) -> int:
        return min(MAX_FRAME_BYTES, self._capacity_bytes - footer_bytes(1))

    def append(self, records: Sequence[Record]) -> list[AppendResult]:
        """Upload frames as one or several packs. Returns when the packs are durable: for each frame, its location or why it was refused.

        Cost: one put a pack, four at a time, and the deletion of unwanted packs. Other appends wait meanwhile. A refusal with
        `IO_ERROR` or `NO_SPACE` applies to a whole pack, and is logged.
        """
        sizes = [record_bytes(record) for record in records]
        with self._writing:
            self._must_be_open()
            if not self._ready():
                return [AppendResult(None, Refusal.IO_ERROR)] * len(records)
            answers, planned = self._planned(records, sizes)
            for pack, (info, refused) in zip(planned, _in_parallel(_uploaded, [pack.writer for pack in planned]), strict=True):
                placed = self._placed(pack.number, info, refused)
                answers.update(zip(pack.records, placed, strict=True))
            if any(answer.refused in (Refusal.IO_ERROR, Refusal.NO_SPACE) for answer in answers.values()):
                self._swept()
        return [answers[index] for index in range(len(records))]

    def read(self, location: Location, key: BlockKey, namespace: bytes | None = None) -> Frame:
        """Read and verify the frame at `location`, by one ranged read.

        Raises (kinds `storage`, `corrupt`) if it is missing or damaged, with `missing=True` in the context if its pack no
        longer exists.
        """
        self._must_be_open()
        with self._state:
            pack = self._packs.get(location.segment)
        if pack is None:
            raise TieredKVError(Kind.STORAGE, f"pack {location.segment} no longer exists", segment=location.segment, missing=True)
        frame = read_frame(self._store, pack.name, location.offset, location.stored_bytes, key, namespace)
        if (location.tier, location.codec, location.raw_bytes) != (blocks.Tier.OBJECTS, frame.codec.id, frame.raw_bytes):
            raise TieredKVError(
                Kind.CORRUPT,
                f"the frame at {location} has codec {frame.codec.id} and {frame.raw_bytes} raw bytes, not those of this location",
                segment=location.segment,
            )
        return frame

    def forget(self, location: Location) -> bool:
        """Drop the block at `location`. Returns False if no block was there. Makes no request.

        When a pack has lost its last block, the next append or reclaim deletes it. Its bytes count until then.
        """
        with self._state:
            pack = self._packs.get(location.segment)
            if pack is None or pack.live.pop(location.offset, None) is None:
                return False
            if not pack.live:
                self._discard(location.segment)
            return True

    def recovered(self) -> list[RecoveredBlock]:
        """Returns the blocks in the packs of a former owner, oldest first. They stay until `forget`.

        Call it once, before any other method. Deletes packs with a damaged footer, and the oldest packs if the cap is exceeded.
        Raises (kind `storage`, setting `objects`) if the store cannot be listed or read; no block is lost then, and `recovered` may
        be called again. Cost: a listing, and one small ranged read a pack, four at a time.
        """
        with self._writing:
            self._must_be_open()
            if self._listed:
                return []
            sizes = {name: size for name, size in self._store.sizes().items() if _number(name) is not None}
            packs = [each for each in _in_parallel(self._footer, list(sizes.items())) if each is not None]
            with self._state:
                kept = self._adopt(packs)
            if not self._swept() and self._used_bytes > self._capacity_bytes:
                raise self._store.failed("cannot be emptied", f"it holds {self._used_bytes} bytes of {self._capacity_bytes}")
            self._listed = True
            return [
                RecoveredBlock(entry.info, _location(number, entry), entry.error) for number, pack in kept.items() for entry in pack.entries
            ]

    def needs_reclaim(self, nbytes: int, count: int | None = None) -> int | None:
        """Returns the segment to remove next (`reclaim`), if `count` frames of `nbytes` in total may not fit.

        Returns None if all frames fit, if no segment is left, or if the last deletion failed: the append is refused then.
        Without `count`, frames of at least 1 KiB are assumed.
        """
        whole = grown_bytes(nbytes, nbytes // _FRAME_BYTES_MIN + 1 if count is None else count) + footer_bytes(0) * (
            2 + 2 * nbytes // self.segment_bytes
        )
        with self._state:
            kept_bytes = self._used_bytes - sum(self._unwanted.values())
            if self._failing or kept_bytes + whole <= self._capacity_bytes:
                return None
            return next(iter(self._packs), None)

    def oldest_sealed(self) -> int | None:
        """Returns the oldest pack; None if there is none. Every pack is complete once it is written."""
        with self._state:
            return next(iter(self._packs), None)

    def keys_in(self, segment: int) -> list[BlockKey]:
        with self._state:
            return list(self._packs[segment].live.values()) if segment in self._packs else []

    def reclaim(self, segment: int) -> int:
        """Delete a pack with all its blocks. Returns the bytes that this freed, 0 if it no longer exists.

        Returns 0 if the store does not answer. The pack's bytes then still count, and the next append tries to delete the pack again.
        """
        with self._state:
            if segment not in self._packs:
                return 0
            pack = self._discard(segment)
        return pack.nbytes if self._swept() else 0

    def close(self, remove: bool = True) -> None:
        """Close the store. With `remove`, first delete all packs, if the store answers. Without, a restart finds them again."""
        with self._writing:
            if self._closed:
                return
            if remove:
                with self._state:
                    for number in list(self._packs):
                        self._discard(number)
                self._swept()
            self._closed = True
            self._store.close()

    def check(self) -> None:
        """Assert that the bookkeeping agrees with a listing of the store, and that the cap holds."""
        with self._writing, self._state:
            assert self._used_bytes <= self._capacity_bytes, f"{self._used_bytes} bytes used of {self._capacity_bytes}"
            kept = {pack.name: pack.nbytes for pack in self._packs.values()}
            assert self._used_bytes == sum(kept.values()) + sum(self._unwanted.values())
            assert list(self._packs) == sorted(self._packs), "packs are not in the order of their numbers"
            for number, pack in self._packs.items():
                assert pack.live, f"pack {number} has no live block"
                assert _number(pack.name) == number, f"pack {number} has another one's name"
            if self._closed or not self._listed:
                return
            there = {name: size for name, size in self._store.sizes().items() if _number(name) is not None}
            assert there == kept | {name: size for name, size in self._unwanted.items() if name in there}

    def _must_be_open(self) -> None:
        if self._closed:
            raise TieredKVError(Kind.CLOSED, "the objects tier is closed")

    def _ready(self) -> bool:
        """Prepare for an append: take over a former owner's packs, unless `recovered` did, and delete unwanted packs.

        Returns whether the store answered. The blocks of packs taken over here are dropped, because no caller knows them.
        """
        try:
            for block in self.recovered():
                self.forget(block.location)
        except TieredKVError as error:
            log.warning("the objects tier refuses blocks now: %s", error)
            return False
        return self._swept()

    def _planned(self, records: Sequence[Record], sizes: Sequence[int]) -> tuple[dict[int, AppendResult], list[_Planned]]:
        """Plan packs for the records that fit, and reserve the packs' bytes.

        Returns the refusals of the other records by index, and the packs.
        """
        answers: dict[int, AppendResult] = {}
        planned: list[_Planned] = []
        for index, (record, nbytes) in enumerate(zip(records, sizes, strict=True)):
            grown = grown_bytes(nbytes)
            is_new = not planned or planned[-1].writer.nbytes + grown > self.segment_bytes
            refused = self._take(nbytes, grown + is_new * footer_bytes(0))
            if refused:
                answers[index] = AppendResult(None, refused)
                continue
            if is_new:
                planned.append(self._new_pack())
            planned[-1].writer.add(record)
            planned[-1].records.append(index)
        return answers, planned

    def _take(self, frame_bytes: int, nbytes: int) -> Refusal | None:
        """Reserve `nbytes` of the cap for a frame. Returns None, or the reason if that is not possible."""
        if frame_bytes > self.max_frame_bytes:
            return Refusal.TOO_LARGE
        with self._state:
            if self._used_bytes + nbytes > self._capacity_bytes or self._next >= _NUMBERS:
                return Refusal.FULL
            self._used_bytes += nbytes
            return None

    def _new_pack(self) -> _Planned:
        number = self._next
        self._next += 1
        return _Planned(number, PackWriter(self._store, f"{number:010d}-"), [])

    def _placed(self, number: int, info: PackInfo, refused: Refusal | None) -> list[AppendResult]:
        """Record a pack after its upload, which may have failed. Returns for each frame its location or why it was refused."""
        with self._state:
            if refused:
                self._unwanted[info.name] = info.nbytes  # a failed put may still have created the object
                return [AppendResult(None, refused)] * len(info.entries)
            self._packs[number] = _Pack(info.name, info.nbytes, {entry.offset: entry.key for entry in info.entries})
        return [AppendResult(_location(number, entry), None) for entry in info.entries]

    def _footer(self, listed: tuple[str, int]) -> PackInfo | None:
        """Read a pack's footer. Returns a pack without entries if the footer is damaged, None if the pack no longer exists."""
        try:
            return read_footer(self._store, *listed)
        except TieredKVError as error:
            if error.context.get("missing"):
                return None
            if error.kind is not Kind.CORRUPT:
                raise
            log.warning("a damaged pack will be deleted: %s", error)
            return PackInfo(*listed, ())

    def _adopt(self, packs: Sequence[PackInfo]) -> dict[int, PackInfo]:
        """Set the bookkeeping to the packs found in the store. Returns, by number, the packs to keep: the newest ones that fit the cap."""
        kept: dict[int, PackInfo] = {}
        by_name = sorted(packs, key=lambda pack: pack.name)
        numbered = [(number, pack) for pack in by_name if (number := _number(pack.name)) is not None]
        for number, pack in numbered:
            if pack.entries:
                kept.setdefault(number, pack)  # a second pack of a number is a late put of a dead owner
        self._used_bytes = sum(pack.nbytes for pack in packs)
        self._next = max((number for number, _ in numbered), default=0) + 1
        over_bytes = sum(pack.nbytes for pack in kept.values()) - self._capacity_bytes
        for number in list(kept):
            if over_bytes > 0:
                over_bytes -= kept.pop(number).nbytes
        self._packs = {
            number: _Pack(pack.name, pack.nbytes, {entry.offset: entry.key for entry in pack.entries}) for number, pack in kept.items()
        }
        self._unwanted = {pack.name: pack.nbytes for number, pack in numbered if kept.get(number) is not pack}
        return kept

    def _discard(self, number: int) -> _Pack:
        """Mark a pack for deletion and stop reads from it. The caller holds `_state`."""
        pack = self._packs.pop(number)
        self._unwanted[pack.name] = pack.nbytes
        return pack

    def _swept(self) -> bool:
        """Delete all packs marked for deletion. Returns whether the store deleted them."""
        with self._state:
            names = list(self._unwanted)
        try:
            if names:
                self._store.delete(names)
        except TieredKVError as error:
            log.warning("the objects tier cannot delete packs now: %s", error)
            self._failing = True
            return False
        with self._state:
            self._used_bytes -= sum(self._unwanted.pop(name, 0) for name in names)
            self._failing = False
        return True


def _uploaded(writer: PackWriter) -> tuple[PackInfo, Refusal | None]:
    """Upload a pack. Returns it, and the reason if it was refused."""
    try:
        return writer.finish(), None
    except TieredKVError as error:
        if error.kind is not Kind.STORAGE:
            raise
        log.warning("%d blocks are dropped: %s", len(writer), error)
        is_full = error.context.get("errno") in (errno.ENOSPC, errno.EDQUOT)
        return writer.seal(), Refusal.NO_SPACE if is_full else Refusal.IO_ERROR


def _in_parallel(call: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call `call` on all items in parallel. Returns the results in order. Raises the first error, after all calls have ended."""
    if len(items) < 2:
        return [call(item) for item in items]
    with DaemonThreads(_PARALLEL, "tkv-objects") as threads:
        return list(threads.map(call, items))


def _number(name: str) -> int | None:
    """Returns the number in the name of one of this tier's packs, or None for any other object."""
    prefix = _PREFIX.fullmatch(pack_prefix(name) or "")
    return int(prefix[1]) if prefix and int(prefix[1]) < _NUMBERS else None


def _location(number: int, entry: Entry) -> Location:
    return Location(blocks.Tier.OBJECTS, entry.codec, number, entry.offset, entry.stored_bytes, entry.raw_bytes)
