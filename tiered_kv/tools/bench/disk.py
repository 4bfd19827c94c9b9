"""`bench disk`: the speed of the disk tier relative to plain system calls on the same bytes in the same run.

`write` times everything that storing a block on disk takes: the frame's checksum, the entry, the row of the footer, and one sync
per segment. Its baselines write the same bytes into files of a segment's size, each synced once: through the page cache
(`pwrite`), and with O_DIRECT from aligned memory that is already filled (`direct`). `read` is cold: the files are dropped from
the page cache first. Measurement and baseline alternate in small steps, and the median of their ratios is reported, because the
speed of a shared disk changes all the time.
"""

import fcntl
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tiered_kv.blocks import BlockInfo, Location
from tiered_kv.codecs.frame import encode_frame
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.config import format_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, Entry, pack_row, pack_trailer, store_tag
from tiered_kv.tiers.disk.segments import SegmentReader, segment_path, segments_in
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.log import Record
from tiered_kv.tools.bench.fetch import machine

LogLine = Callable[[str], None]

BLOCK_BYTES = (1 << 20, 3 << 20, 16 << 20)
SEGMENT_BYTES = 64 << 20
BATCH_BYTES = 8 << 20
INDEX_BLOCK_BYTES = 64 << 10
SETTLE_S = 0.2
_RAW = RawCodec()
_ROOT = bytes(KEY_BYTES)


class DiskWork(NamedTuple):
    """The amount of work to measure.

    bytes_each, repetitions: bytes to write and read of each block size, and how often. index_bytes: bytes of segments to open.
    """

    bytes_each: int
    repetitions: int
    index_bytes: int


FULL = DiskWork(128 << 20, 24, 10 << 30)
QUICK = DiskWork(128 << 20, 6, 2 << 30)


def run_disk_bench(quick: bool = False, log: LogLine = print, folder: str | os.PathLike | None = None) -> dict:
    """Measure the disk tier in a new folder below `folder` (default: the system's temporary folder). Returns the report.

    Needs 300 MiB of free space, and takes two minutes, or half a minute with `quick`. On a tmpfs the figures say nothing about
    a disk. Raises `TieredKVError` (kind `storage`) if a block is not written.
    """
    plan = QUICK if quick else FULL
    with scratch(folder) as place:
        results = []
        for block_bytes in BLOCK_BYTES:
            results += _sequential(place, block_bytes, plan)
            log("; ".join(f"{each['op']} of {format_size(block_bytes)}: {each['vs_plain']:.2f} of plain" for each in results[-2:]))
        index = _indexing(place, plan.index_bytes)
        log(_index_line(index))
    return {"machine": machine(), "results": results, "index": index}


@contextmanager
def scratch(folder: str | os.PathLike | None) -> Iterator[Path]:
    """Yields a new folder below `folder` (None: the system's temporary folder). It is removed at the end."""
    path = Path(tempfile.mkdtemp(prefix="tkv-bench-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path)


class _DiskBlocks:
    """The blocks to write: their content, which repeats, and their keys."""

    def __init__(self, block_bytes: int, total_bytes: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.block_bytes = block_bytes
        self.count = total_bytes // block_bytes
        size = max(4 * block_bytes, SEGMENT_BYTES)
        self._pool = torch.randint(-(1 << 62), 1 << 62, (size // 8,), dtype=torch.int64, generator=generator).view(torch.uint8)

    def raw(self, number: int) -> torch.Tensor:
        """Returns the content of a block."""
        start = number % (len(self._pool) // self.block_bytes) * self.block_bytes
        return self._pool[start : start + self.block_bytes]

    def key(self, number: int) -> bytes:
        """Returns the key of a block."""
        return number.to_bytes(KEY_BYTES, "big")

    def batches(self) -> Iterator[range]:
        """Yields the numbers of all blocks, in batches of the size that the engine writes at once."""
        step = max(1, BATCH_BYTES // self.block_bytes)
        for start in range(0, self.count, step):
            yield range(start, min(start + step, self.count))


def _sequential(place: Path, block_bytes: int, plan: DiskWork) -> list[dict]:
    """Measure writes and reads, alternating with plain system calls. The order changes in each repetition."""
    content = _DiskBlocks(block_bytes, plan.bytes_each)
    writers = {"write": _write, "pwrite": _plain_write, "direct": _direct_write}
    times: dict[str, list[float]] = {name: [] for name in (*writers, "read", "pread")}
    for repetition in range(plan.repetitions + 1):
        turn: dict[str, float] = {}
        for name in _rotated(list(writers), repetition):
            turn[name] = writers[name](place / name, content)
            if name == "write":
                turn |= _reads(place / name, content, repetition)
            shutil.rmtree(place / name)
            os.sync()
            time.sleep(SETTLE_S)  # a disk is busy for a while after the file system has discarded (TRIM) the freed space
        for name, taken_s in turn.items() if repetition else ():  # the first turn is not counted: its files and memory are cold
            times[name].append(taken_s)
    nbytes = content.count * block_bytes
    return [
        _record("write", "pwrite", block_bytes, nbytes, times) | _direct(nbytes, times),
        _record("read", "pread", block_bytes, nbytes, times),
    ]


def _rotated(names: list[str], turn: int) -> list[str]:
    return names[turn % len(names) :] + names[: turn % len(names)]


def _write(folder: Path, content: _DiskBlocks) -> float:
    """Write all blocks through the disk tier. Returns the seconds, including the footer and sync of the last segment.

    Raises (kind `storage`) if the tier refuses a block.
    """
    with DiskTier(folder, 16 * SEGMENT_BYTES + 2 * content.count * content.block_bytes, SEGMENT_BYTES, owner="bench") as tier:
        start_s = time.perf_counter()
        for batch in content.batches():
            frames = [(content.key(number), encode_frame(content.key(number), _ROOT, _RAW, content.raw(number))) for number in batch]
            answers = tier.append([Record(BlockInfo(key, None, None), frame, _RAW.id, content.block_bytes) for key, frame in frames])
            if any(each.refused for each in answers):
                raise TieredKVError(Kind.STORAGE, f"a block was not written to {folder}: {answers[-1].refused}")
        tier.close(remove=False)
        return time.perf_counter() - start_s


def _plain_write(folder: Path, content: _DiskBlocks) -> float:
    """Returns the seconds that pwrite takes to write the same bytes to plain files."""
    folder.mkdir()
    per_file = max(1, SEGMENT_BYTES // content.block_bytes)
    start_s = time.perf_counter()
    for first in range(0, content.count, per_file):
        fd = os.open(folder / str(first), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        for number in range(first, min(first + per_file, content.count)):
            _pwrite(fd, memoryview(content.raw(number).numpy()), (number - first) * content.block_bytes)
        os.fdatasync(fd)
        os.close(fd)
    return time.perf_counter() - start_s


def _direct_write(folder: Path, content: _DiskBlocks) -> float:
    """Returns the seconds that pwrite takes to write as many bytes with O_DIRECT, or NaN if the file system does not support it."""
    folder.mkdir()
    buffer = memoryview(mmap.mmap(-1, content.block_bytes))
    buffer[:] = memoryview(content.raw(0).numpy())
    per_file = max(1, SEGMENT_BYTES // content.block_bytes)
    start_s = time.perf_counter()
    for first in range(0, content.count, per_file):
        fd = os.open(folder / str(first), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
            for number in range(first, min(first + per_file, content.count)):
                _pwrite(fd, buffer, (number - first) * content.block_bytes)
            os.fdatasync(fd)
        except OSError:
            return float("nan")
        finally:
            os.close(fd)
    return time.perf_counter() - start_s


def _reads(folder: Path, content: _DiskBlocks, turn: int) -> dict[str, float]:
    """Returns the seconds of reading all blocks of the tier's segments: through the tier, which verifies them, and by preadv alone."""
    with DiskTier(folder, 1 << 40, SEGMENT_BYTES, owner="bench") as tier:
        locations = [block.location for block in tier.recovered()]
        tier.close(remove=False)
    readers = {"read": _read, "pread": _plain_read}
    times = {}
    for name in _rotated(list(readers), turn):
        _make_cold(folder)
        start_s = time.perf_counter()
        readers[name](folder, content, locations)
        times[name] = time.perf_counter() - start_s
    return times


def _read(folder: Path, content: _DiskBlocks, locations: Sequence[Location]) -> None:
    reader = SegmentReader(folder)
    for number, location in enumerate(locations):
        reader.read(location, content.key(number))
    reader.close()


def _plain_read(folder: Path, content: _DiskBlocks, locations: Sequence[Location]) -> None:
    fds = {segment: os.open(segment_path(folder, segment), os.O_RDONLY) for segment in segments_in(folder)}
    buffer = memoryview(np.ones(locations[0].stored_bytes, np.uint8))
    for location in locations:
        done = 0
        while done < location.stored_bytes:
            done += os.preadv(fds[location.segment], [buffer[done:]], location.offset + done)
    for fd in fds.values():
        os.close(fd)


def _pwrite(fd: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwritev(fd, [view], offset)
        view, offset = view[count:], offset + count


def _make_cold(folder: Path) -> None:
    """Drop the segments from the page cache."""
    for segment in segments_in(folder):
        fd = os.open(segment_path(folder, segment), os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _indexing(place: Path, nbytes: int) -> dict:
    """Measure opening a tier: on `nbytes` of segments with footers, and on one segment that has lost its footer.

    The segments with footers are sparse files, because indexing them reads only the footers. No segment is in the page cache.
    """
    folder, count = place / "index", nbytes // SEGMENT_BYTES
    with DiskTier(folder, nbytes + 9 * SEGMENT_BYTES, SEGMENT_BYTES, owner="bench") as tier:
        tier.close(remove=False)
    blocks = sum(_segment_of_holes(folder, segment) for segment in range(1, count + 1))
    found, footers_s = _opened_s(folder, nbytes + 9 * SEGMENT_BYTES)
    if found != blocks:
        raise TieredKVError(Kind.STORAGE, f"opening the tier should have found {blocks} blocks, got {found}")
    content = _DiskBlocks(1 << 20, SEGMENT_BYTES - (2 << 20))
    _write(place / "torn", content)
    os.truncate(segment_path(place / "torn", 1), segments_in(place / "torn")[1] - 1)
    found, scan_s = _opened_s(place / "torn", 16 * SEGMENT_BYTES)
    if found != content.count:
        raise TieredKVError(Kind.STORAGE, f"a scan should have found {content.count} blocks, got {found}")
    return {"bytes": nbytes, "segments": count, "blocks": blocks, "footers_s": round(footers_s, 3), "scan_one_s": round(scan_s, 3)}


def _segment_of_holes(folder: Path, segment: int) -> int:
    """Create a sparse segment file, whose footer lists blocks that have no content. Returns the number of blocks."""
    count = SEGMENT_BYTES // (INDEX_BLOCK_BYTES + 512)
    stored = [INDEX_BLOCK_BYTES + 256] * count
    keys = [(segment * count + number).to_bytes(KEY_BYTES, "big") for number in range(count)]
    offsets = [ENTRY_BYTES + number * (ENTRY_BYTES + stored[0]) for number in range(count)]
    entries = [
        Entry(key, keys[0], keys[0], _RAW.id, offset, stored[0], INDEX_BLOCK_BYTES) for key, offset in zip(keys, offsets, strict=True)
    ]
    rows = b"".join(map(pack_row, entries))
    with segment_path(folder, segment).open("wb") as file:
        file.seek(entries[-1].end)
        file.write(rows + pack_trailer(rows, store_tag(""), segment, entries[-1].end))
    return count


def _opened_s(folder: Path, capacity_bytes: int) -> tuple[int, float]:
    """Open a tier on segments that are not in the page cache. Returns the number of blocks found, and the seconds."""
    _make_cold(folder)
    start_s = time.perf_counter()
    with DiskTier(folder, capacity_bytes, SEGMENT_BYTES, owner="bench") as tier:
        found = len(tier.recovered())
        taken_s = time.perf_counter() - start_s
    return found, taken_s


def _record(op: str, plain: str, block_bytes: int, nbytes: int, times: dict[str, list[float]]) -> dict:
    """Returns one entry of the report's results: the tier's speed relative to the plain call, and both speeds in MB/s."""
    return {
        "op": op,
        "block_bytes": block_bytes,
        "vs_plain": round(_ratio(times[plain], times[op]), 3),
        "mb_per_s": round(nbytes / median(times[op]) / 1e6),
        "plain_mb_per_s": round(nbytes / median(times[plain]) / 1e6),
        "repetitions": len(times[op]),
    }


def _direct(nbytes: int, times: dict[str, list[float]]) -> dict:
    """Returns the tier's write speed relative to O_DIRECT, and the speed of O_DIRECT in MB/s.

    Both values are None if the file system does not support O_DIRECT.
    """
    if times["direct"][0] != times["direct"][0]:
        return {"vs_direct": None, "direct_mb_per_s": None}
    return {
        "vs_direct": round(_ratio(times["direct"], times["write"]), 3),
        "direct_mb_per_s": round(nbytes / median(times["direct"]) / 1e6),
    }


def _ratio(plain: Sequence[float], ours: Sequence[float]) -> float:
    return median(one / other for one, other in zip(plain, ours, strict=True))


def show(report: dict, console: Console) -> None:
    """Print the report as a table."""
    table = Table(title="tiered-kv bench disk: speed as a fraction of plain system calls on the same bytes")
    for column in ("op", "block", "of plain", "MB/s", "plain MB/s", "of O_DIRECT", "O_DIRECT MB/s"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for each in report["results"]:
        row = [each["op"], format_size(each["block_bytes"]), f"{each['vs_plain']:.2f}", str(each["mb_per_s"]), str(each["plain_mb_per_s"])]
        direct = each.get("vs_direct")
        table.add_row(*row, *(["", ""] if direct is None else [f"{direct:.2f}", str(each["direct_mb_per_s"])]))
    console.print(table)
    index = report["index"]
    console.print(f"{_index_line(index)}; one segment without a footer in {index['scan_one_s']:.2f} s", highlight=False)


def _index_line(index: dict) -> str:
    what = f"{format_size(index['bytes'])} in {index['segments']} segments, {index['blocks']} blocks"
    return f"{what}: indexed in {index['footers_s']:.2f} s"
