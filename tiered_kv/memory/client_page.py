"""A client's counts in shared memory: a page that one client writes and its node reads, without a call between them.

The node's directory has a folder `clients` with a file of one page for each client and namespace. The client holds a shared flock on its
file as long as it lives. If the flock can be taken exclusively, the client has ended or died, and its counts are final. Its last counts
are in the page even if it was killed.

A page has native u64 words: a header, the counts in the order of COUNTS, and two histograms of durations, each followed by its sum in ns.
A sequence number (odd: being written) lets the node read all counts of one moment.
"""

import fcntl
import mmap
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self

from tiered_kv import forking
from tiered_kv.memory import words as w
from tiered_kv.memory.histogram import BUCKETS, HistogramCounts, bucket_of

FOLDER = "clients"
PAGE_BYTES = 4096
_MAGIC_WORD = int.from_bytes(b"TKVPAGE1", "little")
_MAGIC, _SEQUENCE, _BLOCK_TOKENS, _BLOCK_BYTES = range(4)
_NAMESPACE = slice(64, 128)
_TENANT = slice(128, 320)
"""Bytes of the page with the names, in UTF-8, ended by zero bytes if they are shorter."""
_FIRST_COUNT = 40
TIERS = ("device", "host", "disk", "objects", "checkpoint", "peer")
"""The sources of a hit: the tiers of the client's node, and other nodes."""
COUNTS = (
    *("fetches", "asked_blocks", "missed_blocks", *(f"hit_blocks_{tier}" for tier in TIERS)),
    *("prefill_tokens_saved", "prefill_us_saved", "stores", "new_blocks", "present_blocks", "refused_blocks", "degraded", "retries"),
)
"""The names of the counts. `NodeClient` counts some more, which stay in its process."""
_AT = {name: _FIRST_COUNT + number for number, name in enumerate(COUNTS)}
_FETCH_S = _FIRST_COUNT + len(COUNTS)
_STORE_S = _FETCH_S + BUCKETS + 1
_U64 = (1 << 64) - 1
READ_TRIES = 20
PAGES_MAX = 10_000
"""The most pages that a node reads. Further clients are not counted."""


class ClientFigures(NamedTuple):
    """The content of a page: the names of its namespace and tenant, its block size, its counts by name, and its durations."""

    namespace: str
    tenant: str
    block_tokens: int
    block_bytes: int
    counts: dict[str, int]
    fetch: HistogramCounts
    store: HistogramCounts


class ClientPage:
    """The page of one client for one namespace. Safe to use from several threads. In a forked child, counts are lost."""

    def __init__(self, fd: int | None, memory: mmap.mmap | bytearray) -> None:
        """Use `create` or `nowhere` instead."""
        self._fd = fd
        self._memory = memory
        self._whole = memoryview(memory)
        self._words = self._whole.cast("Q")
        self._lock = threading.Lock()
        forking.register(self)

    @classmethod
    def create(cls, directory: str | Path, namespace: str, tenant: str, block_tokens: int, block_bytes: int) -> Self:
        """Create a page in a node's directory. If that fails, returns a page that no node reads (`nowhere`). About 60 µs."""
        folder = Path(directory) / FOLDER
        name = f"{os.getpid()}-{secrets.randbits(64):016x}"
        hidden = folder / f".{name}"  # the node must not see the page before it is locked
        fd = None
        try:
            fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_SH)
            os.posix_fallocate(fd, 0, PAGE_BYTES)
            page = cls(fd, mmap.mmap(fd, PAGE_BYTES))
            page._write_header(namespace, tenant, block_tokens, block_bytes)
            os.rename(hidden, folder / name)
        except OSError:  # an older node, a node that ends, or no room
            with suppress(OSError):
                os.unlink(hidden)
            if fd is not None:
                os.close(fd)
            return cls.nowhere()
        return page

    @classmethod
    def nowhere(cls) -> Self:
        """Returns a page in private memory, which nobody reads."""
        return cls(None, bytearray(PAGE_BYTES))

    def after_fork(self) -> None:
        """Detach a child process from the page: only the parent may write to it, and only the parent keeps it locked."""
        fd, self._fd = self._fd, None
        self._lock = threading.Lock()
        self._memory = bytearray(PAGE_BYTES)
        self._whole = memoryview(self._memory)
        self._words = self._whole.cast("Q")
        if fd is not None:
            with suppress(OSError):
                os.close(fd)

    def _write_header(self, namespace: str, tenant: str, block_tokens: int, block_bytes: int) -> None:
        for place, text in ((_NAMESPACE, namespace), (_TENANT, tenant)):
            encoded = text.encode(errors="replace")[: place.stop - place.start]
            self._whole[place.start : place.start + len(encoded)] = encoded
        self._words[_BLOCK_TOKENS], self._words[_BLOCK_BYTES] = block_tokens, block_bytes
        self._words[_MAGIC] = _MAGIC_WORD

    def add(self, counts: Mapping[str, int], *, fetch_s: float | None = None, store_s: float | None = None) -> None:
        """Add to counts, and record the duration of a fetch or a store. Names that are not in COUNTS are ignored. About 2 µs."""
        with self._lock:
            try:
                self._add(self._words, counts, fetch_s, store_s)
            except ValueError:  # the page was closed meanwhile
                return

    @staticmethod
    def _add(words: memoryview, counts: Mapping[str, int], fetch_s: float | None, store_s: float | None) -> None:
        words[_SEQUENCE] = words[_SEQUENCE] + 1 & _U64
        if w.WEAKLY_ORDERED:
            w.fence()
        for name, count in counts.items():
            if count and (at := _AT.get(name)) is not None:
                words[at] = words[at] + count & _U64
        for first, seconds in ((_FETCH_S, fetch_s), (_STORE_S, store_s)):
            if seconds is not None:
                bucket, total = first + bucket_of(seconds), first + BUCKETS
                words[bucket] = words[bucket] + 1 & _U64
                words[total] = words[total] + max(int(seconds * 1e9), 0) & _U64
        if w.WEAKLY_ORDERED:
            w.fence()
        words[_SEQUENCE] = words[_SEQUENCE] + 1 & _U64

    def close(self) -> None:
        """Unmap the page and release its lock. The node then adds its counts to those of ended clients. May be called twice."""
        with self._lock:
            self._words.release()
            self._whole.release()
            if isinstance(self._memory, mmap.mmap):
                self._memory.close()
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


def create_folder(directory: Path) -> None:
    """Create the folder for clients' pages in a node's directory, unless it exists."""
    (directory / FOLDER).mkdir(0o700, exist_ok=True)


def pages_in(directory: Path) -> Iterator[Path]:
    """Yields the pages in a node's directory, in the order of their names. Yields nothing if the folder is missing."""
    with suppress(OSError):
        names = sorted(name for name in os.listdir(directory / FOLDER) if not name.startswith("."))
        yield from (directory / FOLDER / name for name in names[:PAGES_MAX])


def read_page(path: Path) -> tuple[ClientFigures, bool] | None:
    """Returns a page's content, and whether its client has ended. Returns None if it is not a page, or cannot be read now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        has_ended = _is_unlocked(fd)
        data = _settled(fd, has_ended)
    except OSError:
        return None
    finally:
        os.close(fd)
    return None if data is None else (_figures_in(data), has_ended)


def _is_unlocked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _settled(fd: int, has_ended: bool) -> bytes | None:
    """Returns the bytes of a page, read while its client wrote no count. If the client died during a write, its last counts are
    incomplete.
    """
    for _ in range(READ_TRIES):
        before = os.pread(fd, 8, 8 * _SEQUENCE)
        data = os.pread(fd, PAGE_BYTES, 0)
        is_settled = before == os.pread(fd, 8, 8 * _SEQUENCE) and not int.from_bytes(before, "little") & 1
        if len(data) != PAGE_BYTES or int.from_bytes(data[:8], "little") != _MAGIC_WORD:
            return None
        if is_settled or has_ended:
            return data
    return None


def _figures_in(data: bytes) -> ClientFigures:
    """Returns the figures in a page.

    After an incomplete write, the number of blocks asked for is corrected to the sum of hits and misses.
    """
    words = memoryview(data).cast("Q")
    namespace, tenant = (data[place].rstrip(b"\0").decode(errors="replace") for place in (_NAMESPACE, _TENANT))
    counts = {name: words[at] for name, at in _AT.items()}
    if words[_SEQUENCE] & 1:
        counts["asked_blocks"] = counts["missed_blocks"] + sum(counts[f"hit_blocks_{tier}"] for tier in TIERS)
    fetch, store = (
        HistogramCounts(words[first : first + BUCKETS].tolist(), words[first + BUCKETS] / 1e9) for first in (_FETCH_S, _STORE_S)
    )
    return ClientFigures(namespace, tenant, words[_BLOCK_TOKENS], words[_BLOCK_BYTES], counts, fetch, store)
