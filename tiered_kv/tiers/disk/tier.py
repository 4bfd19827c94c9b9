"""The disk tier: frames in append-only segment files, under a hard byte cap, found again after a restart.

A batch of blocks is written side by side, 2 MiB a system call. A full segment gets a footer and is synced, once. Room is made by
removing whole segments, oldest first, as in flash caches: no file per block, no holes. Useful blocks of a segment are written again
before it is removed (`reinsert`).

The folder, its owner file and every segment with its footer count against the cap, each rounded up to whole pages of 4 KiB as file
systems allocate them. A segment is emptied before it is unlinked, so that its room is free even while readers in other processes
have it open. Such a reader finds fewer bytes than expected, which is a miss.
"""

import logging
import os
import threading
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate

from tiered_kv import blocks
from tiered_kv.blocks import Location
from tiered_kv.codecs.frame import MAX_FRAME_BYTES, Frame, carried_error
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.tiers.disk.folder import OwnedFolder
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, ROW_BYTES, TRAILER_BYTES, Entry, footer_bytes, pack_entry, pack_row, store_tag
from tiered_kv.tiers.disk.recover import SegmentFrames, frames_in, newest
from tiered_kv.tiers.disk.run import Unwritten, that_fit, unwritten
from tiered_kv.tiers.disk.segment_table import LiveBlock, Segment, location_of, pages, room
from tiered_kv.tiers.disk.segments import FilePart, Files, SegmentReader, remove_segment, segment_path, segments_in
from tiered_kv.tiers.disk.writer import PAGE_BYTES, SegmentWriter, reason_of
from tiered_kv.tiers.log import AppendResult, LogTier, Record, RecoveredBlock, Refusal

log = logging.getLogger(__name__)

MIN_CAPACITY_BYTES = 16 * PAGE_BYTES
_FOLDER_BYTES = 2 * PAGE_BYTES  # the folder itself and its owner file
_SEGMENTS_MIN = 8
_SMALL_FRAME_BYTES = 1024
_REINSERT_BATCH_BYTES = 8 << 20


class DiskTier(LogTier):
    """Blocks in segment files of about `segment_bytes` in `folder`, which no other tier uses; in all at most `capacity_bytes`.

    Thread-safe: appends run one at a time, reads never wait for them. A segment is at most an eighth of the cap; a larger
    frame has a segment of its own. The room of one segment is reserved for `reinsert`.

    The next tier on the folder finds the appended blocks again (`recovered`), whoever its owner is and however this tier
    ended. It may also find forgotten blocks again. The folder is locked, and its segments are bound to `secret`: with another
    secret they are neither read nor removed. If the cap is smaller than what is there, the oldest segments are removed.

    Raises `TieredKVError`: kind `storage`, naming `disk_path`, for a folder that is in use, has segments of another
    secret or version, or cannot be used; kind `config` for a cap too small. Cost of opening: two reads a segment, and a
    pass over every byte of a segment without a footer, usually the last.
    """

    name = blocks.Tier.DISK.label

    def __init__(
        self,
        folder: str | os.PathLike[str],
        capacity_bytes: int,
        segment_bytes: int,
        *,
        owner: str,
        secret: str = "",
        files: Files | None = None,
    ) -> None:
        if capacity_bytes < MIN_CAPACITY_BYTES:
            raise TieredKVError(Kind.CONFIG, f"disk: must be at least {MIN_CAPACITY_BYTES} bytes, got {capacity_bytes}", setting="disk")
        self._capacity_bytes = capacity_bytes
        self.segment_bytes = max(min(segment_bytes, capacity_bytes // _SEGMENTS_MIN) // PAGE_BYTES, 1) * PAGE_BYTES
        self._append_limit_bytes = capacity_bytes - self.segment_bytes - 2 * PAGE_BYTES
        self._tag = store_tag(secret)
        self._files = files or Files()
        self._folder = OwnedFolder(folder, owner, self._tag)
        self.folder = self._folder.path
        self._reader = SegmentReader(self.folder, files=self._files)
        self._writing = threading.RLock()  # held while files are written; taken before _state
        self._removing = threading.RLock()  # held while files are removed; taken before _state
        self._state = threading.RLock()  # held while the bookkeeping changes, never during a system call on the disk
        self._segments: dict[int, Segment] = {}
        self._unwanted: list[Segment] = []  # to be removed; their bytes count until then
        self._stuck: list[Segment] = []  # could not be read or removed; their bytes count for ever
        self._used_bytes = _FOLDER_BYTES
        self._open: Segment | None = None
        self._closed = False
        self._written_bytes = self._reinserted_bytes = self._new_bytes = 0
        try:
            self._recovered = self._recover()
        except BaseException:
            self._folder.close(remove=False)
            raise
        self._next_id = max(self._folder.inherited, default=0) + 1

    @property
    def next_segment(self) -> int:
        return self._next_id

    @property
    def max_frame_bytes(self) -> int:
        """Size in bytes of the largest frame that the tier can store."""
        file_bytes = (self._append_limit_bytes - _FOLDER_BYTES) // PAGE_BYTES * PAGE_BYTES
        return min(MAX_FRAME_BYTES, file_bytes - ENTRY_BYTES - footer_bytes(1))

    @property
    def written_bytes(self) -> int:
        """All bytes written to segments since the tier was opened: frames, entries and footers."""
        return self._written_bytes

    @property
    def reinserted_bytes(self) -> int:
        """The part of `written_bytes` that `reinsert` wrote."""
        return self._reinserted_bytes

    @property
    def write_amplification(self) -> float:
        """`written_bytes` divided by the bytes of the frames that `append` wrote; 1.0 before the first."""
        return self._written_bytes / self._new_bytes if self._new_bytes else 1.0

    def append(self, records: Sequence[Record]) -> list[AppendResult]:
        """Write frames. Returns for each, in order, its location or why it was refused. No part of a refused frame can ever be read.

        If the file system fails, the rest of the batch is refused with the same reason, and the segment is cut to its last
        whole frame and closed. Cost: a write to the page cache, and a sync of each segment that becomes full. Other appends
        wait meanwhile.
        """
        answers = self._append(records, self._append_limit_bytes)
        with self._state:
            self._new_bytes += _stored_bytes(answers)
        return answers

    def read(self, location: Location, key: BlockKey, namespace: bytes | None = None) -> Frame:
        """Read and verify the frame at `location`, as `SegmentReader.read` does."""
        return self._reader.read(location, key, namespace)

    def lend(self, location: Location) -> AbstractContextManager[FilePart]:
        """Yields the file range of the frame at `location` (see `SegmentReader.lend`)."""
        return self._reader.lend(location)

    def carried(self, location: Location) -> float | None:
        """Returns the coding error in the frame header at `location`, None if it cannot be read. Cost: one small read."""
        try:
            return carried_error(self._reader.head(location))
        except TieredKVError as error:
            log.warning("%s", error)
            return None

    def forget(self, location: Location) -> bool:
        """Drop the block at `location`. Returns False if no block was there. Never waits for the disk.

        When a segment has lost its last block, the next append or reclaim removes it. Its bytes count until then. A block
        dropped after its segment was sealed may be found again after a restart.
        """
        with self._state:
            segment = self._segments.get(location.segment)
            if segment is None or segment.live.pop(location.offset, None) is None:
                return False
            if not segment.live and segment.writer is None:
                self._discard(segment)
            return True

    def recovered(self) -> list[RecoveredBlock]:
        """Returns the blocks of a former owner, oldest first, without duplicates; at later calls []. They stay until `forget`."""
        with self._state:
            found, self._recovered = self._recovered, []
            return found

    def needs_reclaim(self, nbytes: int, count: int | None = None) -> int | None:
        """Returns the segment to remove next (`reclaim`), the oldest, if `count` frames of `nbytes` in total may not fit.

        Returns None if all frames fit, or if no segment can be reclaimed. Without `count`, frames of at least 1 KiB are
        assumed. Usage: call this, `reinsert` the useful blocks of `keys_in`, report the other blocks as lost, call `reclaim`,
        and repeat. If every block is reinserted, no room is ever made. May seal the segment being written, if no other can be
        reclaimed. Do not call it for a frame above `max_frame_bytes`, or a batch larger than the tier: that would remove every
        segment.
        """
        if self._unwanted:
            self._sweep()
        nbytes += (nbytes // _SMALL_FRAME_BYTES + 1 if count is None else count) * (ENTRY_BYTES + ROW_BYTES)
        rounding = (PAGE_BYTES + TRAILER_BYTES) * (2 + 2 * nbytes // self.segment_bytes)
        with self._state:
            if self._used_bytes + nbytes + rounding <= self._append_limit_bytes:
                return None
            oldest = self.oldest_sealed()
        return self._seal_open() if oldest is None else oldest

    def oldest_sealed(self) -> int | None:
        """Returns the oldest segment that is not being written, or None."""
        with self._state:
            return next((segment.id for segment in self._segments.values() if segment.writer is None), None)

    def keys_in(self, segment: int) -> list[BlockKey]:
        """Returns the keys of a segment's live blocks, in the order written; [] if the segment no longer exists."""
        with self._state:
            return [live.key for live in self._segments[segment].live.values()] if segment in self._segments else []

    def reinsert(self, segment: int, wanted: Collection[BlockKey]) -> list[tuple[BlockKey, Location]]:
        """Write live blocks of a sealed segment again, unchanged, at the end of the log. Returns their keys and new locations.

        Frames are verified while they are copied. A block is left out if it is damaged, not live, or has no room. All
        have room if the segment reinserted before was reclaimed, and this one is no larger than `segment_bytes`. The old locations
        stay valid until `reclaim`. Cost: a read and a write of the frames, without decoding.
        """
        wanted, moved = set(wanted), []
        batch: list[Record] = []
        for entry in self._live_entries(segment):
            if entry.key in wanted and (record := self._record_of(segment, entry)):
                batch.append(record)
                if sum(len(record.buffers[0]) for record in batch) >= _REINSERT_BATCH_BYTES:
                    moved += self._rewrite(batch)
                    batch = []
        return moved + self._rewrite(batch)

    def reclaim(self, segment: int) -> int:
        """Remove a sealed segment with all its blocks, and segments without live blocks. Returns the bytes that this freed.

        A segment that no longer exists frees nothing. If a file cannot be removed, its bytes still count. Cost: that of the
        file system, some milliseconds for 64 MiB.
        """
        with self._state:
            if segment in self._segments:
                self._discard(self._sealed(segment))
        return self._sweep()

    def close(self, remove: bool = True) -> None:
        """Close all files and unlock the folder. Without `remove` the segments stay for the next owner."""
        with self._writing, self._removing, self._state:
            if self._closed:
                return
            self._closed = True
            if self._open is not None:
                if remove:
                    self._open.live.clear()  # it needs no footer then
                self._seal(self._open)
            for segment in list(self._segments.values()) if remove else ():
                self._discard(segment)
            self._sweep()
            self._reader.close()
            self._folder.close(remove)

    def check(self) -> None:
        """Assert that the bookkeeping agrees with the files, that no blocks overlap, and that the cap holds."""
        with self._writing, self._removing, self._state:
            assert self._used_bytes <= self._capacity_bytes, f"{self._used_bytes} bytes used of {self._capacity_bytes}"
            if self._closed:
                return
            known = {segment.id: segment for segment in [*self._segments.values(), *self._unwanted, *self._stuck]}
            sizes = {id: known[id].nbytes for id in sorted(known)}
            assert segments_in(self.folder) == sizes, f"{segments_in(self.folder)} on disk, {sizes} recorded"
            assert self._used_bytes == _FOLDER_BYTES + sum(segment.room_bytes for segment in known.values())
            for segment in self._segments.values():
                assert (segment.writer is not None) == (segment is self._open), f"segment {segment.id} is open by mistake"
                segment.check()
            self._reader.check()

    def _append(self, records: Sequence[Record], limit_bytes: int) -> list[AppendResult]:
        """Write frames as `append` does, but refuse those with which more than `limit_bytes` of the cap would be used."""
        frames = [unwritten(record) for record in records]
        answers: list[AppendResult] = []
        with self._writing:
            if self._closed:
                raise TieredKVError(Kind.CLOSED, "the disk tier is closed")
            self._sweep()
            while len(answers) < len(frames):
                run = self._append_run(frames[len(answers) :], limit_bytes)
                answers += run
                if run[-1].refused in (Refusal.NO_SPACE, Refusal.IO_ERROR):
                    answers += run[-1:] * (len(frames) - len(answers))
        return answers

    def _append_run(self, frames: Sequence[Unwritten], limit_bytes: int) -> list[AppendResult]:
        """Write as many leading frames as fit side by side into one segment. Returns their results, at least one."""
        if frames[0].stored_bytes > self.max_frame_bytes:
            return [AppendResult(None, Refusal.TOO_LARGE)]
        own = room(frames[0].nbytes, 1) > self.segment_bytes
        target = None if own else self._open
        if target and room(target.nbytes + frames[0].nbytes, len(target.rows) + 1) > self.segment_bytes:
            self._seal(target)
            target = None
        start, rows, taken = (target.nbytes, len(target.rows), target.room_bytes) if target else (0, 0, 0)
        with self._state:
            file_bytes = limit_bytes - self._used_bytes + taken
            run = that_fit(frames[:1] if own else frames, start, rows, file_bytes if own else min(file_bytes, self.segment_bytes))
            if not run:
                return [AppendResult(None, Refusal.FULL)]
            growth = room(start + sum(frame.nbytes for frame in run), rows + len(run)) - taken
            self._used_bytes += growth
        return self._write_run(run, target, own, growth)

    def _write_run(self, run: Sequence[Unwritten], target: Segment | None, own: bool, growth: int) -> list[AppendResult]:
        """Write a run at the end of `target` or into a new segment. `growth` bytes of the cap are already reserved for it.

        Returns for each frame its location or why it was refused.
        """
        try:
            segment = target or self._new_segment()
        except OSError as error:
            with self._state:
                self._used_bytes -= growth
            return [AppendResult(None, reason_of(error))]
        if not own:
            self._open = segment
        start, taken = segment.nbytes, segment.room_bytes if target else 0
        ends = list(accumulate((frame.nbytes for frame in run), initial=start))
        entries = [frame.entry(offset + ENTRY_BYTES) for frame, offset in zip(run, ends, strict=False)]
        pieces = zip(entries, run, strict=True)
        views = [view for entry, frame in pieces for view in (memoryview(pack_entry(entry, self._tag, segment.id)), *frame.views)]
        writer = segment.writer
        assert writer is not None, "a sealed segment is not written"
        written, refused = writer.write(views, start)
        whole = sum(end <= start + written for end in ends[1:])
        file_end = writer.cut(ends[whole]) if refused else ends[whole]
        with self._state:
            self._written_bytes += written
            segment.nbytes = file_end
            placed = [AppendResult(segment.place(entry), None) for entry in entries[:whole]]
            self._used_bytes += segment.room_bytes - taken - growth
        if own or refused:
            self._seal(segment)
        return placed + [AppendResult(None, refused)] * (len(run) - whole)

    def _new_segment(self) -> Segment:
        writer = SegmentWriter(self.folder, self._next_id, self._files)
        with self._state:
            segment = self._segments[self._next_id] = Segment(self._next_id, writer=writer)
            self._next_id += 1
            return segment

    def _seal(self, segment: Segment) -> None:
        """Finish a segment with its footer, or remove it if it has no live block.

        The lock `_state` is not held while the disk works. A block dropped during that time is still in the footer.
        """
        with self._state:
            rows = b"".join(row for offset, row in segment.rows.items() if offset in segment.live)
        assert segment.writer is not None, "a segment is sealed once"
        nbytes = segment.writer.finish(rows, self._tag, segment.nbytes) if rows else segment.nbytes
        segment.writer.close()
        with self._state:
            taken = segment.room_bytes
            self._written_bytes += nbytes - segment.nbytes
            segment.nbytes, segment.writer = nbytes, None
            segment.rows.clear()
            self._used_bytes += segment.room_bytes - taken
            if segment is self._open:
                self._open = None
            if not segment.live:
                self._discard(segment)
        self._sweep()

    def _seal_open(self) -> int | None:
        """Seal the segment being written. Returns its id, or None if there was none or it had no live block."""
        with self._writing:
            segment = self._open
            if segment is None:
                return None
            self._seal(segment)
            return segment.id if segment.id in self._segments else None

    def _sealed(self, id: int) -> Segment:
        """Returns a segment. Raises ValueError if it is being written."""
        if self._segments[id].writer is not None:
            raise ValueError(f"segment {id} must be sealed, but it is being written")
        return self._segments[id]

    def _discard(self, segment: Segment) -> None:
        """Mark a segment for removal by `_sweep`; until then its bytes count against the cap. The caller holds the lock `_state`."""
        del self._segments[segment.id]
        self._unwanted.append(segment)

    def _sweep(self) -> int:
        """Remove the files of segments marked for removal. Returns the bytes that this freed. `forget` never waits for it."""
        freed = 0
        with self._removing:
            while self._unwanted:
                segment = self._unwanted[-1]
                freed += self._remove(segment)
                self._unwanted.remove(segment)
        return freed

    def _remove(self, segment: Segment) -> int:
        """Remove the file of a segment marked for removal. Returns the bytes that this freed."""
        self._reader.drop(segment.id)
        left = 0
        try:
            remove_segment(self.folder, segment.id, self._files)
        except OSError:
            left = segments_in(self.folder).get(segment.id, 0)
            self._stuck.append(segment)
        with self._state:
            freed = segment.room_bytes - pages(left)
            segment.nbytes = left
            self._used_bytes -= freed
        return freed

    def _live_entries(self, id: int) -> list[Entry]:
        """Returns the live blocks of a sealed segment, with the metadata in its file."""
        with self._state:
            live = dict(self._sealed(id).live) if id in self._segments else {}
        try:
            entries = frames_in(self.folder, id, self._tag, self._files).entries if live else []
        except OSError as error:
            log.warning("disk segment %d cannot be read: %s", id, error.strerror)
            return []
        return [entry for entry in entries if live.get(entry.offset) == (entry.key, entry.stored_bytes)]

    def _record_of(self, segment: int, entry: Entry) -> Record | None:
        """Read a block so that it can be written again. Returns None if it is damaged."""
        try:
            frame = self._reader.read_bytes(location_of(segment, entry), entry.key)
        except TieredKVError as error:
            log.warning("block %s is dropped: %s", entry.key.hex(), error)
            return None
        return Record(entry.info, [frame], entry.codec, entry.raw_bytes)

    def _rewrite(self, records: Sequence[Record]) -> list[tuple[BlockKey, Location]]:
        answers = self._append(records, self._capacity_bytes)
        with self._state:
            self._reinserted_bytes += _stored_bytes(answers)
        return [(record.key, answer.location) for record, answer in zip(records, answers, strict=True) if answer.location]

    def _recover(self) -> list[RecoveredBlock]:
        """Take over the segments of a former owner. Returns their blocks, oldest first."""
        found: dict[int, SegmentFrames] = {}
        for id, nbytes in self._folder.inherited.items():
            self._used_bytes += pages(nbytes)
            try:
                found[id] = frames_in(self.folder, id, self._tag, self._files)
            except OSError as error:
                log.warning("disk segment %d cannot be read: %s", id, error.strerror)
                self._stuck.append(Segment(id, nbytes))
        entries = newest({id: each.entries for id, each in found.items()})
        for id in found:
            live = {entry.offset: LiveBlock(entry.key, entry.stored_bytes) for entry in entries[id]}
            self._segments[id] = Segment(id, self._folder.inherited[id], live=live)
        for segment in [segment for segment in self._segments.values() if not segment.live]:
            self._discard(segment)
        self._sweep()
        for id in [id for id in self._segments if found[id].needs_footer]:
            self._cut_tail(self._segments[id], found[id].data_end)
        self._shrink_to_cap()
        for id in [id for id in self._segments if found[id].needs_footer]:
            self._add_footer(self._segments[id], entries[id])
        return [RecoveredBlock(entry.info, location_of(id, entry), entry.error) for id in self._segments for entry in entries[id]]

    def _cut_tail(self, segment: Segment, end: int) -> None:
        """Cut off the partial frame that a crash left after the last whole frame."""
        log.info("disk segment %d has no footer: %d blocks in %d bytes, of %d", segment.id, len(segment.live), end, segment.nbytes)
        try:
            self._files.truncate(segment_path(self.folder, segment.id), end)
        except OSError:
            return
        self._used_bytes -= pages(segment.nbytes) - pages(end)
        segment.nbytes = end

    def _add_footer(self, segment: Segment, entries: Sequence[Entry]) -> None:
        """Write the footer that a crash prevented, if there is room, so that the segment is scanned only once."""
        growth = room(segment.nbytes, len(entries)) - pages(segment.nbytes)
        if self._used_bytes + growth > self._capacity_bytes:
            return
        try:
            writer = SegmentWriter(self.folder, segment.id, self._files, is_new=False)
        except OSError as error:
            log.warning("disk segment %d gets no footer: %s", segment.id, error.strerror)
            return
        before = segment.room_bytes
        segment.nbytes = writer.finish(b"".join(map(pack_row, entries)), self._tag, segment.nbytes)
        writer.close()
        self._used_bytes += segment.room_bytes - before

    def _shrink_to_cap(self) -> None:
        """Remove the oldest segments until all fit under the cap, which may have been larger for the former owner."""
        while self._used_bytes > self._capacity_bytes and self._segments:
            self._discard(next(iter(self._segments.values())))
            self._sweep()
        if self._used_bytes > self._capacity_bytes:
            message = f"disk_path: {self._used_bytes} bytes in {self.folder} cannot be removed, but disk allows only {self._capacity_bytes}"
            raise TieredKVError(Kind.STORAGE, message, setting="disk_path")


def _stored_bytes(answers: Sequence[AppendResult]) -> int:
    return sum(answer.location.stored_bytes for answer in answers if answer.location)
