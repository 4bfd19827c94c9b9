"""The disk tier: frames in append-only segment files, under a hard byte cap.

A batch of blocks is one `pwritev` per segment it goes to; nothing is synced, for what lies here is a cache. Room is
made by whole segments, oldest first, as in flash caches: no file per block, no holes, no compaction.

Counted against the cap are the folder, its owner file and every segment, each rounded up to whole pages of 4 KiB as a file
system gives them out. A segment is emptied before it is unlinked, so that its room is free even while
readers in other processes still have it open; such a reader finds less than it looked for, which is a miss.
"""

import errno
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple

from tiered_kv import blocks
from tiered_kv.blocks import Location
from tiered_kv.codecs.base import Buffer, byte_view
from tiered_kv.codecs.frame import MAX_FRAME_BYTES, Frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.base import Tier
from tiered_kv.tiers.folder import OwnedFolder
from tiered_kv.tiers.segments import Files, SegmentReader, remove_segment, segment_path, segments_in

PAGE_BYTES = 4096
MIN_CAPACITY_BYTES = 16 * PAGE_BYTES
_FOLDER_BYTES = 2 * PAGE_BYTES  # the folder itself and its owner file
_SEGMENTS_MIN = 8
_BUFFERS_PER_CALL = os.sysconf("SC_IOV_MAX")


class Record(NamedTuple):
    """A frame to be written: its bytes in any number of buffers (see `encode_frame`), and what a location says of it."""

    key: bytes
    buffers: Sequence[Buffer]
    codec: int
    raw_bytes: int


class Refused(StrEnum):
    """Why a frame was not written."""

    FULL = "full"  # under the cap there is no room now
    TOO_LARGE = "too large"  # under the cap there can never be room
    NO_SPACE = "no space"  # the file system is full, or the user's quota
    IO_ERROR = "i/o error"


class Appended(NamedTuple):
    """Where a frame lies now, or why it does not: exactly one of the two is None."""

    location: Location | None
    refused: Refused | None


class _Live(NamedTuple):
    key: bytes
    stored_bytes: int


@dataclass(eq=False)
class _Segment:
    """A segment file of `nbytes`; `fd` while it is being written; its live blocks by offset, in the order written."""

    id: int
    nbytes: int = 0
    fd: int | None = None
    live: dict[int, _Live] = field(default_factory=dict)


def _pages(nbytes: int) -> int:
    """Bytes that a file of `nbytes` takes from the cap."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class DiskTier(Tier):
    """Blocks in segment files of about `segment_bytes` in `folder`, which is this tier's alone; all below `capacity_bytes`.

    Thread-safe: appends take turns, reads never wait for them. A segment is at most an eighth of the cap; a frame larger
    than that has a segment of its own.

    The content does not survive its owner, for segments are not scanned: only what a restarted owner still knows is
    kept. Opened again with the same `owner`, the tier has the old segments, and `adopt`, which must then be called, says
    which blocks in them are known. Another owner's segments are removed, unless that owner lives.

    Raises `TieredKVError`: kind `storage`, naming `disk_path`, for a folder that is in use or cannot be used; kind
    `config` for a cap too small.
    """

    name = blocks.Tier.DISK.label

    def __init__(
        self, folder: str | os.PathLike, capacity_bytes: int, segment_bytes: int, *, owner: str, files: Files | None = None
    ) -> None:
        if capacity_bytes < MIN_CAPACITY_BYTES:
            raise TieredKVError(Kind.CONFIG, f"disk: must be at least {MIN_CAPACITY_BYTES} bytes, got {capacity_bytes}", setting="disk")
        self._capacity_bytes = capacity_bytes
        self.segment_bytes = max(min(segment_bytes, capacity_bytes // _SEGMENTS_MIN) // PAGE_BYTES, 1) * PAGE_BYTES
        self._files = files or Files()
        self._folder = OwnedFolder(folder, owner, self._files)
        self.folder = self._folder.path
        self._reader = SegmentReader(self.folder, files=self._files)
        self._writing = threading.RLock()  # held while files are written; taken before _state
        self._state = threading.RLock()  # held while the books change
        self._segments = {id: _Segment(id, nbytes) for id, nbytes in self._folder.inherited.items()}
        self._inherited = set(self._segments)
        self._stuck: list[_Segment] = []  # could not be removed; their bytes count for ever
        self._used_bytes = _FOLDER_BYTES + sum(_pages(segment.nbytes) for segment in self._segments.values())
        self._next_id = max(self._segments, default=0) + 1
        self._open: _Segment | None = None
        self._closed = False
        self._shrink_to_cap()

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def max_frame_bytes(self) -> int:
        """The largest frame that there can ever be room for."""
        return min(MAX_FRAME_BYTES, (self._capacity_bytes - _FOLDER_BYTES) // PAGE_BYTES * PAGE_BYTES)

    def append(self, records: Sequence[Record]) -> list[Appended]:
        """Write frames; one answer for each, in order. Nothing of a refused frame can ever be read.

        Where the file system refuses, the rest of the batch is refused with the same reason, and the segment is cut
        to its last whole frame and closed. Cost: one system call per segment; blocks other appends meanwhile.
        """
        frames = [_unwritten(record) for record in records]
        answers: list[Appended] = []
        with self._writing:
            self._must_be_open()
            while len(answers) < len(frames):
                run = self._append_run(frames, len(answers))
                answers += run
                if run[-1].refused in (Refused.NO_SPACE, Refused.IO_ERROR):
                    answers += run[-1:] * (len(frames) - len(answers))
        return answers

    def read(self, location: Location, key: bytes, namespace: bytes | None = None) -> Frame:
        """The verified frame at `location`, as `SegmentReader.read`."""
        return self._reader.read(location, key, namespace)

    def forget(self, location: Location) -> bool:
        """The block at `location` is not wanted any more; False if it had not been there.

        A segment whose last block this was is removed, unless it is still written to.
        """
        with self._state:
            segment = self._segments.get(location.segment)
            if segment is None or segment.live.pop(location.offset, None) is None:
                return False
            if not segment.live and segment.fd is None:
                self._remove(segment)
            return True

    def needs_reclaim(self, nbytes: int) -> int | None:
        """The segment that must go before frames of `nbytes` in all are sure to fit; None if they do, or nothing is left to go.

        Ask, report the blocks of `keys_in` lost, `reclaim`, and ask again. Of many segments it is the oldest. May close
        the segment being written, if all room is in that one. Do not ask for a frame above `max_frame_bytes`: for a batch that
        is larger than the tier everything goes.
        """
        rounding = PAGE_BYTES * (2 + 2 * nbytes // self.segment_bytes)
        with self._state:
            if self._used_bytes + nbytes + rounding <= self._capacity_bytes:
                return None
            oldest = self.oldest_sealed()
        return self._seal_open() if oldest is None else oldest

    def oldest_sealed(self) -> int | None:
        """The oldest segment that is not being written; None if there is none."""
        with self._state:
            return next((segment.id for segment in self._segments.values() if segment.fd is None), None)

    def keys_in(self, segment: int) -> list[bytes]:
        """Keys of the live blocks of a segment, in the order written; none for a segment that is gone."""
        with self._state:
            return [live.key for live in self._segments[segment].live.values()] if segment in self._segments else []

    def reclaim(self, segment: int) -> int:
        """Remove a sealed segment with all its blocks; gives the bytes that are free now: none if it was gone already.

        A file that cannot be removed is given up, and its bytes go on counting. Cost: the file system's, some
        milliseconds for 64 MiB, during which `append` and `forget` wait.
        """
        with self._state:
            if segment not in self._segments:
                return 0
            if self._segments[segment].fd is not None:
                raise ValueError(f"segment {segment} is being written")
            return self._remove(self._segments[segment])

    def adopt(self, locations_by_key: Mapping[bytes, Location]) -> list[bytes]:
        """Say which blocks a restarted owner still knows; segments without any are removed. Gives the keys not adopted.

        Not adopted is what does not lie within a segment of the time before, or overlaps another block. The bytes
        themselves are verified when they are read.
        """
        refused = []
        with self._state:
            for key, location in sorted(locations_by_key.items(), key=lambda item: item[1][2:4]):
                segment = self._segments.get(location.segment) if location.segment in self._inherited else None
                if segment is None or not _fits(segment, location):
                    refused.append(key)
                else:
                    segment.live[location.offset] = _Live(key, location.stored_bytes)
            for id in self._inherited & self._segments.keys():
                if not self._segments[id].live:
                    self._remove(self._segments[id])
            self._inherited.clear()
        return refused

    def close(self, remove: bool = True) -> None:
        """Close all files and unlock the folder. Without `remove` the segments stay for a restart of the same owner."""
        with self._writing, self._state:
            if self._closed:
                return
            self._closed = True
            if self._open is not None:
                self._seal(self._open)
            for segment in list(self._segments.values()) if remove else ():
                self._remove(segment)
            self._reader.close()
            self._folder.close(remove)

    def check(self) -> None:
        """Assert that the books agree with the files themselves, that no blocks overlap, and that the cap holds."""
        with self._writing, self._state:
            assert self._used_bytes <= self._capacity_bytes, f"{self._used_bytes} bytes used of {self._capacity_bytes}"
            if self._closed:
                return
            known = {segment.id: segment.nbytes for segment in [*self._segments.values(), *self._stuck]}
            assert segments_in(self.folder) == dict(sorted(known.items())), f"{segments_in(self.folder)} on disk, {known} in the books"
            assert self._used_bytes == _FOLDER_BYTES + sum(map(_pages, known.values()))
            for segment in self._segments.values():
                self._check_segment(segment)
            self._reader.check()

    def _check_segment(self, segment: _Segment) -> None:
        assert (segment.fd is not None) == (segment is self._open), f"segment {segment.id} is open by mistake"
        assert segment.live or segment is self._open or segment.id in self._inherited, f"segment {segment.id} is of no use"
        end = 0
        for offset, live in sorted(segment.live.items()):
            assert offset >= end, f"blocks overlap at byte {offset} of segment {segment.id}"
            end = offset + live.stored_bytes
        assert end <= segment.nbytes, f"a block ends behind segment {segment.id}"

    def _must_be_open(self) -> None:
        if self._closed:
            raise TieredKVError(Kind.CLOSED, "the disk tier is closed")

    def _append_run(self, frames: "Sequence[_Unwritten]", first: int) -> list[Appended]:
        """Answers for the frames from `first` on that go side by side into one segment; at least one."""
        nbytes = frames[first].nbytes
        if nbytes > self.max_frame_bytes:
            return [Appended(None, Refused.TOO_LARGE)]
        own = nbytes > self.segment_bytes
        if not own and self._open is not None and self._open.nbytes + nbytes > self.segment_bytes:
            with self._state:
                self._seal(self._open)
        start = 0 if own or self._open is None else self._open.nbytes
        run = frames[first : first + 1] if own else self._run_that_fits(frames, first, start)
        with self._state:
            growth = _pages(start + _total(run)) - _pages(start)
            if not run or self._used_bytes + growth > self._capacity_bytes:
                return [Appended(None, Refused.FULL)]
            self._used_bytes += growth
        return self._write_run(run, own, start, growth)

    def _run_that_fits(self, frames: "Sequence[_Unwritten]", first: int, start: int) -> "list[_Unwritten]":
        """The frames from `first` on that fit side by side behind byte `start` of a segment, and below the cap."""
        room = self._capacity_bytes - self._used_bytes + _pages(start)
        limit = min(self.segment_bytes, room // PAGE_BYTES * PAGE_BYTES)
        run: list[_Unwritten] = []
        end = start
        for frame in frames[first:]:
            end += frame.nbytes
            if end > limit:
                break
            run.append(frame)
        return run

    def _write_run(self, run: "Sequence[_Unwritten]", own: bool, start: int, growth: int) -> list[Appended]:
        """Write a run behind byte `start`, for which `growth` bytes of the cap are taken already."""
        try:
            segment = self._new_segment() if own or self._open is None else self._open
        except OSError as error:
            with self._state:
                self._used_bytes -= growth
            return [Appended(None, _reason(error))]
        if not own:
            self._open = segment
        written, refused = self._write(segment.fd, [view for frame in run for view in frame.views], start)
        ends = [end for end in accumulate(frame.nbytes for frame in run) if end <= written]
        end = start + (ends[-1] if ends else 0)
        file_end = self._cut(segment, end) if refused else end
        with self._state:
            self._used_bytes += _pages(file_end) - _pages(start) - growth
            segment.nbytes = file_end
            placed = [self._place(segment, start + end - frame.nbytes, frame) for frame, end in zip(run, ends, strict=False)]
            if own or refused:
                self._seal(segment)
        return placed + [Appended(None, refused)] * (len(run) - len(placed))

    def _place(self, segment: _Segment, offset: int, frame: "_Unwritten") -> Appended:
        segment.live[offset] = _Live(frame.record.key, frame.nbytes)
        location = Location(blocks.Tier.DISK, frame.record.codec, segment.id, offset, frame.nbytes, frame.record.raw_bytes)
        return Appended(location, None)

    def _write(self, fd: int, views: list[memoryview], offset: int) -> tuple[int, Refused | None]:
        """Bytes written at `offset`, and why not all of them were."""
        written = 0
        while views:
            try:
                count = self._files.pwritev(fd, views[:_BUFFERS_PER_CALL], offset + written)
            except OSError as error:
                return written, _reason(error)
            if not count:
                return written, Refused.IO_ERROR
            written += count
            views = _behind(views, count)
        return written, None

    def _cut(self, segment: _Segment, end: int) -> int:
        """Cut a segment to `end` bytes; gives the bytes it has then, which are more if it cannot be cut."""
        try:
            self._files.truncate(segment.fd, end)
        except OSError:
            return os.fstat(segment.fd).st_size
        return end

    def _new_segment(self) -> _Segment:
        id = self._next_id
        fd = self._files.open(segment_path(self.folder, id), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with self._state:
            self._next_id += 1
            self._segments[id] = _Segment(id, fd=fd)
            return self._segments[id]

    def _seal(self, segment: _Segment) -> None:
        """Close the file of a segment that is written no further; remove it if nothing in it is wanted."""
        os.close(segment.fd)
        segment.fd = None
        if segment is self._open:
            self._open = None
        if not segment.live:
            self._remove(segment)

    def _seal_open(self) -> int | None:
        """Close the segment being written; its id, unless there is none, or nothing is left of it."""
        with self._writing, self._state:
            segment = self._open
            if segment is None:
                return None
            self._seal(segment)
            return segment.id if segment.id in self._segments else None

    def _remove(self, segment: _Segment) -> int:
        """Remove a segment's file and take it out of the books; the bytes that are free now."""
        del self._segments[segment.id]
        self._reader.drop(segment.id)
        before = _pages(segment.nbytes)
        try:
            remove_segment(self.folder, segment.id, self._files)
            segment.nbytes = 0
        except OSError:
            segment.nbytes = segments_in(self.folder).get(segment.id, 0)
            self._stuck.append(segment)
        freed = before - _pages(segment.nbytes)
        self._used_bytes -= freed
        return freed

    def _shrink_to_cap(self) -> None:
        """Bring what an owner with a larger cap has left below this one."""
        while self._used_bytes > self._capacity_bytes and self._segments:
            self._remove(next(iter(self._segments.values())))
        if self._used_bytes > self._capacity_bytes:
            self._folder.close(remove=False)
            message = f"disk_path: {self._used_bytes} bytes in {self.folder} cannot be removed, disk allows {self._capacity_bytes}"
            raise TieredKVError(Kind.STORAGE, message, setting="disk_path")


class _Unwritten(NamedTuple):
    """A record, its buffers as views, and their bytes in all."""

    record: Record
    views: list[memoryview]
    nbytes: int


def _unwritten(record: Record) -> _Unwritten:
    views = [byte_view(buffer) for buffer in record.buffers]
    nbytes = sum(map(len, views))
    if not nbytes:
        raise ValueError("a frame without bytes")
    return _Unwritten(record, [view for view in views if len(view)], nbytes)


def _total(run: Sequence[_Unwritten]) -> int:
    return sum(frame.nbytes for frame in run)


def _fits(segment: _Segment, location: Location) -> bool:
    """Whether a block lies within the segment and behind those adopted so far, which are in order."""
    last = next(reversed(segment.live), None)
    free_from = 0 if last is None else last + segment.live[last].stored_bytes
    is_sane = location.tier == blocks.Tier.DISK and location.stored_bytes > 0
    return is_sane and free_from <= location.offset and location.offset + location.stored_bytes <= segment.nbytes


def _behind(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of views of which the first `count` bytes are written."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def _reason(error: OSError) -> Refused:
    return Refused.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Refused.IO_ERROR
