"""The objects tier (cold): packs of frames on object storage, under a hard byte cap.

A segment of this tier is a pack, an object of its own: nothing is written behind another, so that every pack is sealed. Its name is
its number and its digest, which makes the table of numbers and names the listing of the store. An append is answered
when its packs are durable. Objects are deleted by whoever appends or reclaims, never by who forgets a block, for that may
hold locks that nobody should hold across a network.

Counted against the cap are all bytes of all packs, footers included: from before the upload to after the deletion.
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
from tiered_kv.tiers.log import Appended, LogTier, Record, Recovered, Refused
from tiered_kv.tiers.objects.packs import PackInfo, PackWriter, grown_bytes, pack_prefix, read_footer, read_frame, record_bytes
from tiered_kv.tiers.objects.store import ObjectStore

log = logging.getLogger(__name__)
T, R = TypeVar("T"), TypeVar("R")

PACK_BYTES = 32 << 20
MIN_CAPACITY_BYTES = 64 << 10
_PACKS_MIN = 8
_PARALLEL = 4
_FRAME_BYTES_MIN = 1024  # what `needs_reclaim` takes for the smallest frame when it leaves room for footers
_NUMBERS = 1 << 32  # the shared index keeps a segment as u32
_PREFIX = re.compile(r"(\d{10})-")


@dataclass(eq=False)
class _Pack:
    """A pack in the store, and the keys of its live blocks by offset, in the order written."""

    name: str
    nbytes: int
    live: dict[int, BlockKey] = field(default_factory=dict)


class _Planned(NamedTuple):
    """A pack to be uploaded under `number`, with which of a batch's records; its bytes are taken from the cap already."""

    number: int
    writer: PackWriter
    records: list[int]


class ObjectsTier(LogTier):
    """Blocks in packs of up to `segment_bytes` in `store`, which is this tier's alone and is closed with it.

    Thread-safe: appends take turns, reads never wait for them. A pack is at most an eighth of the cap; a frame larger
    than that has a pack of its own. An append smaller than a pack is a smaller pack: append in batches. It takes memory
    for four packs at most while it uploads.

    The constructor asks the store for nothing. Where the store does not answer, appends are refused (`IO_ERROR`), reads
    raise (kind `storage`, a miss) within the store's deadline, and nothing that is there is given up.

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
        self._state = threading.Lock()  # held while the books change, never across a request
        self._packs: dict[int, _Pack] = {}
        self._unwanted: dict[str, int] = {}  # to be deleted: the bytes of each, which count until it is gone
        self._used_bytes = 0
        self._next = 1
        self._listed = False
        self._failing = False  # the last deletion failed
        self._closed = False

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def max_frame_bytes(self) -> int:
        return min(MAX_FRAME_BYTES, self._capacity_bytes - footer_bytes(1))

    def append(self, records: Sequence[Record]) -> list[Appended]:
        """Upload frames as one or several packs; one answer for each, in order, once its pack is durable.

        Cost: one put a pack, four at a time, and a deletion of what was given up since; blocks other appends meanwhile.
        A refusal with `IO_ERROR` or `NO_SPACE` is that of a whole pack, and is in the log.
        """
        sizes = [record_bytes(record) for record in records]
        with self._writing:
            self._must_be_open()
            if not self._ready():
                return [Appended(None, Refused.IO_ERROR)] * len(records)
            answers, planned = self._planned(records, sizes)
            for pack, (info, refused) in zip(planned, _in_parallel(_uploaded, [pack.writer for pack in planned]), strict=True):
                placed = self._placed(pack.number, info, refused)
                answers.update(zip(pack.records, placed, strict=True))
            if any(answer.refused in (Refused.IO_ERROR, Refused.NO_SPACE) for answer in answers.values()):
                self._swept()
        return [answers[index] for index in range(len(records))]

    def read(self, location: Location, key: BlockKey, namespace: bytes | None = None) -> Frame:
        """The verified frame at `location`, by one ranged read.

        Raises (kinds `storage`, `corrupt`) where it is not; with `missing=True` in the context when it will not come back,
        for its pack is gone.
        """
        self._must_be_open()
        with self._state:
            pack = self._packs.get(location.segment)
        if pack is None:
            raise TieredKVError(Kind.STORAGE, f"pack {location.segment} is gone", segment=location.segment, missing=True)
        frame = read_frame(self._store, pack.name, location.offset, location.stored_bytes, key, namespace)
        if (location.tier, location.codec, location.raw_bytes) != (blocks.Tier.OBJECTS, frame.codec.id, frame.raw_bytes):
            raise TieredKVError(Kind.CORRUPT, f"{location} does not describe the frame that lies there", segment=location.segment)
        return frame

    def forget(self, location: Location) -> bool:
        """The block at `location` is not wanted any more; False if it had not been there. Makes no request.

        A pack whose last block this was is deleted by the next append or reclaim, and counts until then.
        """
        with self._state:
            pack = self._packs.get(location.segment)
            if pack is None or pack.live.pop(location.offset, None) is None:
                return False
            if not pack.live:
                self._give_up(location.segment)
            return True

    def recovered(self) -> list[Recovered]:
        """Blocks in the packs of a former owner, oldest first; once, before anything else. They are live until `forget`.

        Of more packs than the cap allows the oldest are deleted; so are packs whose footer is damaged. Raises (kind
        `storage`, setting `objects`) when the store cannot be listed or read: nothing is lost then, and it may be tried again.
        Cost: a listing, and one small ranged read a pack, four at a time.
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
                Recovered(entry.key, entry.parent, entry.root, _location(number, entry), entry.error)
                for number, pack in kept.items()
                for entry in pack.entries
            ]

    def needs_reclaim(self, nbytes: int, count: int | None = None) -> int | None:
        """The segment that must go before `count` frames of `nbytes` in all are sure to fit.

        Without `count` they are taken to be of 1 KiB or more each. None if they fit, or nothing is left to go, or the
        store does not delete what it is asked to: then the append says so.
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
        """The oldest pack; None if there is none."""
        with self._state:
            return next(iter(self._packs), None)

    def keys_in(self, segment: int) -> list[BlockKey]:
        with self._state:
            return list(self._packs[segment].live.values()) if segment in self._packs else []

    def reclaim(self, segment: int) -> int:
        """Delete a pack with all its blocks; the bytes that are free now: none if it was gone already, or the store does not answer.

        In the latter case its bytes count on, and the deletion is tried again before the next append.
        """
        with self._state:
            if segment not in self._packs:
                return 0
            pack = self._give_up(segment)
        return pack.nbytes if self._swept() else 0

    def close(self, remove: bool = True) -> None:
        """Let go of the store. With `remove` all packs are deleted first, as far as it answers; else a restart finds them."""
        with self._writing:
            if self._closed:
                return
            if remove:
                with self._state:
                    for number in list(self._packs):
                        self._give_up(number)
                self._swept()
            self._closed = True
            self._store.close()

    def check(self) -> None:
        """Assert that the books agree with a listing of the store, that no blocks overlap, and that the cap holds."""
        with self._writing, self._state:
            assert self._used_bytes <= self._capacity_bytes, f"{self._used_bytes} bytes used of {self._capacity_bytes}"
            kept = {pack.name: pack.nbytes for pack in self._packs.values()}
            assert self._used_bytes == sum(kept.values()) + sum(self._unwanted.values())
            assert list(self._packs) == sorted(self._packs), "packs are not in the order of their numbers"
            for number, pack in self._packs.items():
                assert pack.live, f"pack {number} is of no use"
                assert _number(pack.name) == number, f"pack {number} has another one's name"
            if self._closed or not self._listed:
                return
            there = {name: size for name, size in self._store.sizes().items() if _number(name) is not None}
            assert there == kept | {name: size for name, size in self._unwanted.items() if name in there}

    def _must_be_open(self) -> None:
        if self._closed:
            raise TieredKVError(Kind.CLOSED, "the objects tier is closed")

    def _ready(self) -> bool:
        """Whether the store answers and what is there is known and counted; what nobody has asked for is given up."""
        try:
            for block in self.recovered():
                self.forget(block.location)
        except TieredKVError as error:
            log.warning("the objects tier takes nothing now: %s", error)
            return False
        return self._swept()

    def _planned(self, records: Sequence[Record], sizes: Sequence[int]) -> tuple[dict[int, Appended], list[_Planned]]:
        """Packs for the records that fit, their bytes taken from the cap; and answers for those that do not."""
        answers: dict[int, Appended] = {}
        planned: list[_Planned] = []
        for index, (record, nbytes) in enumerate(zip(records, sizes, strict=True)):
            grown = grown_bytes(nbytes)
            is_new = not planned or planned[-1].writer.nbytes + grown > self.segment_bytes
            refused = self._take(nbytes, grown + is_new * footer_bytes(0))
            if refused:
                answers[index] = Appended(None, refused)
                continue
            if is_new:
                planned.append(self._new_pack())
            planned[-1].writer.add(record)
            planned[-1].records.append(index)
        return answers, planned

    def _take(self, frame_bytes: int, nbytes: int) -> Refused | None:
        """Take `nbytes` of the cap for a frame, or say why not."""
        if frame_bytes > self.max_frame_bytes:
            return Refused.TOO_LARGE
        with self._state:
            if self._used_bytes + nbytes > self._capacity_bytes or self._next >= _NUMBERS:
                return Refused.FULL
            self._used_bytes += nbytes
            return None

    def _new_pack(self) -> _Planned:
        number = self._next
        self._next += 1
        return _Planned(number, PackWriter(self._store, f"{number:010d}-"), [])

    def _placed(self, number: int, info: PackInfo, refused: Refused | None) -> list[Appended]:
        """Book a pack that was uploaded, or may have been."""
        with self._state:
            if refused:
                self._unwanted[info.name] = info.nbytes  # a put that failed may have arrived all the same
                return [Appended(None, refused)] * len(info.entries)
            self._packs[number] = _Pack(info.name, info.nbytes, {entry.offset: entry.key for entry in info.entries})
        return [Appended(_location(number, entry), None) for entry in info.entries]

    def _footer(self, listed: tuple[str, int]) -> PackInfo | None:
        """What is in a pack, nothing if it is damaged; None for one that is gone by now."""
        try:
            return read_footer(self._store, *listed)
        except TieredKVError as error:
            if error.context.get("missing"):
                return None
            if error.kind is not Kind.CORRUPT:
                raise
            log.warning("given up: %s", error)
            return PackInfo(*listed, ())

    def _adopt(self, packs: Sequence[PackInfo]) -> dict[int, PackInfo]:
        """Make the books those of what was found; gives the packs to be kept by number: the newest that the cap allows."""
        kept: dict[int, PackInfo] = {}
        for pack in sorted(packs, key=lambda pack: pack.name):
            if pack.entries:
                kept.setdefault(_number(pack.name), pack)  # a second one of a number is the put of a dead owner that came late
        self._used_bytes = sum(pack.nbytes for pack in packs)
        self._next = max((_number(pack.name) for pack in packs), default=0) + 1
        over_bytes = sum(pack.nbytes for pack in kept.values()) - self._capacity_bytes
        for number in list(kept):
            if over_bytes > 0:
                over_bytes -= kept.pop(number).nbytes
        self._packs = {
            number: _Pack(pack.name, pack.nbytes, {entry.offset: entry.key for entry in pack.entries}) for number, pack in kept.items()
        }
        self._unwanted = {pack.name: pack.nbytes for pack in packs if kept.get(_number(pack.name)) is not pack}
        return kept

    def _give_up(self, number: int) -> _Pack:
        """Take a pack out of those that are read from; `_state` is held."""
        pack = self._packs.pop(number)
        self._unwanted[pack.name] = pack.nbytes
        return pack

    def _swept(self) -> bool:
        """Whether all that is unwanted could be deleted."""
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


def _uploaded(writer: PackWriter) -> tuple[PackInfo, Refused | None]:
    """A pack, and why it was not written if so."""
    try:
        return writer.finish(), None
    except TieredKVError as error:
        if error.kind is not Kind.STORAGE:
            raise
        log.warning("%d blocks are not kept: %s", len(writer), error)
        is_full = error.context.get("errno") in (errno.ENOSPC, errno.EDQUOT)
        return writer.seal(), Refused.NO_SPACE if is_full else Refused.IO_ERROR


def _in_parallel(call: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """The results for all items, in order; raises what the first to fail has raised, after all have ended."""
    if len(items) < 2:
        return [call(item) for item in items]
    with DaemonThreads(_PARALLEL, "tkv-objects") as threads:
        return list(threads.map(call, items))


def _number(name: str) -> int | None:
    """The number in the name of one of this tier's packs; None for any other object."""
    prefix = _PREFIX.fullmatch(pack_prefix(name) or "")
    return int(prefix[1]) if prefix and int(prefix[1]) < _NUMBERS else None


def _location(number: int, entry: Entry) -> Location:
    return Location(blocks.Tier.OBJECTS, entry.codec, number, entry.offset, entry.stored_bytes, entry.raw_bytes)
