"""`tiered-kv bench transfer`: fetches blocks from another node, compared with raw TCP, Ray's transfer and memcpy of the same bytes.

The four transports alternate in one run. `ours` is a worker's whole fetch: the look-up in the directory, the stream from the
other node into this node's memory, the checks, and the copy to the worker's tensor. `tcp` receives as many bytes into a buffer,
and does nothing else. `ray` gets objects that were put into the other node's object store before, and copies them into a buffer.
`vs_tcp` is the median time of `tcp` divided by that of the transport. Slow links are simulated by a proxy (`slow_link`). Every
fetched byte is compared with the stored one.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of
from tiered_kv.config import Config, format_size
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.bench.fetch import LAYOUTS, NAMESPACE, Buffers, Case, LogLine, machine, token_ids, two_nodes
from tiered_kv.tools.bench.raw_stream import RawStream, source_process
from tiered_kv.tools.bench.slow_link import SlowLink

TRANSPORTS = ("ours", "ray", "tcp", "memcpy")
RAY_BYTES_MAX = 96 << 20
"""The most bytes that Ray transfers at once. Its object store is small here, and objects that do not fit would be spilled to disk."""
SINGLE_REPETITIONS = 300
WAIT_S = 10.0
HANG_MS = 300.0
HANG_REPETITIONS = 10


class TransferWork(NamedTuple):
    """The amount of work to measure. `links`: for each slow link its name, one-way latency in seconds, and bytes per second."""

    sizes: tuple[int, ...]
    chains: tuple[int, ...]
    repetitions: int
    links: tuple[tuple[str, float, float], ...]


LINKS = (("20 ms, 100 Mbit/s", 0.01, 12.5e6), ("2 ms, 1 Gbit/s", 0.001, 125e6))
FULL = TransferWork(tuple(LAYOUTS), (1, 8, 32), 16, LINKS)
QUICK = TransferWork((64 << 10, 3 << 20), (1, 8), 8, LINKS[1:])


def run_transfer_bench(quick: bool, log: LogLine) -> dict:
    """Measure all transports. Returns the report. Takes about two minutes. Raises `TieredKVError` (kind `corrupt`) for a wrong byte."""
    plan = QUICK if quick else FULL
    buffers = Buffers()
    report: dict[str, Any] = {"machine": machine(), "results": []}
    with two_nodes("1536MiB", log) as (holder, fetching), source_process() as address, closing(RawStream(*address)) as raw:
        ray_source = RaySource(fetching["ray_node_id"])
        for size in plan.sizes:
            for chain in plan.chains:
                case = Case(LAYOUTS[size], chain)
                with client_of(holder, case.layout, NAMESPACE) as owner, client_of(fetching, case.layout, NAMESPACE) as client:
                    bench = CaseBench(case, owner, client, buffers, raw, ray_source)
                    records = bench.run(plan.repetitions)
                    report["results"] += records
                    log(_line(records))
        layout = LAYOUTS[64 << 10]
        with client_of(holder, layout, NAMESPACE) as owner, client_of(fetching, layout, NAMESPACE) as client:
            report["one_block"], report["look_up"] = singles(owner, client, buffers, SINGLE_REPETITIONS // (4 if quick else 1))
            log(f"one block of 64 KiB: {report['one_block']}; look-up of a chain of 32: {report['look_up']}")
    for link in plan.links:
        records = on_a_slow_link(*link, buffers)
        report["results"] += records
        log(_line(records))
    report["hang"] = hanging_peer(buffers)
    log(f"a peer that hangs after half a block: {report['hang']}")
    report["machine"]["load_1min_after"] = machine()["load_1min"]
    return report


class RaySource:
    """An actor on another Ray node. It puts objects into that node's object store."""

    def __init__(self, ray_node_id: str) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        class ObjectSource:
            def put(self, nbytes: int, count: int) -> list:
                return [ray.put(np.full(nbytes, number, np.uint8)) for number in range(count)]

        strategy = NodeAffinitySchedulingStrategy(ray_node_id, soft=False)
        self._ray = ray
        self._actor = ray.remote(ObjectSource).options(num_cpus=0, scheduling_strategy=strategy).remote()

    def seconds(self, nbytes: int, count: int, target: memoryview) -> float:
        """Returns the seconds of transferring `count` objects of `nbytes` each from the other node into `target`."""
        at_once, done, took_s = max(1, RAY_BYTES_MAX // nbytes), 0, 0.0
        while done < count:
            some = min(at_once, count - done)
            references = self._ray.get(self._actor.put.remote(nbytes, some))
            begun_s = time.perf_counter()
            for number, got in enumerate(self._ray.get(references), done):
                target[number * nbytes : (number + 1) * nbytes] = memoryview(got)
            took_s += time.perf_counter() - begun_s
            done += some
            del references, got
        return took_s


class CaseBench:
    """Measures all transports for one chain length of one block size."""

    def __init__(self, case: Case, owner: Client, client: Client, buffers: Buffers, raw: RawStream, ray_source: RaySource) -> None:
        self._case = case
        self._owner = owner
        self._client = client
        self._buffers = buffers
        self._raw = raw
        self._ray = ray_source
        self._seconds: dict[str, list[float]] = {transport: [] for transport in TRANSPORTS}

    def run(self, repetitions: int) -> list[dict]:
        """Run the transports in turn, `repetitions` times. Returns one record for each transport."""
        for number in range(repetitions):
            self._turn(number)
        return records_of(self._case, self._seconds, "loopback")

    def _turn(self, number: int) -> None:
        case, buffers, seconds = self._case, self._buffers, self._seconds
        ids = stored(case, self._owner, self._client, buffers, number)
        seconds["memcpy"].append(buffers.memcpy_s(case, number))
        seconds["tcp"].append(_timed(lambda: self._raw.receive(bytes_of(buffers.target(case)))))
        seconds["ours"].append(fetch_s(case, self._client, buffers, ids, number))
        seconds["ray"].append(self._ray.seconds(case.layout.block_bytes, case.chain, bytes_of(buffers.target(case))))


def stored(case: Case, owner: Client, client: Client, buffers: Buffers, number: int) -> torch.Tensor:
    """Store chain `number` on the owner's node, and wait until the directory lists all its blocks. Returns its token ids."""
    ids = token_ids(case, number)
    owner.store(ids, buffers.source(case, number))
    deadline_s = time.monotonic() + WAIT_S
    while client.match(ids).tokens < case.tokens:
        if time.monotonic() > deadline_s:
            raise TieredKVError(Kind.TRANSPORT, f"the directory did not list the stored blocks within {WAIT_S:.0f} s")
        time.sleep(0.005)
    return ids


def fetch_s(case: Case, client: Client, buffers: Buffers, ids: torch.Tensor, number: int) -> float:
    """Returns the seconds of a fetch of chain `number` from the other node. Raises (kind `corrupt`) unless all bytes are right."""
    target = buffers.target(case)
    begun_s = time.perf_counter()
    fetched = client.fetch(ids, target, deadline_ms=60_000)
    took_s = time.perf_counter() - begun_s
    right = fetched.tokens == fetched.tokens_by_tier.get("peer") == case.tokens
    if not right or not torch.equal(target.view(torch.int16), buffers.source(case, number).view(torch.int16)):
        raise TieredKVError(
            Kind.CORRUPT, f"a chain of {case.chain} blocks differs from the stored one, or is incomplete: {fetched.tokens_by_tier}"
        )
    return took_s


def singles(owner: Client, client: Client, buffers: Buffers, repetitions: int) -> tuple[dict, dict]:
    """Returns two results of `spread`: fetches of one block of 64 KiB from the other node, and look-ups alone of a chain of 32 blocks."""
    one, long = Case(LAYOUTS[64 << 10], 1), Case(LAYOUTS[64 << 10], 32)
    fetches, look_ups = [], []
    for number in range(repetitions):
        ids = stored(one, owner, client, buffers, 10_000 + number)
        fetches.append(fetch_s(one, client, buffers, ids, 10_000 + number))
    for number in range(4):
        ids = stored(long, owner, client, buffers, 20_000 + number)
        look_ups += [_timed(lambda ids=ids: client.match(ids)) for _ in range(repetitions // 4)]
    return spread(fetches), spread(look_ups)


def spread(seconds: Sequence[float]) -> dict:
    """Returns the median, the 90th and the 99th percentile of some times, in microseconds."""
    cuts = quantiles(seconds, n=100)
    return {"us": round(median(seconds) * 1e6, 1), "us_p90": round(cuts[89] * 1e6, 1), "us_p99": round(cuts[98] * 1e6, 1)}


@contextmanager
def slow_cluster(**link: Any) -> Iterator[tuple[InProcessCluster, SlowLink]]:
    """Run two nodes in this process. The other node reaches the first one through a slow link. Yields the cluster and the link."""
    with InProcessCluster(Config.of(host="512MiB"), 2, streams=True) as cluster, SlowLink(cluster.links["n0"].address, **link) as proxy:
        cluster.announce("n0", proxy.address)
        yield cluster, proxy


def on_a_slow_link(name: str, latency_s: float, bytes_per_s: float, buffers: Buffers) -> list[dict]:
    """Measure a chain of 8 blocks of 1 MiB over a slow link, and a raw stream over another link of the same kind. Returns two records."""
    case = Case(LAYOUTS[1 << 20], 8)
    seconds: dict[str, list[float]] = {"ours": [], "tcp": []}
    with (
        slow_cluster(latency_s=latency_s, bytes_per_s=bytes_per_s) as (cluster, _),
        source_process() as (host, port),
        SlowLink(f"{host}:{port}", latency_s, bytes_per_s) as plain,
        closing(RawStream(*plain.address.split(":"))) as raw,  # type: ignore[arg-type]
        closing(cluster.client("n0", case.layout, NAMESPACE)) as owner,
        closing(cluster.client("n1", case.layout, NAMESPACE)) as client,
    ):
        for number in range(5):
            ids = stored(case, owner, client, buffers, number)
            seconds["tcp"].append(_timed(lambda: raw.receive(bytes_of(buffers.target(case)))))
            seconds["ours"].append(fetch_s(case, client, buffers, ids, number))
    return records_of(case, seconds, name)


def hanging_peer(buffers: Buffers) -> dict:
    """Measure fetches whose peer sends nothing more from the middle of a block on.

    Returns the median and the highest number of milliseconds between the deadline and the end of such a fetch."""
    case, late_ms = Case(LAYOUTS[1 << 20], 8), []
    for number in range(HANG_REPETITIONS):
        with (
            slow_cluster(stall_after=case.layout.block_bytes * 5 // 2) as (cluster, _),
            closing(cluster.client("n0", case.layout, NAMESPACE)) as owner,
            closing(cluster.client("n1", case.layout, NAMESPACE)) as client,
        ):
            ids, target = stored(case, owner, client, buffers, number), buffers.target(case)
            took_s = _timed(lambda ids=ids, target=target: client.fetch(ids, target, deadline_ms=HANG_MS))
            late_ms.append(took_s * 1e3 - HANG_MS)
    return {"deadline_ms": HANG_MS, "late_ms": round(median(late_ms), 1), "late_ms_max": round(max(late_ms), 1)}


def records_of(case: Case, seconds: dict[str, list[float]], link: str) -> list[dict]:
    """Returns one record for each transport."""
    tcp_s = median(seconds["tcp"])
    return [
        {
            "transport": transport,
            "link": link,
            "block_bytes": case.layout.block_bytes,
            "chain": case.chain,
            "us_per_block": round(median(each) * 1e6 / case.chain, 1),
            "vs_tcp": round(tcp_s / median(each), 3),
            "us_per_block_min": round(min(each) * 1e6 / case.chain, 1),
            "vs_tcp_by_min": round(min(seconds["tcp"]) / min(each), 3),
            "repetitions": len(each),
        }
        for transport, each in seconds.items()
    ]


def bytes_of(kv: torch.Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor as a view of bytes."""
    return memoryview(kv.view(torch.int16).numpy().reshape(-1)).cast("B")


def _timed(operation: Callable[[], Any]) -> float:
    begun_s = time.perf_counter()
    operation()
    return time.perf_counter() - begun_s


def _line(records: list[dict]) -> str:
    first = records[0]
    parts = [f"{each['transport']} {each['us_per_block']:.0f} µs ({each['vs_tcp']:.2f} of tcp)" for each in records]
    return f"{first['link']}, {first['chain']:2d} x {format_size(first['block_bytes'])}: " + "; ".join(parts)


def show(report: dict, console: Console) -> None:
    """Print the report as a table."""
    table = Table(title="tiered-kv bench transfer: a block from another node")
    for column in ("link", "block", "chain", "transport", "µs a block", "of tcp"):
        table.add_column(column)
    for each in report["results"]:
        row = (each["link"], format_size(each["block_bytes"]), each["chain"], each["transport"], each["us_per_block"], each["vs_tcp"])
        table.add_row(*map(str, row))
    console.print(table)
    for name in ("one_block", "look_up", "hang"):
        console.print(f"{name}: {report[name]}", highlight=False)
