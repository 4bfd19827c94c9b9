"""`tiered-kv bench fetch`: speed of look-up, fetch and store from a second process and from another node, relative to memcpy.

A few torch memcpys of the same bytes and a few operations alternate. Both rotate through a working set of several times the
last-level cache, so neither finds its bytes there. `vs_memcpy` is the median time of memcpy divided by the median time of the
operation. Other load on the machine changes both times, the shorter time relatively more. Every fetched byte is compared with
the stored one.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tiered_kv.blocks import PEER
from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of
from tiered_kv.config import Config, format_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace, as_token_ids
from tiered_kv.layout import KVLayout

LogLine = Callable[[str], None]

# Blocks of 64 tokens, the default of a cluster. 16 MiB is the block size of Qwen2.5-32B; the others are of smaller models.
LAYOUTS = {
    64 << 10: KVLayout(2, 2, 64, "bfloat16", 64),
    1 << 20: KVLayout(16, 2, 128, "bfloat16", 64),
    3 << 20: KVLayout(24, 4, 128, "bfloat16", 64),
    16 << 20: KVLayout(64, 8, 128, "bfloat16", 64),
}
CHAINS = (1, 8, 32)
WORKING_SET_BYTES = 512 << 20
KEPT_BYTES = 600 << 20
REPETITIONS_MIN = 12
TURN = 4
SETTLE_S = 10.0
NAMESPACE = Namespace(weights="tiered-kv bench")


class FetchWork(NamedTuple):
    """The amount of work to measure.

    sizes: the block sizes in bytes. chains: the numbers of blocks in a chain. repetitions_max, bytes_max: limits for each case.
    """

    sizes: tuple[int, ...]
    chains: tuple[int, ...]
    paths: tuple[str, ...]
    repetitions_max: int
    bytes_max: int


FULL = FetchWork(tuple(LAYOUTS), CHAINS, ("same-node", "other-node"), 200, 2 << 30)
QUICK = FetchWork((64 << 10, 1 << 20, 3 << 20), (1, 8), ("same-node",), 40, 512 << 20)


class Case(NamedTuple):
    """One line of the report: chains of `chain` blocks of one layout."""

    layout: KVLayout
    chain: int

    @property
    def nbytes(self) -> int:
        return self.layout.block_bytes * self.chain

    @property
    def tokens(self) -> int:
        return self.layout.block_tokens * self.chain

    def repetitions(self, plan: FetchWork) -> int:
        return max(REPETITIONS_MIN, min(plan.repetitions_max, plan.bytes_max // self.nbytes))


class Buffers:
    """Memory to copy from and to.

    The system has allocated all of it. Its pieces are used in rotation, so that no piece is in the processor's cache.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        words = WORKING_SET_BYTES // 8
        self._source = torch.randint(-(1 << 62), 1 << 62, (words,), dtype=torch.int64, generator=generator)
        self._target = torch.zeros(words, dtype=torch.int64)
        self._turn = 0

    def source(self, case: Case, number: int) -> torch.Tensor:
        """Returns the KV of chain `number`."""
        return self._piece(self._source, case, number)

    def target(self, case: Case) -> torch.Tensor:
        """Returns the next piece of memory to copy to."""
        self._turn += 1
        return self._piece(self._target, case, self._turn)

    @staticmethod
    def _piece(pool: torch.Tensor, case: Case, number: int) -> torch.Tensor:
        items = case.nbytes // 8
        pieces = len(pool) // items
        start = number % pieces * items
        return pool[start : start + items].view(case.layout.torch_dtype).view(case.layout.kv_shape(case.tokens))

    def memcpy_s(self, case: Case, number: int) -> float:
        """Returns the seconds of one memcpy of the case's bytes, between pieces that the next operation does not use."""
        pieces = max(2, WORKING_SET_BYTES // case.nbytes)
        source, target = self.source(case, number + pieces // 2), self.target(case)
        start_s = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start_s


def token_ids(case: Case, number: int) -> torch.Tensor:
    """Returns the token ids of chain `number`, which differ from those of every other chain."""
    return torch.from_numpy(np.random.default_rng([case.layout.block_bytes, case.chain, number]).integers(0, 100_000, case.tokens))


def run_bench(quick: bool, log: LogLine, verify_host: bool = False) -> dict:
    """Measure all cases. `verify_host`: this setting of the node, used only in the cases on the same node.

    Returns the report. Takes 50 s, or 12 s with `quick`. Raises `TieredKVError` (kind `corrupt`) for a wrong byte.
    """
    plan = QUICK if quick else FULL
    buffers = Buffers()
    results: list[dict] = []
    with subprocess_node({"host": "1GiB" if quick else "3GiB", "verify_host": verify_host}) as info:
        for case in _cases(plan):
            with client_of(info, case.layout, NAMESPACE) as client:
                lines = same_node(client, case, plan, buffers)
            results += lines
            log(_line(lines))
    if "other-node" in plan.paths:
        with two_nodes("1536MiB", log) as (holder, fetching):
            for case in _cases(plan):
                with client_of(holder, case.layout, NAMESPACE) as owner, client_of(fetching, case.layout, NAMESPACE) as client:
                    lines = other_node(owner, client, case, buffers)
                results += lines
                log(_line(lines))
    asked = sum(each["node_calls"] for each in results if (each["path"], each["op"]) == ("same-node", "fetch"))
    return {"machine": machine(), "verify_host": verify_host, "results": results, "calls": {"same_node_calls": asked}}


def _cases(plan: FetchWork) -> Iterator[Case]:
    for size in plan.sizes:
        for chain in plan.chains:
            yield Case(LAYOUTS[size], chain)


def same_node(client: Client, case: Case, plan: FetchWork, buffers: Buffers) -> list[dict]:
    """Measure store, look-up and fetch of chains from another process on the node's machine. Returns one record per operation.

    Raises `TieredKVError` (kind `transport`) if look-ups or fetches called the node, which they never should.
    """
    repetitions = case.repetitions(plan)
    kept = min(repetitions, max(1, KEPT_BYTES // case.nbytes))  # this many chains fit in the arena
    stores = Samples(case)
    for numbers in _turns(repetitions):
        prompts = [token_ids(case, number) for number in numbers]
        stores.memcpys += [buffers.memcpy_s(case, number) for number in numbers]
        for number, ids in zip(numbers, prompts, strict=True):
            kv = buffers.source(case, number)
            stored = stores.time(lambda ids=ids, kv=kv: client.store(ids, kv))
            _check(stored.new == case.chain, case)
    fetches = Samples(case)
    calls = client.node_calls
    for numbers in _turns(repetitions):
        chains = [repetitions - kept + number % kept for number in numbers]
        prompts, targets = [token_ids(case, chain) for chain in chains], [buffers.target(case) for _ in numbers]
        fetches.look_up(client, prompts)
        fetches.memcpys += [buffers.memcpy_s(case, number) for number in numbers]
        fetched = [fetches.time(lambda ids=ids, out=out: client.fetch(ids, out)) for ids, out in zip(prompts, targets, strict=True)]
        for chain, target, had in zip(chains, targets, fetched, strict=True):
            _check(had.tokens == case.tokens and _same(target, buffers.source(case, chain)), case)
    asked = client.node_calls - calls
    if asked:
        raise TieredKVError(Kind.TRANSPORT, f"look-ups and fetches on the same node should not call the node, got {asked} calls")
    return [fetches.record("same-node", "fetch") | {"node_calls": asked}, stores.record("same-node", "store")]


def other_node(owner: Client, client: Client, case: Case, buffers: Buffers) -> list[dict]:
    """Measure fetches of chains that only another node has. Returns a list of one record."""
    fetches = Samples(case)
    calls = client.node_calls
    for number in range(REPETITIONS_MIN):
        ids, target = token_ids(case, number), buffers.target(case)
        owner.store(ids, buffers.source(case, number))
        _wait_for(lambda ids=ids: client.match(ids).tokens == case.tokens)
        calls = client.node_calls
        fetches.look_up(client, [ids])
        fetches.memcpys.append(buffers.memcpy_s(case, number))
        fetched = fetches.time(lambda ids=ids, out=target: client.fetch(ids, out, deadline_ms=60_000))
        _check(fetched.tokens == fetched.tokens_by_tier.get(PEER) == case.tokens and _same(target, buffers.source(case, number)), case)
    record = fetches.record("other-node", "fetch")  # look-ups are not reported: this node does not have the blocks
    return [record | {"lookup_us_per_block": None, "node_calls": client.node_calls - calls}]


class Samples:
    """The measured seconds of an operation, of the memcpys that alternate with it, and of the look-ups before it."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self.memcpys: list[float] = []
        self._operations: list[float] = []
        self._lookups: list[float] = []
        self._matches: list[float] = []

    def time(self, operation: Callable[[], Any]) -> Any:
        """Run the operation and record its time. Returns its result."""
        return _timed(operation, self._operations)

    def look_up(self, client: Client, prompts: list[torch.Tensor]) -> None:
        """Time the look-up of chains in the shared index, and `match`, which also computes the keys from the tokens."""
        chain, index = NAMESPACE.chain(self._case.layout), client._source
        for ids in prompts:
            keys = chain.keys(as_token_ids(ids))
            _timed(lambda keys=keys: index.find(keys), self._lookups)
            matched = _timed(lambda ids=ids: client.match(ids), self._matches)
            _check(matched.tokens == self._case.tokens, self._case)

    def record(self, path: str, op: str) -> dict:
        """Returns one entry of the report's results. Times are in microseconds."""
        case, memcpy_s, op_s = self._case, median(self.memcpys), median(self._operations)
        return {
            "path": path,
            "op": op,
            "block_bytes": case.layout.block_bytes,
            "chain": case.chain,
            "layout": case.layout.spec,
            "vs_memcpy": round(memcpy_s / op_s, 3),
            "us_per_block": round(op_s * 1e6 / case.chain, 1),
            "lookup_us_per_block": round(median(self._lookups) * 1e6 / case.chain, 2) if self._lookups else None,
            "match_us_per_block": round(median(self._matches) * 1e6 / case.chain, 2) if self._matches else None,
            "memcpy_us": round(memcpy_s * 1e6, 1),
            "us": round(op_s * 1e6, 1),
            "us_p10": round(sorted(self._operations)[len(self._operations) // 10] * 1e6, 1),
            "memcpy_us_p10": round(sorted(self.memcpys)[len(self.memcpys) // 10] * 1e6, 1),
            "repetitions": len(self._operations),
        }


def _turns(repetitions: int) -> Iterator[range]:
    """Yields the numbers of all repetitions, as ranges of at most `TURN`."""
    for start in range(0, repetitions, TURN):
        yield range(start, min(start + TURN, repetitions))


def _timed(operation: Callable[[], Any], seconds: list[float]) -> Any:
    start_s = time.perf_counter()
    result = operation()
    seconds.append(time.perf_counter() - start_s)
    return result


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int16), right.view(torch.int16))  # compares bits, because NaN is not equal to itself


def _check(right: bool, case: Case) -> None:
    if not right:
        what = f"{case.chain} blocks of {case.layout.block_bytes} bytes"
        raise TieredKVError(Kind.CORRUPT, f"a chain of {what} differs from the stored one, or is incomplete")


def _wait_for(done: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + SETTLE_S
    while not done():
        if time.monotonic() > deadline_s:
            raise TieredKVError(Kind.TRANSPORT, f"the directory did not list the stored blocks within {SETTLE_S:.0f} s")
        time.sleep(0.01)


@contextmanager
def subprocess_node(settings: dict) -> Iterator[dict]:
    """Start a node in another process, and stop it at the end. Yields its info."""
    command = [sys.executable, "-m", "tiered_kv.tools.bench.node", json.dumps(settings), f"bench-{uuid.uuid4().hex[:8]}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        if not line:
            raise TieredKVError(Kind.CLUSTER, f"the node's process ended with status {process.wait()} before it was ready")
        yield json.loads(line)
        process.stdin.close()


@contextmanager
def two_nodes(host: str, log: LogLine) -> Iterator[list[dict]]:
    """Start two nodes on a new Ray cluster, and stop them at the end. Yields their infos."""
    from tiered_kv.cluster import start, stop

    name = f"bench-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="tkv-bench-") as state, _variable("TIERED_KV_STATE", state):
        start.up(Config.of(host=host), name=name, nodes=2, log=log)
        try:
            infos = sorted(start.describe(name)["nodes"], key=lambda node: node["node"])
            yield infos
        finally:
            stop.down(name, log=log)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def machine() -> dict:
    """Returns the facts about the machine that the figures depend on: processor, cores, load, threads, versions."""
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def _line(records: list[dict]) -> str:
    first = records[0]
    parts = [f"{record['op']} {record['vs_memcpy']:.2f} of memcpy, {record['us_per_block']:.0f} µs per block" for record in records]
    return f"{first['path']}, {first['chain']:2d} x {format_size(first['block_bytes'])}: " + "; ".join(parts)


def show(report: dict, console: Console) -> None:
    """Print the report as a table."""
    table = Table(title="tiered-kv bench fetch: speed as a fraction of memcpy of the same bytes")
    for column in ("path", "op", "block", "chain", "of memcpy", "µs per block", "memcpy µs per block", "look-up µs per block"):
        table.add_column(column, justify="left" if column in ("path", "op") else "right")
    for each in report["results"]:
        lookup = each["lookup_us_per_block"]
        numbers = [f"{each['vs_memcpy']:.2f}", f"{each['us_per_block']:.1f}", f"{each['memcpy_us'] / each['chain']:.1f}"]
        row = [each["path"], each["op"], format_size(each["block_bytes"]), str(each["chain"]), *numbers]
        table.add_row(*row, "" if lookup is None else f"{lookup:.2f}")
    console.print(table)
    about = report["machine"]
    cores = f"{about['cpu']}, {about['cores']} cores"
    console.print(f"{cores}, torch {about['torch']} with {about['threads']} threads, load {about['load_1min']}", highlight=False)
    console.print("calls to the node by match and fetch on the same node:", report["calls"]["same_node_calls"], highlight=False)
