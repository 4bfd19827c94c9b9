"""`tiered-kv bench decide`: the time that requests lose by a wrong choice between loading and computing.

Two nodes in one process are connected through a proxy that adds latency and limits the rate (`slow_link`). Each request asks for a
prefix that only the other node has. The model is simulated: computing takes `PrefillCost` seconds, with a cost that grows with the
position. The time of a request is that of its fetch plus that of computing what the fetch did not bring. `always load` and `always
compute` are the two fixed choices for the same requests. The regret is the time of a request less that of the better fixed choice.
A client of its own serves each combination of link and rate, so the first requests know nothing about the link. On a loaded machine
each wait for another thread takes longer than it would in a quiet one: `handoff_ms_max` is the longest empty one.
"""

import time
from collections.abc import Callable
from contextlib import closing
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from tiered_kv.client.client import Client
from tiered_kv.client.prefill_cost import PREFILLS_MIN, PrefillCost
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.threads import DaemonThreads
from tiered_kv.tools.bench.fetch import LAYOUTS, NAMESPACE, Buffers, Case, LogLine, machine
from tiered_kv.tools.bench.transfer import slow_cluster, stored

LAYOUT = LAYOUTS[1 << 20]
GROWTH = 1 / 4096
"""The cost of a token doubles by position 1/GROWTH."""
DEADLINE_MS = 30_000
SETTLE_S_MAX = 5.0


class DecideWork(NamedTuple):
    """The amount of work to measure.

    `links`: for each link its name, the latency that it adds in each direction in seconds, and bytes per second. `rates`: tokens per
    second at position 0. `chains`: numbers of blocks of the requests, which take turns. `rounds`: how often.
    """

    links: tuple[tuple[str, float, float], ...]
    rates: tuple[float, ...]
    chains: tuple[int, ...]
    rounds: int


BAR_LINK = ("20 ms each way, 100 Mbit/s", 0.02, 12.5e6)
FULL = DecideWork(
    (
        ("loopback", 0.0, float("inf")),
        ("1 ms each way, 1 Gbit/s", 0.001, 125e6),
        ("10 ms each way, 100 Mbit/s", 0.01, 12.5e6),
        BAR_LINK,
        ("50 ms each way, 1 Gbit/s", 0.05, 125e6),
    ),
    (300.0, 800.0, 2000.0, 8000.0),
    (1, 4, 16),
    5,
)
QUICK = DecideWork((FULL.links[1], BAR_LINK), (800.0, 8000.0), (1, 4), 2)


def run_decide_bench(quick: bool, log: LogLine) -> dict:
    """Measure all links and rates. Returns the report. Takes about eight minutes. Raises (kind `corrupt`) for a wrong byte."""
    work = QUICK if quick else FULL
    buffers = Buffers()
    report: dict[str, Any] = {"machine": machine(), "block_bytes": LAYOUT.block_bytes, "block_tokens": LAYOUT.block_tokens, "results": []}
    for name, latency_s, bytes_per_s in work.links:
        for record in LinkBench(name, latency_s, bytes_per_s, work, buffers).run():
            report["results"].append(record)
            log(line_of(record))
    report["slowest_vs_compute"] = max(record["slowest_vs_compute"] for record in report["results"])
    report["machine"]["load_1min_after"] = machine()["load_1min"]
    return report


class LinkBench:
    """The requests over one link."""

    def __init__(self, name: str, latency_s: float, bytes_per_s: float, work: DecideWork, buffers: Buffers) -> None:
        self._name = name
        self._link = {"latency_s": latency_s, "bytes_per_s": bytes_per_s}
        self._work = work
        self._buffers = buffers
        self._number = 0
        self._thread = DaemonThreads(1, "tkv-handoff")

    def run(self) -> list[dict]:
        """Measure all rates. Returns one record for each."""
        with slow_cluster(**self._link) as (cluster, _), closing(cluster.client("n0", LAYOUT, NAMESPACE)) as owner:

            def client() -> Client:
                return cluster.client("n1", LAYOUT, NAMESPACE)

            loads_s = {}
            for chain in self._work.chains:
                with closing(client()) as other:
                    loads_s[chain] = median(self._request(owner, other, chain, None)[0] for _ in range(3))
            return [self._at_rate(rate, owner, client, loads_s) for rate in self._work.rates]

    def _at_rate(self, rate: float, owner: Client, client: Callable[[], Client], loads_s: dict[int, float]) -> dict:
        cost = PrefillCost(1 / rate, GROWTH / rate)
        rows, handoffs_s = [], []
        with closing(client()) as other:
            for tokens in (512, 1024, 2048)[:PREFILLS_MIN]:
                other.note_prefill(tokens, cost.seconds(0, tokens))
            for _ in range(self._work.rounds):
                for chain in self._work.chains:
                    took_s, declined = self._request(owner, other, chain, cost)
                    rows.append((chain, took_s, declined))
                    handoffs_s.append(self._handoff_s())
            self._settle(other)
        return record_of(self._name, rate, cost, rows, loads_s) | {"handoff_ms_max": round(max(handoffs_s) * 1e3, 2)}

    def _handoff_s(self) -> float:
        """Returns the seconds until a waiting thread has run an empty call: how much the load of the machine adds to each wait."""
        begun_s = time.perf_counter()
        self._thread.submit(int).result()
        return time.perf_counter() - begun_s

    def _request(self, owner: Client, client: Client, chain: int, cost: PrefillCost | None) -> tuple[float, int]:
        """Returns the seconds of a request for a new prefix, and its declined tokens. Without a cost, everything is loaded."""
        case, number = Case(LAYOUT, chain), self._number
        self._number += 1
        ids, target = stored(case, owner, client, self._buffers, number), self._buffers.target(case)
        begun_s = time.perf_counter()
        if cost is None:
            fetched = client.fetch(ids, target, deadline_ms=DEADLINE_MS, recompute_tokens_per_s=0)
        else:
            fetched = client.fetch(ids, target, deadline_ms=DEADLINE_MS)
        fetch_s = time.perf_counter() - begun_s
        good = target[..., : fetched.tokens, :].view(torch.int16)
        if not torch.equal(good, self._buffers.source(case, number)[..., : fetched.tokens, :].view(torch.int16)):
            raise TieredKVError(Kind.CORRUPT, f"a chain of {chain} blocks differs from the stored one")
        if cost is None:
            if fetched.tokens < case.tokens:
                raise TieredKVError(Kind.CORRUPT, f"a chain of {chain} blocks is incomplete: {fetched.tokens_by_tier}")
            return fetch_s, 0
        compute_s = cost.seconds(fetched.tokens, case.tokens)
        time.sleep(compute_s)  # loads that the fetch left go on meanwhile
        return fetch_s + compute_s, fetched.declined

    @staticmethod
    def _settle(client: Client) -> None:
        """Wait until loads that fetches left have ended, so that they do not slow the next client down."""
        until_s = time.monotonic() + SETTLE_S_MAX
        while client.is_measuring and time.monotonic() < until_s:
            time.sleep(0.02)


def record_of(link: str, rate: float, cost: PrefillCost, rows: list[tuple[int, float, int]], loads_s: dict[int, float]) -> dict:
    """Returns the report's record for one link and one prefill rate, in tokens a second.

    `rows`: the blocks, seconds and declined tokens of each request. `loads_s`: the seconds that a load takes, by its number of blocks.
    """
    computes = [cost.seconds(0, chain * LAYOUT.block_tokens) for chain, _, _ in rows]
    loads = [loads_s[chain] for chain, _, _ in rows]
    best = [min(pair) for pair in zip(computes, loads, strict=True)]
    pairs = [(took_s, compute_s) for (_, took_s, _), compute_s in zip(rows, computes, strict=True)]
    regrets = [took_s - best_s for (_, took_s, _), best_s in zip(rows, best, strict=True)]
    return {
        "link": link,
        "tokens_per_s": rate,
        "requests": len(rows),
        "seconds": round(sum(took_s for _, took_s, _ in rows), 4),
        "always_load_s": round(sum(loads), 4),
        "always_compute_s": round(sum(computes), 4),
        "best_s": round(sum(best), 4),
        "regret_ms_mean": round(mean(regrets) * 1e3, 2),
        "regret_ms_max": round(max(regrets) * 1e3, 2),
        "slowest_vs_compute": round(max(took_s / compute_s for took_s, compute_s in pairs), 3),
        "first_vs_compute": round(rows[0][1] / computes[0], 3),
        "slowest_beyond_compute_ms": round(
            max(took_s - compute_s for (_, took_s, _), compute_s in zip(rows, computes, strict=True)) * 1e3, 2
        ),
        "declined_tokens": sum(declined for _, _, declined in rows),
        "tokens": sum(chain for chain, _, _ in rows) * LAYOUT.block_tokens,
    }


def line_of(record: dict) -> str:
    """Returns a record as one line of text."""
    return (
        f"{record['link']}, {record['tokens_per_s']:.0f} tokens/s: {record['seconds']:.2f} s"
        f" (always load {record['always_load_s']:.2f}, always compute {record['always_compute_s']:.2f}, best {record['best_s']:.2f});"
        f" slowest {record['slowest_vs_compute']:.2f} x computing; {record['declined_tokens']} of {record['tokens']} tokens declined"
    )


def show(report: dict, console: Console) -> None:
    """Print the report as a table."""
    table = Table(title="tiered-kv bench decide: load or compute, sums over all requests")
    columns = {
        "link": "link",
        "tokens/s": "tokens_per_s",
        "chosen s": "seconds",
        "always load": "always_load_s",
        "always compute": "always_compute_s",
        "best": "best_s",
        "regret ms": "regret_ms_mean",
        "max": "regret_ms_max",
        "slowest / compute": "slowest_vs_compute",
        "beyond, ms": "slowest_beyond_compute_ms",
        "handoff, ms": "handoff_ms_max",
        "declined": "declined_tokens",
    }
    for column in columns:
        table.add_column(column)
    for record in report["results"]:
        table.add_row(*(f"{record[name]}" for name in columns.values()))
    console.print(table)
    console.print(f"slowest request: {report['slowest_vs_compute']:.3f} x computing alone", highlight=False)
