"""A node's files in shared memory: creating, attaching and removing them, and the locks that protect them.

`<shm_path>/tkv-<cluster>-<node>/` (0700) contains `index`, `arena`, `lock`, `sock` and `node.json` (0600). Every process that uses
the directory holds a shared flock on `lock`; its one writer also holds a write lock on the first byte of that file. If the flock
can be taken exclusively, no process uses the directory.
"""

import errno
import fcntl
import mmap
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from tiered_kv import forking
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory import words as w
from tiered_kv.memory.locks import try_exclusive
from tiered_kv.memory.room import available_bytes, require_room, too_small

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
_PREFIX = "tkv-"
_INDEX, _ARENA, _LOCK, _SOCK = "index", "arena", "lock", "sock"


class Mapping:
    """A whole file, mapped shared and writable, all pages present from the start."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self.nbytes = nbytes
        self.map: mmap.mmap | None = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def tensor(self) -> "torch.Tensor":
        """Returns the file as a 1-D uint8 tensor that shares its memory. The file stays mapped as long as the tensor exists."""
        import torch  # here, because commands that only look for nodes do without it

        # numpy keeps the buffer exported; torch.frombuffer would let the mapping be closed while the tensor exists.
        with torch.inference_mode(False):  # a tensor made in that mode cannot be written to outside of it
            return torch.from_numpy(np.frombuffer(self.mapped(), np.uint8))

    def mapped(self) -> mmap.mmap:
        """Returns the mapped file. Raises (kind `closed`) after `close`."""
        if self.map is None:
            raise TieredKVError(Kind.CLOSED, "the node's files are closed")
        return self.map

    def close(self) -> None:
        """Unmap. If tensors still share the memory, it is unmapped when the last of them is freed."""
        if self.map is not None:
            with suppress(BufferError):
                self.map.close()
            self.map = None


def node_directory(shm_path: str | Path, cluster_id: str, node_id: str) -> Path:
    """Returns the directory of a node's files. Raises (kind `config`) for names that cannot be part of a path."""
    for name in (cluster_id, node_id):
        if not _NAME.fullmatch(name):
            raise TieredKVError(Kind.CONFIG, f"cluster and node names must be 1 to 100 letters, digits, '_', '.' and '-', got {name!r}")
    return Path(shm_path) / f"{_PREFIX}{cluster_id}-{node_id}"


class NodeFiles:
    """The open files of one node: the mappings of `index` and `arena`, and the locks of a process that uses them.

    `arena_fd` is a separate open file description, for locks on ranges of the arena. Errors: `TieredKVError` of kind
    `memory` that names the setting (`host`, `shm_path`) or the file. Descriptors are closed on exec. A forked child opens
    its own description for locks on ranges, separate from its parent's; the child of a writer has no locks at all.
    """

    def __init__(self, directory: Path, directory_fd: int, lock_fd: int, slots: int, arena_bytes: int, *, writer: bool) -> None:
        """Map existing files of known sizes; use `create`, `attach` or `open_or_create` instead."""
        self.directory = directory
        self.slots = slots
        self.arena_bytes = arena_bytes
        self.writer = writer
        self._inodes = [os.fstat(directory_fd).st_ino, *(os.stat(name, dir_fd=directory_fd).st_ino for name in (_INDEX, _ARENA))]
        with ExitStack() as undo:
            self.index = self._mapped(undo, directory_fd, _INDEX, w.index_bytes(slots))
            self.arena = self._mapped(undo, directory_fd, _ARENA, arena_bytes)
            self.arena_fd: int | None = os.open(_ARENA, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory_fd)
            undo.callback(os.close, self.arena_fd)
            self._lock_fd: int | None = os.dup(lock_fd)
            undo.pop_all()
        forking.register(self)

    def after_fork(self) -> None:
        """Separate a forked child from its parent's locks: neither process can then release or prolong the locks of the other."""
        if self.arena_fd is None:
            return
        inherited, self.arena_fd = self.arena_fd, None
        if self.writer:
            if self._lock_fd is not None:
                os.close(self._lock_fd)
            self._lock_fd = None
        else:
            with suppress(OSError):  # out of descriptors: this process cannot store blocks then
                self.arena_fd = os.open(f"/proc/self/fd/{inherited}", os.O_RDWR | os.O_CLOEXEC)
        os.close(inherited)

    @staticmethod
    def _mapped(undo: ExitStack, directory_fd: int, name: str, nbytes: int) -> Mapping:
        fd = os.open(name, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory_fd)
        try:
            mapping = Mapping(fd, nbytes)
        finally:
            os.close(fd)
        undo.callback(mapping.close)
        return mapping

    @property
    def index_path(self) -> Path:
        return self.directory / _INDEX

    @property
    def arena_path(self) -> Path:
        return self.directory / _ARENA

    @property
    def lock_path(self) -> Path:
        return self.directory / _LOCK

    @property
    def sock_path(self) -> Path:
        """Path of the node's socket. The process that listens creates it."""
        return self.directory / _SOCK

    @classmethod
    def create(cls, shm_path: str | Path, cluster_id: str, node_id: str, host_bytes: int, disk_bytes: int = 0) -> Self:
        """Create new files and become their writer. Index and arena together take at most `host_bytes`, all allocated now.

        Raises if the directory exists, or if `shm_path` cannot be written to or is too small; no files are left then. Cost:
        the kernel clears every page, about 0.7 s a GiB; several times that in a virtual machine that has not used this
        memory before.
        """
        directory = node_directory(shm_path, cluster_id, node_id)
        slots, arena_bytes = w.plan(host_bytes, disk_bytes)
        needed_bytes = w.index_bytes(slots) + arena_bytes
        with _naming_shm_path(directory.parent, needed_bytes), ExitStack() as undo:
            os.mkdir(directory, 0o700)
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            require_room(directory.parent, needed_bytes)
            with _directory_fd(directory) as directory_fd:
                os.close(_new_file(directory_fd, _LOCK, 0))
                with _lock_shared(directory, directory_fd) as lock_fd:
                    _take_writer_lock(directory, lock_fd)
                    os.close(_new_file(directory_fd, _INDEX, w.index_bytes(slots)))
                    os.close(_new_file(directory_fd, _ARENA, arena_bytes))
                    files = cls(directory, directory_fd, lock_fd, slots, arena_bytes, writer=True)
            _write_header(files, cluster_id, node_id)
            undo.pop_all()
            return files

    @classmethod
    def attach(cls, directory: str | Path, *, writer: bool = False, cluster_id: str | None = None, node_id: str | None = None) -> Self:
        """Open existing files, as one of many readers or as the one writer.

        Raises if the files do not exist, are unfinished, or belong to another format version, cluster, node or user; for a
        writer also if another writer is alive.
        """
        directory = Path(directory)
        with _naming_directory(directory), _directory_fd(directory) as directory_fd, _lock_shared(directory, directory_fd) as lock_fd:
            if writer:
                _take_writer_lock(directory, lock_fd)
            slots, arena_bytes = _read_header(directory, directory_fd, cluster_id, node_id)
            return cls(directory, directory_fd, lock_fd, slots, arena_bytes, writer=writer)

    @classmethod
    def open_or_create(cls, shm_path: str | Path, cluster_id: str, node_id: str, host_bytes: int, disk_bytes: int = 0) -> tuple[Self, bool]:
        """Open a node's files as their writer, at its first start or a restart. Returns (files, whether they existed).

        Replaces files of other sizes (`host` was changed). Also replaces unfinished files and files of another version,
        unless a process uses them. Raises as `create` and `attach` do.
        """
        directory = node_directory(shm_path, cluster_id, node_id)
        if directory.exists() and not _reclaim_unusable(directory):
            files = cls.attach(directory, writer=True, cluster_id=cluster_id, node_id=node_id)
            if (files.slots, files.arena_bytes) == w.plan(host_bytes, disk_bytes):
                return files, True
            files.remove()
        return cls.create(shm_path, cluster_id, node_id, host_bytes, disk_bytes), False

    def is_in_place(self) -> bool:
        """Whether the directory, index and arena opened here are still those at their paths, where other processes look for them."""
        try:
            return [os.stat(path).st_ino for path in (self.directory, self.index_path, self.arena_path)] == self._inodes
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Unmap the files and release the locks. The files stay. May be called twice."""
        self.index.close()
        self.arena.close()
        for name in ("arena_fd", "_lock_fd"):
            fd = getattr(self, name)
            if fd is not None:
                os.close(fd)
                setattr(self, name, None)

    def remove(self) -> None:
        """Delete the directory and close. Readers keep their mappings and see the state `closed`.

        After `close` it does nothing: the files may belong to another writer by then.
        """
        self.withdraw()
        self.close()

    def withdraw(self) -> None:
        """Delete the directory and show readers the state `closed`. Mappings and locks stay. After `close` it does nothing."""
        mapped = self.index.map
        if mapped is None:
            return
        with suppress(ValueError), memoryview(mapped) as whole, whole.cast("Q") as header:  # another thread may have closed it
            header[w.STATE] = w.CLOSED
        with suppress(FileNotFoundError):
            if os.stat(self.directory).st_ino == self._inodes[0]:
                shutil.rmtree(self.directory, ignore_errors=True)


class VacantFiles:
    """A stand-in for `NodeFiles` while there is no node: private memory that reads like the files of a closed node without blocks."""

    slots = w.SLOTS_MIN
    arena_bytes = w.PAGE_BYTES
    arena_fd = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index, self.arena = Mapping(-1, w.index_bytes(self.slots)), Mapping(-1, self.arena_bytes)
        with memoryview(self.index.mapped()) as whole, whole.cast("Q") as header:
            header[w.SLOTS], header[w.ARENA_BYTES], header[w.STATE] = self.slots, self.arena_bytes, w.CLOSED

    def is_in_place(self) -> bool:
        """Returns False, because no path leads other processes to this private memory."""
        return False

    def close(self) -> None:
        """Release the memory. May be called twice."""
        self.index.close()
        self.arena.close()


class Header(NamedTuple):
    """State of a node, read from its index without mapping it. The fields mean the same as the properties of `NodeView`."""

    identity: int
    is_live: bool
    heartbeat_ns: int

    def age_s(self, now_ns: int) -> float:
        """Returns the seconds since the node's last heartbeat, infinite for a node that has shut down. `now_ns`: monotonic clock."""
        return (now_ns - self.heartbeat_ns) / 1e9 if self.is_live else float("inf")


def peek(directory: str | Path) -> Header | None:
    """Read the header of the index in a directory of this user. About 20 µs.

    Returns None if there is no index that this version can use.
    """
    try:
        with _directory_fd(Path(directory)) as directory_fd:
            header = _header_words(Path(f"/proc/self/fd/{directory_fd}") / _INDEX)
    except (OSError, TieredKVError):
        return None
    if header is None or header[w.MAGIC] != w.MAGIC_WORD or header[w.VERSION] != w.FORMAT_VERSION:
        return None
    return Header(header[w.IDENTITY], header[w.STATE] == w.LIVE, header[w.HEARTBEAT])


def reclaim_stale(shm_path: str | Path, now_ns: int, max_age_s: float = 60.0) -> list[Path]:
    """Delete the directories of dead nodes of this user. Returns the deleted directories. `now_ns`: monotonic clock.

    A node is dead if no process holds the lock and the last heartbeat is more than `max_age_s` away. (A heartbeat in the
    future is from before a reboot.) If no heartbeat can be read, the directory's age in wall-clock time counts.
    """
    removed = []
    for directory in sorted(Path(shm_path).glob(f"{_PREFIX}*")):
        with suppress(OSError), _unused(directory) as unused:
            if unused and _age_s(directory, now_ns) > max_age_s:
                shutil.rmtree(directory, ignore_errors=True)
                if not directory.exists():
                    removed.append(directory)
    return removed


def _age_s(directory: Path, now_ns: int) -> float:
    header = _header_words(directory / _INDEX)
    if header is not None and header[w.MAGIC] == w.MAGIC_WORD and header[w.VERSION] == w.FORMAT_VERSION and header[w.HEARTBEAT]:
        return abs(now_ns - header[w.HEARTBEAT]) / 1e9
    return time.time() - os.stat(directory).st_mtime


def _reclaim_unusable(directory: Path) -> bool:
    """Delete files that no writer can attach to. Returns whether the directory is gone.

    Files of another version, or without a valid header, are deleted if no process uses them. If the index or the arena was removed
    or replaced, they are deleted unless there is a writer, which may be creating them. Readers do not count: they map the old file.
    """
    with suppress(FileNotFoundError), _unused(directory) as unused:
        header = _header_words(directory / _INDEX)
        usable = header is not None and header[w.MAGIC] == w.MAGIC_WORD and header[w.VERSION] == w.FORMAT_VERSION
        whole = (directory / _ARENA).exists() and (header is not None) and _is_its_arena(header, os.stat(directory / _ARENA))
        if (unused and not usable) or not (whole or _has_writer(directory)):
            shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def _has_writer(directory: Path) -> bool:
    fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return not try_exclusive(fd, 0, 1)
    finally:
        os.close(fd)


def _is_its_arena(header: memoryview, facts: os.stat_result) -> bool:
    """Whether a file is the arena created with this index, not a copy. True for older indexes, which do not record the arena."""
    return header[w.ARENA_INODE] in (0, facts.st_ino)


def _header_words(path: Path) -> memoryview | None:
    try:
        with path.open("rb") as file:
            data = file.read(w.HEADER_BYTES)
    except OSError:
        return None
    return memoryview(data).cast("Q") if len(data) == w.HEADER_BYTES else None


LOOKED_AT_S = 0.5
"""How long to wait for a directory's lock: a process that checks whether the directory is in use holds the lock only briefly."""


@contextmanager
def _unused(directory: Path) -> Iterator[bool]:
    """Yields whether no process uses a directory of this user. If so, none can begin to use it during the `with` block."""
    facts = os.lstat(directory)
    if facts.st_uid != os.geteuid():
        yield False
        return
    try:
        fd = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:  # its creator died at the very beginning
        yield True
        return
    try:
        yield _flock(fd, fcntl.LOCK_EX) and os.fstat(fd).st_nlink > 0  # 0: another process has just removed it
    finally:
        os.close(fd)


def _flock(fd: int, operation: int) -> bool:
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _directory_fd(directory: Path) -> Iterator[int]:
    """Open a directory so that names are looked up in it even if another directory takes its place. Yields its descriptor."""
    fd = os.open(directory, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if (facts := os.fstat(fd)).st_uid != os.geteuid() or facts.st_mode & 0o022:
            message = f"shm_path: {directory} must be owned by this user, and no other user may have write permission to it"
            raise TieredKVError(Kind.MEMORY, message, setting="shm_path")
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _lock_shared(directory: Path, directory_fd: int) -> Iterator[int]:
    fd = os.open(_LOCK, os.O_RDWR | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        deadline_s = time.monotonic() + LOOKED_AT_S
        while not (locked := _flock(fd, fcntl.LOCK_SH)) and time.monotonic() < deadline_s:
            time.sleep(LOOKED_AT_S / 100)  # another process may only be looking whether anybody uses the directory
        if not locked or os.fstat(fd).st_nlink == 0:
            raise TieredKVError(Kind.MEMORY, f"{directory} is being removed: its node died; start the node again", path=str(directory))
        yield fd
    finally:
        os.close(fd)


def _take_writer_lock(directory: Path, lock_fd: int) -> None:
    if not try_exclusive(lock_fd, 0, 1):
        raise TieredKVError(Kind.MEMORY, f"another process is the writer of {directory}: this node runs already", path=str(directory))


def _new_file(directory_fd: int, name: str, nbytes: int) -> int:
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory_fd)
    try:
        os.ftruncate(fd, nbytes)
        if nbytes:
            os.posix_fallocate(fd, 0, nbytes)
    except OSError:
        os.close(fd)
        raise
    return fd


def _write_header(files: NodeFiles, cluster_id: str, node_id: str) -> None:
    with memoryview(files.index.mapped()) as whole, whole.cast("Q") as header:
        header[w.VERSION] = w.FORMAT_VERSION
        header[w.CLUSTER] = w.name_hash(cluster_id)
        header[w.NODE] = w.name_hash(node_id)
        header[w.SLOTS] = files.slots
        header[w.ARENA_BYTES] = files.arena_bytes
        header[w.IDENTITY] = w.new_identity()
        assert files.arena_fd is not None, "the files are open: they were created just now"
        header[w.ARENA_INODE] = os.fstat(files.arena_fd).st_ino
        w.fence()
        header[w.MAGIC] = w.MAGIC_WORD  # last: files without it are unfinished


def _read_header(directory: Path, directory_fd: int, cluster_id: str | None, node_id: str | None) -> tuple[int, int]:
    def refuse(reason: str) -> TieredKVError:
        return TieredKVError(Kind.MEMORY, f"{directory}: {reason}", path=str(directory))

    header = _header_words(Path(f"/proc/self/fd/{directory_fd}") / _INDEX)
    if header is None or header[w.MAGIC] == 0:
        raise refuse("the index is unfinished: the node is starting, or died while starting")
    if header[w.MAGIC] != w.MAGIC_WORD:
        raise refuse("the file is not an index of tiered_kv")
    if header[w.VERSION] != w.FORMAT_VERSION:
        raise refuse(
            f"the index has format version {header[w.VERSION]}, this package reads version {w.FORMAT_VERSION};"
            " run one version of tiered_kv on this machine, or stop its processes and delete the directory"
        )
    for word, name in ((w.CLUSTER, cluster_id), (w.NODE, node_id)):
        if name is not None and header[word] != w.name_hash(name):
            raise refuse(f"the index belongs to another cluster or node than {name!r}")
    slots, arena_bytes = header[w.SLOTS], header[w.ARENA_BYTES]
    facts = [os.stat(name, dir_fd=directory_fd) for name in (_INDEX, _ARENA)]
    sizes = [each.st_size for each in facts]
    if slots < w.SLOTS_MIN or slots & slots - 1 or sizes != [w.index_bytes(slots), arena_bytes]:
        raise refuse(f"index and arena must have the sizes of {slots} slots and {arena_bytes} bytes, got {sizes}")
    if not _is_its_arena(header, facts[1]):
        raise refuse("the arena must be the file that the index was created with, got another file in its place")
    return slots, arena_bytes


@contextmanager
def _naming_shm_path(shm_path: Path, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise TieredKVError(Kind.MEMORY, f"{error.filename} already exists; attach to it instead", path=str(error.filename)) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            raise too_small(shm_path, needed_bytes, available_bytes(shm_path)) from error
        message = f"shm_path: cannot create files below {shm_path}: {error.strerror}"
        raise TieredKVError(Kind.MEMORY, message, setting="shm_path", shm_path=str(shm_path)) from error


@contextmanager
def _naming_directory(directory: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise TieredKVError(Kind.MEMORY, f"no node's files in {directory}; was the node started?", path=str(directory)) from error
    except OSError as error:
        raise TieredKVError(Kind.MEMORY, f"cannot open the files of {directory}: {error}", path=str(directory)) from error
