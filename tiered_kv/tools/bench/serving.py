"""Measures the fetch times of a worker while its node writes or restores a checkpoint.

The worker runs in its own process.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import rmtree
from statistics import median
from subprocess import PIPE, Popen
from threading import Event
from typing import NamedTuple

import torch

from tiered_kv.checkpoint.manifest import plain_layout
from tiered_kv.client.connect import client_of
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout
from tiered_kv.tools.bench.filled import BenchChains, BenchNode

WEIGHTS = "tiered-kv bench worker"


class ServingWork(NamedTuple):
    """The amount of work to measure.

    host_bytes: host memory of the node. bytes_each: size of the checkpoint, which is written repeatedly. fetched_bytes: size of
    the worker's chains. turns, turn_s: number of turns, and seconds of each.
    """

    host_bytes: int
    bytes_each: int
    fetched_bytes: int
    turns: int
    turn_s: float


FULL = ServingWork(1 << 30, 448 << 20, 64 << 20, 5, 1.2)
QUICK = ServingWork(512 << 20, 192 << 20, 64 << 20, 3, 0.7)


def measure(place: Path, blocks: BenchChains, plan: ServingWork, log: Callable[[str], None]) -> list[dict]:
    """Measure fetch times while the node is idle and during checkpoints, in alternation.

    The checkpoints are written, or restored, one after the other without a pause. Returns one record for writing and one for
    restoring.
    """
    worker, folder = BenchChains(blocks.layout, WEIGHTS), place / "serving"
    fetched = worker.chains(plan.fetched_bytes)
    root = blocks.namespace.root(blocks.layout)
    with closing(BenchNode(plan.host_bytes)) as node:
        with closing(node.client(worker)) as client:
            worker.store(client, range(fetched))
        with closing(node.client(blocks)) as client:
            blocks.store(client, range(blocks.chains(plan.bytes_each)))
        with _reader(node.node.info(), worker.layout, fetched) as fetches:
            taking = _turns(plan, fetches, lambda stop: _take_again(node, folder, stop))
            _empty(folder)
            node.take(str(folder))
            filling = _turns(plan, fetches, lambda stop: _fill_again(node, folder, root, stop))
        _empty(folder)
    lines = []
    for while_, (alone, meanwhile, rounds) in {"taking": taking, "restoring": filling}.items():
        slower = median(busy / quiet for quiet, busy in zip(alone, meanwhile, strict=True))
        times = {"us": round(median(meanwhile) * 1e6, 1), "alone_us": round(median(alone) * 1e6, 1)}
        lines.append({"while": while_, "block_bytes": blocks.layout.block_bytes, "slower": round(slower, 3), **times, "rounds": rounds})
        log(f"a fetch while {while_} a checkpoint: {slower:.2f} times its time alone, {times['us']:.0f} µs")
    return lines


def _turns(plan: ServingWork, fetches: Callable[[float], float], work: Callable[[Event], int]) -> tuple[list[float], list[float], int]:
    """Returns two lists and a number: each turn's median seconds of a fetch, without `work` and during it, and the rounds of `work`."""
    alone, meanwhile, rounds = [], [], 0
    fetches(plan.turn_s)
    for _ in range(plan.turns):
        alone.append(fetches(plan.turn_s))
        stop = Event()
        with ThreadPoolExecutor(1) as thread:
            working = thread.submit(work, stop)
            try:
                meanwhile.append(fetches(plan.turn_s))
            finally:
                stop.set()
        rounds += working.result()
    return alone, meanwhile, rounds


def _take_again(node: BenchNode, folder: Path, stop: Event) -> int:
    rounds = 0
    while not stop.is_set():
        _empty(folder)
        node.take(str(folder))
        rounds += 1
    return rounds


def _fill_again(node: BenchNode, folder: Path, root: bytes, stop: Event) -> int:
    rounds = 0
    while not stop.is_set():
        node.node.forget(root)
        node.mount(str(folder))
        node.fill()
        rounds += 1
    return rounds


def _empty(folder: Path) -> None:
    rmtree(folder, ignore_errors=True)


@contextmanager
def _reader(info: dict, layout: KVLayout, chains: int) -> Iterator[Callable[[float], float]]:
    """Start a worker process, and stop it at the end.

    Yields a function that lets the worker fetch for the given number of seconds, and returns the median seconds of a fetch.
    """
    command = [sys.executable, "-m", "tiered_kv.tools.bench.serving", json.dumps(info), json.dumps(plain_layout(layout)), str(chains)]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:

        def fetches(seconds: float) -> float:
            process.stdin.write(f"{seconds}\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise TieredKVError(Kind.CLUSTER, f"the worker's process ended with status {process.wait()}")
            return float(line)

        try:
            yield fetches
        finally:
            process.stdin.close()


def main() -> None:
    """Run as `python -m tiered_kv.tools.bench.serving INFO LAYOUT CHAINS`.

    Reads a number of seconds from each line of standard input, fetches for that time, and prints the median seconds of a fetch.
    """
    info, layout, chains = json.loads(sys.argv[1]), KVLayout(*json.loads(sys.argv[2])), int(sys.argv[3])
    torch.set_num_threads(1)  # a second thread would wait for the other core, which the node uses
    blocks = BenchChains(layout, WEIGHTS)
    out = torch.zeros(layout.kv_shape(blocks.tokens), dtype=layout.torch_dtype)
    prompts = [blocks.prompt(number) for number in range(chains)]
    with client_of(info, layout, blocks.namespace) as client:
        for line in sys.stdin:
            times, turn, end_s = [], 0, time.perf_counter() + float(line)
            while time.perf_counter() < end_s:
                start_s = time.perf_counter()
                fetched = client.fetch(prompts[turn % chains], out)
                times.append(time.perf_counter() - start_s)
                turn += 1
                if fetched.tokens != blocks.tokens:
                    raise TieredKVError(Kind.CORRUPT, f"a worker should have fetched {blocks.tokens} tokens, got {fetched.tokens}")
            print(median(times), flush=True)


if __name__ == "__main__":
    main()
