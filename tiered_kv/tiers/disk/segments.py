"""Segment files of the disk tier: their names, the system calls on them, and a reader that any process may use.

A segment is a sequence of frames, each after its entry, written once from start to end (see `footer`). A reader does not need the
entries: a location says where a frame is, and the frame's checksum proves that it is the right one.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tiered_kv import forking
from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs.frame import MAX_HEADER_BYTES, Frame, open_frame
from tiered_kv.errors import Kind, TieredKVError

_PIECE_BYTES = 256 << 10
_NAME = re.compile(r"segment-(\d{10})\.tkv")


class Files:
    """The system calls of the disk tier. Passed as an argument, so that tests can replace them by failing ones."""

    open = staticmethod(os.open)
    pwritev = staticmethod(os.pwritev)
    preadv = staticmethod(os.preadv)
    truncate = staticmethod(os.truncate)
    unlink = staticmethod(os.unlink)
    fdatasync = staticmethod(os.fdatasync)
    fadvise = staticmethod(os.posix_fadvise)


def segment_path(folder: Path, segment: int) -> Path:
    """Returns the path of a segment's file."""
    return folder / f"segment-{segment:010d}.tkv"


def segments_in(folder: Path) -> dict[int, int]:
    """Returns the segments in a folder, oldest first, with the bytes of each."""
    named = [(_NAME.fullmatch(entry.name), entry) for entry in os.scandir(folder)]
    return dict(sorted((int(name[1]), entry.stat().st_size) for name, entry in named if name))


class _OpenFile:
    """An open segment file: its descriptor, the number of reads under way, and whether to close it after the last of them."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.readers = 0
        self.retired = False

    def close_if_done(self) -> None:
        if self.retired and not self.readers:
            os.close(self.fd)


class FilePart(NamedTuple):
    """A range of bytes in an open file."""

    fd: int
    offset: int
    nbytes: int


class SegmentReader:
    """Reads blocks from the segments in `folder`. It needs only the folder and a location, not the tier. Thread-safe.

    Keeps the `max_open` most recently used files open, besides files that are being read from. Whenever it opens a file, it closes those
    that the node has removed since.
    """

    def __init__(self, folder: str | os.PathLike[str], *, max_open: int = 64, files: Files | None = None) -> None:
        if max_open < 1:
            raise ValueError(f"max_open: must be at least 1, got {max_open}")
        self._folder = Path(folder)
        self._max_open = max_open
        self._files = files or Files()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()  # never held while the disk works
        self._closed = False
        forking.register(self)

    def after_fork(self) -> None:
        """Reset a forked child: a thread of the parent may have held the lock, and the parent's reads do not count here."""
        self._lock = threading.Lock()
        for file in self._open.values():
            file.readers = 0

    def read(self, location: Location, key: bytes, namespace: bytes | None = None) -> Frame:
        """Read and verify the frame at `location`: one allocation, one read, one pass over the bytes.

        Raises `TieredKVError`: kind `storage` if the segment is missing or cannot be read, kind `corrupt` if the bytes are
        not the block stored under `key`. The caller counts both as a miss. Never returns the bytes of another block.
        """
        with self._borrowed(location.segment) as (file, was_open):
            try:
                return self._frame(file.fd, location, key, namespace)
            except TieredKVError:
                if not was_open:
                    raise
        # The open file may have been removed since, and its number reused: open the file that exists now.
        self.drop(location.segment, file)
        with self._borrowed(location.segment) as (file, _):
            return self._frame(file.fd, location, key, namespace)

    def read_bytes(self, location: Location, key: bytes) -> memoryview:
        """Returns the bytes of the verified frame at `location`, for copying them unchanged. Raises as `read` does."""
        with self._borrowed(location.segment) as (file, _):
            buffer, _ = self._verified(file.fd, location, key, None)
            return buffer

    @contextmanager
    def lend(self, location: Location) -> Iterator[FilePart]:
        """Yields where the frame at `location` is in its file, without verifying it. The file stays open during the `with` block.

        Raises (kind `storage`) if the segment is missing.
        """
        with self._borrowed(location.segment) as (file, _):
            yield FilePart(file.fd, location.offset, location.stored_bytes)

    def head(self, location: Location) -> memoryview:
        """Returns the first bytes at `location`, enough for any frame header, unverified. Raises (kind `storage`) if unreadable."""
        with self._borrowed(location.segment) as (file, _):
            try:
                return read_at(file.fd, location.offset, min(location.stored_bytes, MAX_HEADER_BYTES), self._files)
            except OSError as error:
                message = f"disk segment {location.segment} at byte {location.offset}: {error.strerror}"
                raise TieredKVError(Kind.STORAGE, message, segment=location.segment) from error

    def drop(self, segment: int, file: _OpenFile | None = None) -> None:
        """Close a segment's file if it is open. If `file` is given, close it only if it is that file."""
        with self._lock:
            if segment in self._open and file in (None, self._open[segment]):
                self._retire(segment)

    def close(self) -> None:
        """Close all files. Reads under way finish; later ones raise (kind `closed`)."""
        with self._lock:
            self._closed = True
            for segment in list(self._open):
                self._retire(segment)

    def check(self) -> None:
        """Assert that at most `max_open` files are kept, and that each of them is open."""
        with self._lock:
            assert len(self._open) <= self._max_open, f"{len(self._open)} files are open, {self._max_open} may be"
            for segment, file in self._open.items():
                assert file.readers >= 0, f"segment {segment} has {file.readers} readers"
                assert not file.retired, f"segment {segment} is kept though it is retired"
                os.fstat(file.fd)

    @contextmanager
    def _borrowed(self, segment: int) -> Iterator[tuple[_OpenFile, bool]]:
        """Yields a segment's file, which stays open during the `with` block, and whether it was open before."""
        file = self._lent(segment)
        was_open = file is not None
        if file is None:
            file = self._lent(segment, self._opened(segment))
            assert file is not None, "an opened file is lent"
        try:
            yield file, was_open
        finally:
            with self._lock:
                file.readers -= 1
                file.close_if_done()

    def _lent(self, segment: int, opened: _OpenFile | None = None) -> _OpenFile | None:
        """Returns a segment's file and counts one more reader of it, or returns None if the file is not open.

        If `opened` is given, keeps `opened` as the segment's file, or closes it if the segment already has an open file.
        """
        with self._lock:
            if self._closed or (opened and segment in self._open):
                _close(opened)
            if self._closed:
                raise TieredKVError(Kind.CLOSED, "the reader of the disk tier is closed")
            if opened:
                self._retire_removed()
            file = self._open.setdefault(segment, opened) if opened else self._open.get(segment)
            if file is not None:
                self._open.move_to_end(segment)
                file.readers += 1
            while len(self._open) > self._max_open:
                self._retire(next(iter(self._open)))
            return file

    def _opened(self, segment: int) -> _OpenFile:
        """Open a segment's file. Holds no lock meanwhile, because on a hung disk this call never returns."""
        path = segment_path(self._folder, segment)
        try:
            fd = self._files.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise TieredKVError(Kind.STORAGE, f"disk segment {segment} no longer exists", segment=segment) from error
        except OSError as error:
            raise TieredKVError(Kind.STORAGE, f"disk segment {segment} cannot be opened: {error.strerror}", segment=segment) from error
        return _OpenFile(fd)

    def _retire_removed(self) -> None:
        removed = [segment for segment, file in self._open.items() if not os.fstat(file.fd).st_nlink]
        for segment in removed:
            self._retire(segment)

    def _retire(self, segment: int) -> None:
        file = self._open.pop(segment)
        file.retired = True
        file.close_if_done()

    def _frame(self, fd: int, location: Location, key: bytes, namespace: bytes | None) -> Frame:
        return self._verified(fd, location, key, namespace)[1]

    def _verified(self, fd: int, location: Location, key: bytes, namespace: bytes | None) -> tuple[memoryview, Frame]:
        """Read and verify the frame at a location. Returns its bytes and the frame."""
        where = {"segment": location.segment, "offset": location.offset}
        try:
            buffer = read_at(fd, location.offset, location.stored_bytes, self._files)
            frame = open_frame(buffer, key, namespace)
        except OSError as error:
            message = f"disk segment {location.segment} at byte {location.offset}: {error.strerror}"
            raise TieredKVError(Kind.STORAGE, message, **where) from error
        except TieredKVError as error:
            message = f"disk segment {location.segment} at byte {location.offset}: {error}"
            raise TieredKVError(Kind.CORRUPT, message, **where) from error
        if (location.tier, location.codec, location.raw_bytes) != (Tier.DISK, frame.codec.id, frame.raw_bytes):
            raise TieredKVError(
                Kind.CORRUPT,
                f"the frame at {location} has codec {frame.codec.id} and {frame.raw_bytes} raw bytes, not those of this location",
                **where,
            )
        return buffer, frame


def _close(file: _OpenFile | None) -> None:
    """Close a file that has no readers, if one is given."""
    if file is not None:
        os.close(file.fd)


def read_at(fd: int, offset: int, nbytes: int, files: Files) -> memoryview:
    """Returns `nbytes` of a file from `offset` on, or fewer if the file ends before. Raises OSError.

    Reads a piece at a time: while one piece is copied the kernel reads ahead, which is faster for a cold block than one
    call (measured: docs/design/007).
    """
    buffer = memoryview(np.empty(nbytes, np.uint8))
    done = 0
    while done < nbytes:
        count = files.preadv(fd, [buffer[done : done + _PIECE_BYTES]], offset + done)
        if not count:
            break
        done += count
    return buffer[:done]


def remove_segment(folder: Path, segment: int, files: Files) -> None:
    """Remove a segment's file and free its room at once, even if other processes have it open. Raises OSError."""
    path = segment_path(folder, segment)
    with suppress(FileNotFoundError):
        files.truncate(path, 0)
        files.unlink(path)
