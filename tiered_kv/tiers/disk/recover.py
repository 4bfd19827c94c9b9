"""Finds the frames in a segment of a former owner: by its footer, or else by a scan."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

from tiered_kv.codecs.frame import Frame, open_frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk import footer
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, ROW_BYTES, TRAILER_BYTES, Entry
from tiered_kv.tiers.disk.segments import Files, read_at, segment_path

log = logging.getLogger(__name__)


class SegmentFrames(NamedTuple):
    """The frames of a segment in the order written, the offset after the last one, and whether the caller should add a footer."""

    entries: list[Entry]
    data_end: int
    needs_footer: bool


def frames_in(folder: Path, segment: int, tag: bytes, files: Files) -> SegmentFrames:
    """Find the frames of a segment. Cost: two reads with a footer; without one, every byte is read and verified.

    Raises OSError if the file cannot be read, `TieredKVError` (kind `storage`, naming `disk_path`) for a segment of another
    version or secret. A frame listed by a footer is not verified until it is read.
    """
    fd = files.open(segment_path(folder, segment), os.O_RDONLY | os.O_CLOEXEC)
    try:
        nbytes = os.fstat(fd).st_size
        return _by_footer(fd, folder, segment, nbytes, tag, files) or _by_scan(fd, segment, nbytes, tag, files)
    finally:
        os.close(fd)


def _by_footer(fd: int, folder: Path, segment: int, nbytes: int, tag: bytes, files: Files) -> SegmentFrames | None:
    """Returns the frames listed by the footer, or None if there is no valid footer."""
    end = read_at(fd, max(0, nbytes - TRAILER_BYTES), TRAILER_BYTES, files)
    trailer = footer.unpack_trailer(end)
    if trailer is None or trailer.rows_offset + trailer.rows * ROW_BYTES + TRAILER_BYTES != nbytes:
        return None
    rows = read_at(fd, trailer.rows_offset, trailer.rows * ROW_BYTES, files)
    if not footer.is_footer(end, rows):
        return None
    if (trailer.version, trailer.tag) != (footer.VERSION, tag):
        raise foreign(folder, "another version" if trailer.version != footer.VERSION else "another secret")
    return SegmentFrames(footer.unpack_rows(rows), trailer.rows_offset, False) if trailer.segment == segment else None


def _by_scan(fd: int, segment: int, nbytes: int, tag: bytes, files: Files) -> SegmentFrames:
    """Scan a segment frame by frame, as far as entries follow each other. Leaves out damaged frames.

    A read error ends the scan. A later scan may find more, so no footer is requested then.
    """
    entries: list[Entry] = []
    at = end = 0
    try:
        while (entry := footer.unpack_entry(read_at(fd, at, ENTRY_BYTES, files), tag, segment, at + ENTRY_BYTES)) and entry.end <= nbytes:
            at = entry.end
            frame = _whole(read_at(fd, entry.offset, entry.stored_bytes, files), entry)
            if frame is not None:
                entries.append(entry._replace(error=frame.error))
                end = at
    except OSError as error:
        log.warning("disk segment %d cannot be read after byte %d: %s", segment, at, error.strerror)
        return SegmentFrames(entries, end, False)
    return SegmentFrames(entries, end, True)


def _whole(view: memoryview, entry: Entry) -> Frame | None:
    """Returns the frame described by an entry, or None if the bytes are another frame or damaged."""
    try:
        frame = open_frame(view, entry.key)
    except TieredKVError:
        return None
    return frame if (frame.codec.id, frame.raw_bytes) == (entry.codec, entry.raw_bytes) else None


def newest(entries_by_segment: dict[int, list[Entry]]) -> dict[int, list[Entry]]:
    """Returns the entries by segment with duplicates removed.

    A block is found twice if its segment was being rewritten. The last copy is kept, as its segment is removed last.
    """
    last = {entry.key: (segment, entry.offset) for segment, entries in sorted(entries_by_segment.items()) for entry in entries}
    return {
        segment: [entry for entry in entries if last[entry.key] == (segment, entry.offset)]
        for segment, entries in entries_by_segment.items()
    }


def foreign(folder: Path, what: str) -> TieredKVError:
    """Returns the error for segments of another version or secret, which are neither read nor removed."""
    message = f"disk_path: {folder} holds segments of {what}; remove them or name another folder"
    return TieredKVError(Kind.STORAGE, message, setting="disk_path", path=str(folder))
