"""Locks on byte ranges of a file, owned by an open file description (Linux F_OFD_SETLK, `man 2 fcntl`).

The kernel releases them when the last descriptor of that description is closed, also when its process is killed.
So a restarted writer can see which extents another process is still writing to.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterable

from tiered_kv.errors import Kind, TieredKVError

_FLOCK = struct.Struct("@hhqqi0q")  # l_type, l_whence, l_start, l_len, l_pid (0 for OFD locks)


def _request(kind: int, start: int, nbytes: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, nbytes, 0)


def share_range(fd: int, start: int, nbytes: int) -> None:
    """Take a read lock on a range, which several file descriptions may share. `fd` must be readable.

    Raises (kind `memory`) if the kernel refuses.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_RDLCK, start, nbytes))
    except OSError as error:
        raise TieredKVError(Kind.MEMORY, f"cannot lock {nbytes} bytes at {start} of the arena: {error.strerror}") from error


def unlock_range(fd: int, start: int, nbytes: int) -> None:
    """Release all locks on a range that the file description of `fd` holds."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK, start, nbytes))


def try_exclusive(fd: int, start: int, nbytes: int) -> bool:
    """Try to take a write lock on a range. Returns False if another file description holds a lock in it. `fd` must be writable."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _request(fcntl.F_WRLCK, start, nbytes))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns the (start, bytes) ranges in ascending order, with neighbours and overlaps merged, so that a run needs fewer locks."""
    spans: list[tuple[int, int]] = []
    for start, nbytes in sorted(ranges):
        if spans and start <= spans[-1][0] + spans[-1][1]:
            first, length = spans[-1]
            spans[-1] = (first, max(length, start + nbytes - first))
        else:
            spans.append((start, nbytes))
    return spans


def locked_ranges(fd: int, ranges: Iterable[tuple[int, int]], alignment: int = 512) -> list[tuple[int, int]]:
    """Returns the parts of `ranges` on which other open file descriptions hold locks, rounded outwards to `alignment`.

    The parts are within `ranges`, in ascending order, without overlaps. Cost: one system call a range and two more a lock.
    """
    found: list[tuple[int, int]] = []
    pending = [(start, start + nbytes) for start, nbytes in ranges]
    while pending:
        start, end = pending.pop()
        lock = _first_conflict(fd, start, end)
        if lock is None:
            continue
        # The kernel reports any one of the locks, not the lowest: search on both sides of it.
        first = max(start, lock[0] // alignment * alignment)
        last = min(end, -(-lock[1] // alignment) * alignment)
        found.append((first, last - first))
        pending += [side for side in ((start, first), (last, end)) if side[0] < side[1]]
    return merged(found)


def _first_conflict(fd: int, start: int, end: int) -> tuple[int, int] | None:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, start, end - start))
    kind, _, first, length, _ = _FLOCK.unpack(answer)
    if kind == fcntl.F_UNLCK:
        return None
    return first, first + length if length else end
