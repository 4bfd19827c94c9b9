"""The cost of monitoring: fetches of 1 MiB × 8 from another process's node, with clients' counts and a scraper on and off, in turns.

On: the client counts in its page, and a third process scrapes the node's /metrics once in four turns of half a second, which is 7 times as
often as Prometheus does by default. Off: the client counts nowhere, and nobody scrapes. The order of the two in a pair
of turns alternates. `on_vs_off` is the ratio of the medians. Run: `python -m benchmarks.monitoring [--pairs 40] [--json FILE]`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median, quantiles

import torch

from tiered_kv.client.connect import client_of
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout

LAYOUT = KVLayout(16, 2, 128, "bfloat16", 64)
"""Blocks of 1 MiB."""
CHAIN = 8
PROMPTS = 16
TURN_S = 0.5
SCRAPE_EVERY = 4


def serve() -> None:
    """The node's process: prints its info and the address of its metrics, and ends with its input."""
    from tiered_kv.config import Config
    from tiered_kv.metrics.endpoint import MetricsEndpoint
    from tiered_kv.metrics.node_pages import node_pages
    from tiered_kv.node.node import Node
    from tiered_kv.protocol.unix_socket import SessionServer

    node = Node(Config.of(host="512MiB"), f"bench{os.getpid()}", "n0")
    server = SessionServer(f"{node.directory}/sock", node.open_session, node.report_commits)
    endpoint = MetricsEndpoint("21900", "127.0.0.1")
    endpoint.serve(node_pages(node))
    print(json.dumps({"info": node.info(), "metrics": endpoint.address}), flush=True)
    sys.stdin.read()
    endpoint.close()
    server.close()
    node.close()


def scrape(address: str) -> None:
    """The scraper's process: one scrape for each line of its input."""
    for _ in sys.stdin:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            answer.read()


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen]:
    """A process of this module, which ends with its input."""
    command = [sys.executable, "-m", "benchmarks.monitoring", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        yield started
        started.stdin.close()


def turn(client, prompts: list[list[int]], out: torch.Tensor) -> list[float]:
    """Returns the durations of fetches within TURN_S, in seconds."""
    took, end_s = list[float](), time.perf_counter() + TURN_S
    while time.perf_counter() < end_s:
        prompt = prompts[len(took) % len(prompts)]
        begun_s = time.perf_counter()
        fetched = client.fetch(prompt, out)
        took.append(time.perf_counter() - begun_s)
        assert fetched.tokens == len(prompt)
    return took


def measure(pairs: int) -> dict:
    """Returns the figures of so many pairs of turns."""
    torch.set_num_threads(1)
    prompts = [[1000 * number + at for at in range(CHAIN * LAYOUT.block_tokens)] for number in range(PROMPTS)]
    times: dict[bool, list[float]] = {True: [], False: []}
    with process("--node") as node:
        told = json.loads(node.stdout.readline())
        with process("--scrape", told["metrics"]) as scraper, client_of(told["info"], LAYOUT, Namespace("monitoring")) as client:
            kv = torch.rand(LAYOUT.kv_shape(len(prompts[0]))).to(LAYOUT.torch_dtype)
            for prompt in prompts:
                assert client.store(prompt, kv).new == CHAIN
            out = torch.empty_like(kv)
            counts, add = client._source.counts, client._source.counts.add
            turn(client, prompts, out)
            loads = [os.getloadavg()[0]]
            for pair in range(pairs):
                for is_on in (True, False) if pair % 2 else (False, True):
                    counts.add = add if is_on else lambda *_, **__: None
                    if is_on and not pair % SCRAPE_EVERY:
                        scraper.stdin.write("\n")
                        scraper.stdin.flush()
                    times[is_on] += turn(client, prompts, out)
            loads.append(os.getloadavg()[0])
    return {
        "block_bytes": LAYOUT.block_bytes,
        "chain": CHAIN,
        "fetches": {"on": len(times[True]), "off": len(times[False])},
        "median_us": {"on": median(times[True]) * 1e6, "off": median(times[False]) * 1e6},
        "p99_us": {name: quantiles(times[is_on], n=100)[98] * 1e6 for name, is_on in (("on", True), ("off", False))},
        "on_vs_off": median(times[True]) / median(times[False]),
        "on_vs_off_p10": quantiles(times[True], n=10)[0] / quantiles(times[False], n=10)[0],
        "load": [round(load, 2) for load in loads],
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine(), "python": platform.python_version()},
    }


def main() -> None:
    """Run the benchmark, or one of its processes."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pairs", type=int, default=40)
    options.add_argument("--json", metavar="FILE")
    options.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    options.add_argument("--scrape", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.node:
        serve()
    elif given.scrape:
        scrape(given.scrape)
    else:
        found = json.dumps(measure(given.pairs), indent=1)
        print(found)
        if given.json:
            with open(given.json, "w") as file:
                file.write(found + "\n")


if __name__ == "__main__":
    main()
