"""Writes a segment file: appends runs of frames, and at last the footer.

Writes go through the page cache, 2 MiB at a time. After each piece, the kernel is asked to start writing to disk. So the disk
works while the next piece is prepared, and little is left for the one sync at the end (docs/design/007).
"""

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tiered_kv.tiers.disk.footer import pack_trailer
from tiered_kv.tiers.disk.segments import Files, segment_path
from tiered_kv.tiers.log import Refusal

log = logging.getLogger(__name__)

PAGE_BYTES = 4096
_PIECE_BYTES = 2 << 20
_WRITE_BACK_BYTES = 1 << 20  # smaller pieces would make the disk slower
_BUFFERS_PER_CALL = os.sysconf("SC_IOV_MAX")


class SegmentWriter:
    """The file of one segment, open for writing: a new one, or a former owner's file without a footer.

    Not thread-safe. The constructor raises OSError; the methods return failures as values.
    """

    def __init__(self, folder: Path, segment: int, files: Files, *, is_new: bool = True) -> None:
        self._segment = segment
        self._files = files
        self._written_back = 0
        self._fd = files.open(segment_path(folder, segment), os.O_WRONLY | os.O_CLOEXEC | is_new * (os.O_CREAT | os.O_EXCL), 0o600)

    def write(self, views: Sequence[memoryview], offset: int) -> tuple[int, Refusal | None]:
        """Write bytes at `offset`. Returns the number of bytes written, and the reason if some were not written."""
        written, left = 0, list(views)
        while left:
            try:
                count = self._files.pwritev(self._fd, _first(left, _PIECE_BYTES), offset + written)
            except OSError as error:
                return written, reason_of(error)
            if not count:
                return written, Refusal.IO_ERROR
            written += count
            left = _after(left, count)
            self._write_back(offset + written)
        return written, None

    def cut(self, end: int) -> int:
        """Truncate the file to `end` bytes. Returns its size afterwards, which is larger if that failed."""
        try:
            self._files.truncate(self._fd, end)
        except OSError:
            return os.fstat(self._fd).st_size
        return end

    def finish(self, rows: bytes, tag: bytes, end: int) -> int:
        """Write the footer at byte `end` and sync the file. Returns the size of the file.

        A failure is logged. The segment then has no footer, or one that a crash of the machine may lose; a restart then
        scans it.
        """
        trailer = pack_trailer(rows, tag, self._segment, end)
        written, refused = self.write([memoryview(rows), memoryview(trailer)], end)
        if refused:
            log.warning("disk segment %d is closed without a footer: %s", self._segment, refused)
            return self.cut(end)
        try:
            self._files.fdatasync(self._fd)
        except OSError as error:
            log.warning("disk segment %d may be lost if this machine fails: %s", self._segment, error.strerror)
        return end + written

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _write_back(self, end: int) -> None:
        """Ask the kernel to write back the bytes before `end`, in whole pages so that no page is written twice."""
        start, stop = self._written_back, end // PAGE_BYTES * PAGE_BYTES
        if stop - start >= _WRITE_BACK_BYTES:
            with suppress(OSError):  # it is a hint
                self._files.fadvise(self._fd, start, stop - start, os.POSIX_FADV_DONTNEED)
            self._written_back = stop


def reason_of(error: OSError) -> Refusal:
    """Returns the reason for refusing a frame after a failed system call."""
    return Refusal.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else Refusal.IO_ERROR


def _first(views: list[memoryview], nbytes: int) -> list[memoryview]:
    """Returns the first `nbytes` of views, or fewer: at most what one system call accepts."""
    first: list[memoryview] = []
    for view in views[:_BUFFERS_PER_CALL]:
        first.append(view[:nbytes])
        nbytes -= len(first[-1])
        if not nbytes:
            break
    return first


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """Returns the rest of views after their first `count` bytes, which are written."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []
