"""Segment files of the disk tier: their names, the system calls on them, and the reader that any process may have.

A segment is one frame after the other, each behind an entry, written once from start to end (see `footer`). A reader
needs none of that: a location says where a frame is, and the frame's checksum that it is the one.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from tiered_kv import forking
from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs.frame import MAX_HEADER_BYTES, Frame, open_frame
from tiered_kv.errors import Kind, TieredKVError

_PIECE_BYTES = 256 << 10
_NAME = re.compile(r"segment-(\d{10})\.tkv")


class Files:
    """The system calls of the disk tier. An argument, so that tests can put failing ones in their place."""

    open = staticmethod(os.open)
    pwritev = staticmethod(os.pwritev)
    preadv = staticmethod(os.preadv)
    truncate = staticmethod(os.truncate)
    unlink = staticmethod(os.unlink)
    fdatasync = staticmethod(os.fdatasync)
    fadvise = staticmethod(os.posix_fadvise)


def segment_path(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / f"segment-{segment:010d}.tkv"


def segments_in(folder: Path) -> dict[int, int]:
    """Segments that lie in a folder, oldest first, and the bytes of each."""
    named = [(_NAME.fullmatch(entry.name), entry) for entry in os.scandir(folder)]
    return dict(sorted((int(name[1]), entry.stat().st_size) for name, entry in named if name))


class _OpenFile:
    """A file descriptor, how many read from it now, and whether to close it once nobody does."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.readers = 0
        self.retired = False

    def close_if_done(self) -> None:
        if self.retired and not self.readers:
            os.close(self.fd)


class SegmentReader:
    """Reads blocks from the segments in `folder`; needs nothing of the tier but the folder and a location. Thread-safe.

    Keeps at most `max_open` files open, the most recently used, besides those that are being read from.
    """

    def __init__(self, folder: str | os.PathLike, *, max_open: int = 64, files: Files | None = None) -> None:
        if max_open < 1:
            raise ValueError("a reader needs at least one open file")
        self._folder = Path(folder)
        self._max_open = max_open
        self._files = files or Files()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()  # never held while the disk works
        self._closed = False
        forking.register(self)

    def after_fork(self) -> None:
        """In a child process: a thread of the parent may have held the lock, and its reads are not ours."""
        self._lock = threading.Lock()
        for file in self._open.values():
            file.readers = 0

    def read(self, location: Location, key: bytes, namespace: bytes | None = None) -> Frame:
        """The verified frame at `location`: one allocation, one read, one pass over the bytes.

        Raises `TieredKVError`: kind `storage` when the segment is gone or cannot be read, kind `corrupt` when what
        lies there is not the block stored under `key`. Either is a miss to the caller. Never gives other bytes.
        """
        with self._borrowed(location.segment) as (file, was_open):
            try:
                return self._frame(file.fd, location, key, namespace)
            except TieredKVError:
                if not was_open:
                    raise
        # The open file may be one that was removed since, and the number given to another: look at what is there now.
        self.drop(location.segment, file)
        with self._borrowed(location.segment) as (file, _):
            return self._frame(file.fd, location, key, namespace)

    def read_bytes(self, location: Location, key: bytes) -> memoryview:
        """The bytes of the verified frame at `location`, to be copied elsewhere as they are; raises as `read`."""
        with self._borrowed(location.segment) as (file, _):
            buffer, _ = self._verified(file.fd, location, key, None)
            return buffer

    def head(self, location: Location) -> memoryview:
        """The first bytes at `location`, as many as a header may have, not verified; raises (kind `storage`) where they cannot be read."""
        with self._borrowed(location.segment) as (file, _):
            try:
                return read_at(file.fd, location.offset, min(location.stored_bytes, MAX_HEADER_BYTES), self._files)
            except OSError as error:
                message = f"disk segment {location.segment} at byte {location.offset}: {error.strerror}"
                raise TieredKVError(Kind.STORAGE, message, segment=location.segment) from error

    def drop(self, segment: int, file: _OpenFile | None = None) -> None:
        """Close a segment's file, if it is open (and is `file`, when given)."""
        with self._lock:
            if segment in self._open and file in (None, self._open[segment]):
                self._retire(segment)

    def close(self) -> None:
        """Close all files; reads under way finish, later ones raise (kind `closed`)."""
        with self._lock:
            self._closed = True
            for segment in list(self._open):
                self._retire(segment)

    def check(self) -> None:
        """Assert that no more files are open than may be, and all of them are."""
        with self._lock:
            assert len(self._open) <= self._max_open, f"{len(self._open)} files are open, {self._max_open} may be"
            for segment, file in self._open.items():
                assert file.readers >= 0, f"segment {segment} has {file.readers} readers"
                assert not file.retired, f"segment {segment} is kept though it is retired"
                os.fstat(file.fd)

    @contextmanager
    def _borrowed(self, segment: int) -> Iterator[tuple[_OpenFile, bool]]:
        """A segment's file, which stays open meanwhile, and whether it had been open before."""
        file, was_open = self._lent(segment), True
        if file is None:
            file, was_open = self._lent(segment, self._opened(segment)), False
        try:
            yield file, was_open
        finally:
            with self._lock:
                file.readers -= 1
                file.close_if_done()

    def _lent(self, segment: int, opened: _OpenFile | None = None) -> _OpenFile | None:
        """A segment's file, with one reader more; if none is open, `opened` is from now on, which otherwise is closed again."""
        with self._lock:
            if self._closed or (opened and segment in self._open):
                _close(opened)
            if self._closed:
                raise TieredKVError(Kind.CLOSED, "the reader of the disk tier is closed")
            file = self._open.setdefault(segment, opened) if opened else self._open.get(segment)
            if file is not None:
                self._open.move_to_end(segment)
                file.readers += 1
            while len(self._open) > self._max_open:
                self._retire(next(iter(self._open)))
            return file

    def _opened(self, segment: int) -> _OpenFile:
        """Open a segment's file. Takes no lock: on a disk that hangs this never returns."""
        path = segment_path(self._folder, segment)
        try:
            fd = self._files.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise TieredKVError(Kind.STORAGE, f"disk segment {segment} is gone", segment=segment) from error
        except OSError as error:
            raise TieredKVError(Kind.STORAGE, f"disk segment {segment}: {error.strerror}", segment=segment) from error
        return _OpenFile(fd)

    def _retire(self, segment: int) -> None:
        file = self._open.pop(segment)
        file.retired = True
        file.close_if_done()

    def _frame(self, fd: int, location: Location, key: bytes, namespace: bytes | None) -> Frame:
        return self._verified(fd, location, key, namespace)[1]

    def _verified(self, fd: int, location: Location, key: bytes, namespace: bytes | None) -> tuple[memoryview, Frame]:
        """What lies at a location, as bytes and as the frame that they are."""
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
            raise TieredKVError(Kind.CORRUPT, f"{location} does not describe the frame that lies there", **where)
        return buffer, frame


def _close(file: _OpenFile | None) -> None:
    """Close a file that nobody reads."""
    if file is not None:
        os.close(file.fd)


def read_at(fd: int, offset: int, nbytes: int, files: Files) -> memoryview:
    """What a file holds there, which is less than `nbytes` if it ends before; raises OSError.

    A piece at a time: while one is copied the kernel reads the next ones ahead, so that a cold block comes faster than by
    one call (measured: docs/design/007).
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
    """Remove a segment's file and give its room back at once, even while other processes have it open; raises OSError."""
    path = segment_path(folder, segment)
    with suppress(FileNotFoundError):
        files.truncate(path, 0)
        files.unlink(path)
