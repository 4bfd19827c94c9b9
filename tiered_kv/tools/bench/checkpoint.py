"""`bench checkpoint`: the speed of checkpoints relative to plain calls on the same bytes, and how much they slow workers down.

`take` times a whole checkpoint: the snapshot, the frames' checksums, packs, manifest and `LATEST`, with every file and the folder
synced. Its baseline writes files of the same sizes and syncs them. `restore` times reading the manifest, and mounting, verifying
and copying every block to the host memory of a new node, as after a restart. Its baseline reads the same files into one buffer.
The files are dropped from the page cache before each restore and before each run of its baseline. With object storage the
baseline is puts and gets by the same client, of objects of the same sizes and with the same concurrency (`bench.remote`).
Measurement and baseline alternate, and the median of their ratios is reported.

Further columns, for information: `touched` restores into host memory that was used before, `warm` has all files in the page
cache, and `plain into new` compares with a baseline that keeps its data in newly allocated memory, as a restore does.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from tiered_kv.blocks import BlockInfo, Tier
from tiered_kv.checkpoint.manifest import Manifest, Model
from tiered_kv.checkpoint.manifest_rows import Row
from tiered_kv.checkpoint.repository import open_repository
from tiered_kv.codecs.frame import encode_frame
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.config import format_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout
from tiered_kv.node.checkpoints.steps import PACK_BYTES
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objects.packs import PackWriter, grown_bytes, record_bytes
from tiered_kv.tiers.objects.store import ObjectStore
from tiered_kv.tools.bench import remote, serving
from tiered_kv.tools.bench.disk import scratch
from tiered_kv.tools.bench.fetch import LAYOUTS as COMMON
from tiered_kv.tools.bench.fetch import machine
from tiered_kv.tools.bench.filled import BenchChains, BenchNode, used_memory

LogLine = Callable[[str], None]

SMOLLM2 = KVLayout(30, 3, 64, "bfloat16", 64)
"""The layout of SmolLM2-135M, with blocks of 1.4 MiB."""
LAYOUTS = {layout.block_bytes: layout for layout in (COMMON[64 << 10], SMOLLM2, COMMON[3 << 20])}
BARS = {"write": 0.7, "read": 0.7, "put": 0.8, "get": 0.8}
"""The lowest accepted speed relative to the baseline: in a folder (write, read) and on object storage (put, get)."""
SECOND_BAR, SLOWER_BAR, FIRST_HIT_BAR_S = 0.08, 1.3, 2.0
"""The highest accepted values.

`SECOND_BAR`: bytes that a second checkpoint adds, relative to the bytes of the first. `SLOWER_BAR`: time of a fetch during a
checkpoint, relative to its time without one. `FIRST_HIT_BAR_S`: seconds from reading the manifest to the first hit.
"""
NEW_SHARE = 0.05
SETTLE_S = 0.2
_RAW = RawCodec()


class CheckpointWork(NamedTuple):
    """The amount of work to measure.

    sizes: the block sizes in bytes. host_bytes: host memory of a node. bytes_each, repetitions: bytes of a checkpoint in a folder,
    and how often it is measured; remote_bytes, remote_repetitions: the same on object storage. serving: see `bench.serving`.
    mounted_bytes: size of the large checkpoint whose first hit is timed.
    """

    sizes: tuple[int, ...]
    host_bytes: int
    bytes_each: int
    repetitions: int
    remote_bytes: int
    remote_repetitions: int
    serving: serving.ServingWork
    mounted_bytes: int

    def smaller(self, block_bytes: int) -> "CheckpointWork":
        """Returns the work for one block size.

        Small blocks take longer per byte, so for blocks below 1 MiB the checkpoints have a quarter of the bytes.
        """
        few = 4 if block_bytes < 1 << 20 else 1
        return self._replace(bytes_each=self.bytes_each // few, remote_bytes=self.remote_bytes // few)


FULL = CheckpointWork(tuple(LAYOUTS), 1 << 30, 512 << 20, 5, 512 << 20, 4, serving.FULL, 4 << 30)
QUICK = CheckpointWork((SMOLLM2.block_bytes,), 512 << 20, 256 << 20, 3, 256 << 20, 2, serving.QUICK, 1 << 30)


def run_checkpoint_bench(
    quick: bool = False, log: LogLine = print, folder: str | os.PathLike | None = None, endpoint: str | None = None
) -> dict[str, Any]:
    """Measure checkpoints in a new folder below `folder` (default: the system's temporary folder). Returns the report.

    Needs 5 GiB of free space, and takes five minutes, or one with `quick`. On a tmpfs the figures say nothing about a disk.
    `endpoint`: URL of an S3 server with a bucket `bench`. None starts a moto server in its own process, if moto is installed.
    Raises `TieredKVError` if a block is not written, or differs after it was read.
    """
    plan = QUICK if quick else FULL
    with scratch(folder) as place:
        results, seconds = [], []
        for size in plan.sizes:
            results += _in_folder(place, BenchChains(LAYOUTS[size]), plan.smaller(size))
            log("; ".join(map(_line, results[-2:])))
            seconds.append(_second(place, BenchChains(LAYOUTS[size]), plan.smaller(size)))
            log(_second_line(seconds[-1]))
        first_hit = _first_hit(place, plan)
        log(f"first hit of {format_size(first_hit['bytes'])} after {first_hit['hit_s']:.2f} s")
        meanwhile = [serving.measure(place, BenchChains(LAYOUTS[size]), plan.serving, log) for size in plan.sizes if size < 2 << 20]
    with remote.bucket(endpoint, log) as url:
        for size in plan.sizes if url else ():
            results += _on_objects(url, BenchChains(LAYOUTS[size]), plan.smaller(size))
            log("; ".join(map(_line, results[-2:])))
    return {
        "machine": machine(),
        "results": results,
        "second": seconds,
        "first_hit": first_hit,
        "serving": [line for lines in meanwhile for line in lines],
        "endpoint": endpoint or "moto",
    }


def _rotated(names: Sequence[str], turn: int) -> list[str]:
    at = turn % len(names)
    return [*names[at:], *names[:at]]


# In a folder


def _in_folder(place: Path, blocks: BenchChains, plan: CheckpointWork) -> list[dict]:
    """Measure `take` and `restore` in a folder, alternating with their baselines. Returns a record for each of the two."""
    times: dict[str, list[float]] = {}
    ours, plain = place / "ours", place / "plain"
    with closing(BenchNode(plan.host_bytes)) as source:
        with closing(source.client(blocks)) as client:
            blocks.store(client, range(blocks.chains(plan.bytes_each)))
        source.take(str(ours))
        sizes = [path.stat().st_size for path in _files(ours)]
        bodies = blocks.bodies(sizes)
        for turn in range(plan.repetitions + 1):
            turned: dict[str, float] = {}
            for name in _rotated(["take", "write"], turn):
                _clear(ours if name == "take" else plain)
                if name == "take":
                    turned[name] = _timed(lambda: source.take(str(ours)))
                else:
                    turned[name] = _timed(lambda: _plain_write(plain, bodies))
            turned |= _reads(ours, blocks, plan, turn)
            for name, taken_s in turned.items() if turn else ():  # the first turn is not counted: its files and memory are cold
                times.setdefault(name, []).append(taken_s)
        _clear(ours), _clear(plain)
    nbytes = sum(sizes)
    more = {
        "touched_vs_plain": round(_ratio(times["read"], times["restore_touched"]), 3),
        "warm_vs_plain": round(_ratio(times["read_warm"], times["restore_warm"]), 3),
        "vs_plain_into_new_memory": round(_ratio(times["read_new"], times["restore"]), 3),
    }
    return [
        _record("take", "write", blocks, nbytes, times),
        _record("restore", "read", blocks, nbytes, times) | more,
    ]


def _reads(folder: Path, blocks: BenchChains, plan: CheckpointWork, turn: int) -> dict[str, float]:
    """Returns the seconds of restoring a checkpoint on a new node, and of reading its files: both cold and from the page cache."""
    times = {}
    for name in _rotated(["restore", "read", "read_new", "restore_touched", "restore_warm", "read_warm"], turn):
        _make_cold(folder)
        if name.endswith("warm"):
            _plain_read(folder)
        if name.startswith("restore"):
            with closing(BenchNode(plan.host_bytes)) as target:
                if name.endswith("touched"):
                    target.touch()
                times[name] = _timed(lambda target=target: _restore(target, str(folder)))
                with closing(target.client(blocks)) as client:
                    blocks.check(client, 0)
        else:
            times[name] = _timed(lambda into_new=name == "read_new": _plain_read(folder, into_new))
    return times


def _restore(target: BenchNode, url: str) -> None:
    mounted, filled = target.mount(url), target.fill()
    if filled.host != mounted or filled.damaged:
        raise TieredKVError(
            Kind.STORAGE, f"all {mounted} blocks should have been restored, got {filled.host}; {filled.damaged} are damaged"
        )


def _plain_write(folder: Path, bodies: Sequence[bytes]) -> None:
    """Write one file per body, one after the other. Each file is synced, and the folder at the end."""
    folder.mkdir()
    for number, body in enumerate(bodies):
        fd = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        view = memoryview(body)
        while len(view):
            view = view[os.write(fd, view) :]
        os.fsync(fd)
        os.close(fd)
    _sync(folder)


def _plain_read(folder: Path, into_new: bool = False) -> None:
    """Read all files, one after the other: into one existing buffer, or with `into_new` each into newly allocated memory."""
    kept = memoryview(np.ones(PACK_BYTES, np.uint8))
    buffers = []
    for path in _files(folder):
        fd = os.open(path, os.O_RDONLY)
        buffer = memoryview(np.empty(path.stat().st_size, np.uint8)) if into_new else kept
        buffers.append(buffer)
        done = 0
        while count := os.preadv(fd, [buffer[done:] if into_new else buffer], done):
            done += count
        os.close(fd)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()
    time.sleep(SETTLE_S)  # a disk is busy for a while after the file system has discarded (TRIM) the freed space


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_DIRECTORY)
    os.fsync(fd)
    os.close(fd)


def _make_cold(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in _files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def _second(place: Path, blocks: BenchChains, plan: CheckpointWork) -> dict:
    """Measure how many bytes a second checkpoint adds, manifest included, if one block in twenty is new."""
    folder, chains = place / "second", blocks.chains(plan.bytes_each)
    new = max(1, round(chains * NEW_SHARE))
    with closing(BenchNode(plan.host_bytes)) as source, closing(source.client(blocks)) as client:
        blocks.store(client, range(chains - new))
        source.take(str(folder))
        before = sum(path.stat().st_size for path in _files(folder))
        blocks.store(client, range(chains - new, chains))
        taken_s = _timed(lambda: source.take(str(folder)))
        added = sum(path.stat().st_size for path in _files(folder)) - before
    _clear(folder)
    share = {"share": round(added / before, 4), "new_share": round(new / (chains - new), 4)}
    return {"block_bytes": blocks.layout.block_bytes, **share, "first_bytes": before, "added_bytes": added, "seconds": round(taken_s, 3)}


# The first hit


def _first_hit(place: Path, plan: CheckpointWork) -> dict:
    """Measure the seconds from reading the manifest of a large checkpoint until its least used chain has been fetched.

    The page cache is cold, and the node copies blocks to host memory meanwhile.
    """
    folder, blocks = place / "large", BenchChains(SMOLLM2)
    count = _write_large(str(folder), blocks, blocks.chains(plan.mounted_bytes))
    nbytes = sum(path.stat().st_size for path in _files(folder))
    with closing(BenchNode(plan.host_bytes)) as target, closing(target.client(blocks)) as client, ThreadPoolExecutor(1) as thread:
        os.sync()
        _make_cold(folder)
        before, chains = used_memory(), count // (blocks.tokens // blocks.layout.block_tokens)
        start_s = time.perf_counter()
        mounted = target.mount(str(folder))
        mounted_s = time.perf_counter() - start_s
        filling = thread.submit(target.fill)
        blocks.check(client, chains - 1)
        hit_s = time.perf_counter() - start_s
        peak = 0
        while not filling.done():
            peak = max(peak, used_memory().own_bytes - before.own_bytes)
            time.sleep(0.02)
        filled, filled_s = filling.result(), time.perf_counter() - start_s
        usage = target.node.stats()["tiers"]
    _clear(folder)
    times = {"mounted_s": round(mounted_s, 3), "hit_s": round(hit_s, 3), "filled_s": round(filled_s, 3)}
    memory = {"own_memory_bytes": peak, "host_used_bytes": usage[Tier.HOST.label]["used_bytes"]}
    return {"bytes": nbytes, "blocks": count, "mounted": mounted, "filled_blocks": filled.host, **times, **memory}


def _write_large(url: str, blocks: BenchChains, chains: int) -> int:
    """Write a checkpoint of `chains` chains directly from frames, without a node. Returns the number of blocks."""
    root = blocks.namespace.root(blocks.layout)
    size = blocks.layout.block_bytes
    with open_repository(url) as repository:
        rows: list[Row] = []
        packs: list[tuple[str, int]] = []
        writer = PackWriter(repository.store)
        for number in range(chains):
            parent = None
            for depth, key in enumerate(blocks.keys(number)):
                frame = encode_frame(key, root, _RAW, blocks.raw(number, depth))
                record = Record(BlockInfo(key, parent, root), frame, _RAW.id, size)
                if len(writer) and writer.nbytes + grown_bytes(record_bytes(record)) > PACK_BYTES:
                    writer = _finished(writer, repository.store, packs)
                entry = writer.add(record)
                place = entry.offset, entry.stored_bytes, size, _RAW.id
                rows.append(Row(key, parent, root, depth, len(packs), *place, Tier.HOST.value, chains - number))
                parent = key
        _finished(writer, repository.store, packs)
        model = Model(root, blocks.layout, "", None)
        repository.publish(Manifest(tuple(packs), (model,), tuple(rows), repository.now_s(), "bench", {}))
    return len(rows)


def _finished(writer: PackWriter, store: ObjectStore, packs: list[tuple[str, int]]) -> PackWriter:
    info = writer.finish()
    packs.append((info.name, info.nbytes))
    return PackWriter(store)


# On object storage


def _on_objects(url: str, blocks: BenchChains, plan: CheckpointWork) -> list[dict]:
    """Measure `take` and `restore` on object storage, alternating with puts and gets of objects of the same sizes.

    Returns a record for `take` and one for `restore`.
    """
    times: dict[str, list[float]] = {}
    with closing(BenchNode(plan.host_bytes)) as source:
        with closing(source.client(blocks)) as client:
            blocks.store(client, range(blocks.chains(plan.remote_bytes)))
        ours, plain = f"{url}/{blocks.layout.block_bytes}-ours", f"{url}/{blocks.layout.block_bytes}-plain"
        source.take(ours)
        sizes = remote.sizes(ours)
        bodies, client = blocks.bodies(sizes), remote.Plain(plain)
        for turn in range(plan.remote_repetitions + 1):
            turned: dict[str, float] = {}
            for name in _rotated(["take", "put"], turn):
                remote.remove(ours if name == "take" else plain)
                turned[name] = _timed((lambda: source.take(ours)) if name == "take" else (lambda: client.put(bodies)))
            for name in _rotated(["restore", "get", "get_kept", "restore_touched"], turn):
                if name.startswith("get"):
                    turned[name] = _timed(lambda name=name: client.get(len(bodies), keep=name == "get_kept"))
                    continue
                with closing(BenchNode(plan.host_bytes)) as target:
                    if name.endswith("touched"):
                        target.touch()
                    turned[name] = _timed(lambda target=target: _restore(target, ours))
            for name, taken_s in turned.items() if turn else ():
                times.setdefault(name, []).append(taken_s)
        remote.remove(ours)
        remote.remove(plain)
    more = {
        "touched_vs_plain": round(_ratio(times["get"], times["restore_touched"]), 3),
        "vs_plain_into_new_memory": round(_ratio(times["get_kept"], times["restore"]), 3),
    }
    return [_record("take", "put", blocks, sum(sizes), times), _record("restore", "get", blocks, sum(sizes), times) | more]


def _timed(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _record(op: str, plain: str, blocks: BenchChains, nbytes: int, times: dict[str, list[float]]) -> dict:
    """Returns one entry of the report's results: the speed relative to the baseline, and both speeds in MB/s."""
    return {
        "op": op,
        "beside": plain,
        "block_bytes": blocks.layout.block_bytes,
        "vs_plain": round(_ratio(times[plain], times[op]), 3),
        "vs_plain_medians": round(median(times[plain]) / median(times[op]), 3),
        "mb_per_s": round(nbytes / median(times[op]) / 1e6),
        "plain_mb_per_s": round(nbytes / median(times[plain]) / 1e6),
        "repetitions": len(times[op]),
    }


def _ratio(plain: Sequence[float], ours: Sequence[float]) -> float:
    return median(one / other for one, other in zip(plain, ours, strict=True))


def _line(record: dict) -> str:
    what = f"{record['op']}, {format_size(record['block_bytes'])}"
    return f"{what}: {record['vs_plain']:.2f} of plain {record['beside']}, {record['mb_per_s']} MB/s"


def _second_line(record: dict) -> str:
    what = f"{format_size(record['block_bytes'])}: a second checkpoint with {record['new_share']:.1%} new blocks"
    return f"{what} adds {record['share']:.1%} of the first's bytes"


def show(report: dict, console: Console) -> None:
    """Print the report as tables."""
    table = Table(title="tiered-kv bench checkpoint: speed as a fraction of plain calls on the same bytes")
    for column in ("op", "baseline", "block", "of plain", "bar", "MB/s", "plain MB/s", "touched", "warm", "plain into new"):
        table.add_column(column, justify="left" if column in ("op", "baseline") else "right")
    for each in report["results"]:
        numbers = [f"{each['vs_plain']:.2f}", f"≥ {BARS[each['beside']]}", str(each["mb_per_s"]), str(each["plain_mb_per_s"])]
        more = [f"{each[name]:.2f}" if name in each else "" for name in ("touched_vs_plain", "warm_vs_plain", "vs_plain_into_new_memory")]
        table.add_row(each["op"], each["beside"], format_size(each["block_bytes"]), *numbers, *more)
    console.print(table)
    for each in report["second"]:
        console.print(f"{_second_line(each)} (bar: {SECOND_BAR:.0%})", highlight=False)
    for each in report["serving"]:
        doing = f"{format_size(each['block_bytes'])}: a fetch while {each['while']} a checkpoint"
        what = f"{doing} takes {each['slower']:.2f} times its time alone"
        console.print(f"{what}, {each['us']:.0f} µs (bar: {SLOWER_BAR})", highlight=False)
    hit = report["first_hit"]
    what = (
        f"{format_size(hit['bytes'])} in {hit['blocks']} blocks: mounted in {hit['mounted_s']:.2f} s, first hit after {hit['hit_s']:.2f} s"
    )
    memory = f"filled after {hit['filled_s']:.1f} s, at most {hit['own_memory_bytes'] >> 20} MiB of memory besides the host tier"
    console.print(f"{what} (bar: {FIRST_HIT_BAR_S:.0f} s), {memory}", highlight=False)
