"""Computes checksums ("sums") of files' content (xxh3-128) in parallel, and remembers them in the user's cache folder.

A sum is remembered under the file's real path, size, times, inode and device. The times include the change time (ctime): copying tools
can restore the modification time, but not the change time. If a file changed less than `SETTLED_S` before it was read, its sum is not
remembered, because the file may change again while its times stay the same. Processes that need the same sums at once take turns, so
that each file is read once. Without a usable cache folder, files are read each time.
"""

import fcntl
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import xxhash

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.threads import DaemonThreads

log = logging.getLogger(__name__)

FORMAT = 1
SETTLED_S = 2.0
"""The coarsest resolution of file times: that of FAT file systems."""
SUMS_MAX = 4096
SUMS_BYTES_MAX = 4 << 20
PIECE_BYTES = 64 << 20
READ_BYTES = 4 << 20
SAMPLES, SAMPLE_BYTES = 64, 64 << 10
THREADS_MAX = 8
ATTEMPTS = 3
LOCKS = 64
READ_WAIT_S = 1800.0
"""The longest wait for another process that reads the same files. If that process dies, its lock is released at once."""
WRITE_WAIT_S = 5.0
REPORT_S = 10.0
SAVE_S = 5.0
"""The seconds between two saves of new sums. A killed process loses only the sums since its last save."""
GB = 10**9
OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""The flags for opening a file. Files are opened even for their times: a network file system may answer `stat` with old values.

O_NONBLOCK: opening a FIFO must not wait.
"""

Progress = Callable[[str], None]


def user_cache() -> Path:
    """Returns this user's cache folder: `$TIERED_KV_CACHE`, else `$XDG_CACHE_HOME/tiered_kv`, else `~/.cache/tiered_kv`."""
    own = os.environ.get("TIERED_KV_CACHE")
    return Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiered_kv"


class FileState(NamedTuple):
    """The path, size, times and identity of a file at one moment. If a state is settled (`is_settled`), equal states mean equal content.

    `sampled`: whether the file's sum covers only samples of the content.
    """

    path: str
    sampled: bool
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    def is_settled(self, now_ns: int) -> bool:
        """Returns whether any later change of the content will change the times. A modification time in the future is ignored."""
        latest = max(self.ctime_ns, self.mtime_ns if self.mtime_ns <= now_ns else 0)
        return now_ns - latest >= SETTLED_S * 1e9


class _ChangedError(Exception):
    """The file changed while it was read."""


def state_of(path: str, sampled: bool) -> FileState:
    """Returns the state of a file. Raises (kind `model`) if it cannot be read or is not a regular file. Costs about 5 µs."""
    try:
        fd = os.open(path, OPEN)
        try:
            return _state(fd, path, sampled)
        finally:
            os.close(fd)
    except OSError as error:
        raise unreadable(path, error) from error


def _state(fd: int, path: str, sampled: bool) -> FileState:
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise TieredKVError(Kind.MODEL, f"{path}: must be a regular file", path=path)
    return FileState(_real_path(fd, path), sampled, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev)


def _real_path(fd: int, path: str) -> str:
    """Returns the path of an open file, with links resolved. Asks the kernel, which costs a tenth of `os.path.realpath`."""
    try:
        found = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        found = ""
    return found if found.startswith("/") and not found.endswith(" (deleted)") else os.path.realpath(path)


def unreadable(path: str | Path, error: OSError) -> TieredKVError:
    """Returns the error (kind `model`) for a file or folder of a model that cannot be read."""
    return TieredKVError(Kind.MODEL, f"{path}: cannot be read ({error.strerror or error})", path=str(path))


_known: dict[FileState, str] = {}
"""The sums that this process has read or looked up, oldest first. Each operation on it is atomic, so it needs no lock."""


def _keep(sums: Mapping[FileState, str]) -> None:
    if len(_known) + len(sums) > SUMS_MAX:
        _known.clear()
    _known.update(sums)


def sums_of(files: Mapping[str, bool], cache: Path | None = None, progress: Progress | None = None) -> dict[str, str]:
    """Returns the sum of each file's content as text, by path. `files`: for each path, whether a sum of samples is enough.

    `cache`: the folder where sums are remembered; None for `file_sums` in the user's cache folder. `progress` is called with a line
    about every 10 s of reading or waiting; None writes the lines to the log. Costs about 20 µs per file if this process knows all sums.
    Raises (kind `model`) if a file cannot be read, or changes again and again while it is read.
    """
    states = {path: state_of(path, sampled) for path, sampled in files.items()}
    found = {state: _known[state] for state in states.values() if state in _known}
    if not all(state in found for state in states.values()):
        found |= _sums_not_known(set(states.values()), SumStore(cache or user_cache() / "file_sums"), progress or log.info)
    return {path: found[state] for path, state in states.items()}


def _sums_not_known(states: set[FileState], store: "SumStore", progress: Progress) -> dict[FileState, str]:
    """Returns the sums of files, from `store` if it has them. Reads the other files, after waiting until no other process reads them."""
    found = store.sums(states)
    if len(found) < len(states):
        with store.turn(min(states), progress):
            found = store.sums(states)
            missing = sorted(states - set(found))
            reading = _Reading(store, sum(_read_bytes(state) for state in missing), progress)
            try:
                for state in missing:
                    found[state] = reading.sum_of(state)
            finally:
                reading.stop()
    return found


class _Reading:
    """Reads files piece by piece on several threads. Every few seconds, reports its progress and saves the sums in `store`."""

    def __init__(self, store: "SumStore", total_bytes: int, progress: Progress) -> None:
        self._store = store
        self._unsaved: dict[FileState, str] = {}
        self._save_s = time.monotonic() + SAVE_S
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress
        self._threads = DaemonThreads(min(THREADS_MAX, 2 * (os.cpu_count() or 1)), "tkv-sums")
        self._next_s = time.monotonic() + REPORT_S

    def stop(self) -> None:
        """Save the sums, and end the threads. Waits at most a second for threads that hang."""
        if self._unsaved:
            self._store.add(self._unsaved)
        self._threads.stop(1.0)

    def sum_of(self, asked: FileState) -> str:
        """Returns the sum of a file, and remembers it if the file has not changed recently.

        Raises (kind `model`) if the file changes during each of `ATTEMPTS` reads.
        """
        for _ in range(ATTEMPTS):
            state = state_of(asked.path, asked.sampled)
            began_ns = time.time_ns()
            try:
                found = self._read(state)
            except _ChangedError:
                continue
            self._done_bytes += _read_bytes(state)
            if state.is_settled(began_ns):
                self._remember(state, found)
            return found
        raise TieredKVError(Kind.MODEL, f"{asked.path}: changed while it was read, {ATTEMPTS} times", path=asked.path)

    def _remember(self, state: FileState, found: str) -> None:
        _keep({state: found})
        self._unsaved[state] = found
        if time.monotonic() >= self._save_s:
            self._store.add(self._unsaved)
            self._unsaved = {}
            self._save_s = time.monotonic() + SAVE_S

    def _read(self, state: FileState) -> str:
        pieces = [self._threads.submit(_piece_sum, state, start, nbytes) for start, nbytes in _pieces(state)]
        is_reading = True
        while is_reading:
            is_reading = bool(wait(pieces, timeout=max(self._next_s - time.monotonic(), 0)).not_done)
            if time.monotonic() >= self._next_s:
                done_bytes = self._done_bytes + sum(piece.done() for piece in pieces) * _read_bytes(state) // max(len(pieces), 1)
                self._progress(f"reading the model's files: {done_bytes / GB:.1f} of {self._total_bytes / GB:.1f} GB")
                self._next_s = time.monotonic() + REPORT_S
        whole = xxhash.xxh3_128(f"{state.size}\n".encode())
        try:
            for piece in pieces:
                whole.update(piece.result())
        except OSError as error:
            raise unreadable(state.path, error) from error
        if state_of(state.path, state.sampled) != state:
            raise _ChangedError
        return f"xxh3 {whole.hexdigest()}"


def _pieces(state: FileState) -> list[tuple[int, int]]:
    """Returns the parts of a file (offset, bytes) that are read for its sum: all of the file, or the samples."""
    if not state.sampled or state.size <= SAMPLES * SAMPLE_BYTES:
        return [(start, min(PIECE_BYTES, state.size - start)) for start in range(0, state.size, PIECE_BYTES)]
    last = state.size - SAMPLE_BYTES
    return [(last * number // (SAMPLES - 1), SAMPLE_BYTES) for number in range(SAMPLES)]


def _read_bytes(state: FileState) -> int:
    return sum(nbytes for _, nbytes in _pieces(state))


def _piece_sum(state: FileState, start: int, nbytes: int) -> bytes:
    """Returns the sum of a part of a file. Does not map the file: if a mapped file shrinks, reading it kills the process."""
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(READ_BYTES, nbytes)))
    fd = os.open(state.path, OPEN)
    try:
        if _state(fd, state.path, state.sampled) != state:
            raise _ChangedError
        while nbytes:
            count = os.preadv(fd, [buffer[:nbytes]], start)
            if not count:
                raise _ChangedError
            hasher.update(buffer[:count])
            start, nbytes = start + count, nbytes - count
    finally:
        os.close(fd)
    return hasher.digest()


class SumStore:
    """The sums that all processes of a user remember, in one file of a folder. A damaged file is ignored and replaced.

    If the folder cannot be read or written, no error is raised, because the sums can be computed again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "sums.json"

    def sums(self, states: set[FileState]) -> dict[FileState, str]:
        """Returns those sums of these files that this process or the store's file remembers."""
        found = {state: _known[state] for state in states if state in _known}
        if len(found) < len(states):
            remembered = self.load()
            fresh = {state: remembered[state] for state in states if state in remembered}
            _keep(fresh)
            found |= fresh
        return found

    def load(self) -> dict[FileState, str]:
        """Returns all remembered sums, oldest first. Returns {} if the file is missing, damaged, of another format or another user's."""
        try:
            with self._path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_uid != os.geteuid() or facts.st_mode & 0o022 or facts.st_size > SUMS_BYTES_MAX:
                    return {}
                content = json.load(file)
            if content["format"] != FORMAT:
                return {}
            return {FileState(*row[:-1]): row[-1] for row in content["sums"] if _is_row(row)}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return {}

    def add(self, sums: Mapping[FileState, str]) -> None:
        """Add sums to those in the file, which other processes may have added. If there are too many, the oldest are dropped."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self._folder / "sums.lock", WRITE_WAIT_S):
                merged = {state: known for state, known in self.load().items() if state not in sums} | dict(sums)
                self._write(merged)
        except OSError as error:
            log.warning("the sums of the model's files cannot be remembered in %s (%s), so they are read each time", self._folder, error)

    def _write(self, sums: dict[FileState, str]) -> None:
        rows = [[*state, known] for state, known in sums.items()][-SUMS_MAX:]
        while len(data := json.dumps({"format": FORMAT, "sums": rows}).encode()) > SUMS_BYTES_MAX:
            rows = rows[len(rows) // 2 + 1 :]
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".sums-", delete=False) as file:
            try:
                file.write(data)
                file.close()
                os.replace(file.name, self._path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    @contextmanager
    def turn(self, first: FileState, progress: Progress) -> Iterator[None]:
        """Makes other processes that want to read the same model wait during the `with` block.

        `first`: the smallest state among the model's files. Its path chooses the lock.
        """
        number = int.from_bytes(blake2b(os.fsencode(first.path), digest_size=4).digest()) % LOCKS
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            yield
            return
        with _locked(self._folder / f"reading-{number:02}.lock", READ_WAIT_S, progress):
            yield


def _is_row(row: object) -> bool:
    """Returns whether a row of the file is well-formed: path, sampled, five numbers, sum."""
    if not isinstance(row, list) or len(row) != len(FileState._fields) + 1:
        return False
    path, sampled, *numbers, known = row
    return isinstance(path, str) and isinstance(sampled, bool) and all(type(each) is int for each in numbers) and isinstance(known, str)


@contextmanager
def _locked(path: Path, wait_s: float, progress: Progress | None = None) -> Iterator[None]:
    """Holds an exclusive lock on a file during the `with` block. If this process dies, the kernel releases the lock.

    The block runs without the lock if it is not free within `wait_s`, or if the file system has no locks.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        _wait_for_lock(fd, wait_s, progress)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)  # also for copies of the descriptor in forked children
        os.close(fd)


def _wait_for_lock(fd: int, wait_s: float, progress: Progress | None) -> None:
    began_s = time.monotonic()
    next_s, pause_s = began_s, 0.01
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            now_s = time.monotonic()
        except OSError:  # a file system without locks
            return
        else:
            return
        if now_s >= began_s + wait_s:
            return
        if progress and now_s >= next_s:
            progress(f"waiting for another process that reads the model's files, since {now_s - began_s:.0f} s")
            next_s = now_s + REPORT_S
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.5)
