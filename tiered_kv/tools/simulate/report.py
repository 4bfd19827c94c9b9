"""Prints results for people: a table for each trace, the mean over traces, and how much memory a policy saves."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from rich.console import Console
from rich.table import Table

from tiered_kv.tools.simulate.replay import Result
from tiered_kv.tools.simulate.tiers import TiersResult

METRICS = {"tokens": "token_hit_ratio", "flops": "flops_saved_ratio"}
TITLES = {"tokens": "prefill tokens that hit, %", "flops": "prefill FLOPs saved (8B Llama), %"}


def show(results: Sequence[Result], metric: str, console: Console) -> None:
    """Print a table for each trace, a table of means if there are several traces, and sentences on memory size (see `sizing`)."""
    traces = list(dict.fromkeys(result.trace for result in results))
    for trace in traces:
        rows = [result for result in results if result.trace == trace]
        blocks = {result.capacity: f"\n{result.capacity_blocks:,} blocks" for result in rows}
        console.print(_table(f"{trace}: {TITLES[metric]}", curves(rows, metric), blocks))
        if sentence := sizing(curves(rows, metric)):
            console.print(sentence, highlight=False, soft_wrap=True)
    if len(traces) > 1:
        console.print(_table(f"mean of {len(traces)} traces: {TITLES[metric]}", curves(results, metric), {}))


def show_tiers(results: Sequence[TiersResult], metric: str, console: Console) -> None:
    """Print a table for each trace: hits in total and by tier, blocks written to each tier, write amplification of lower tiers."""
    for trace in dict.fromkeys(result.trace for result in results):
        rows = [result for result in results if result.trace == trace]
        table = Table("policy", title=f"{trace}: {TITLES[metric]}, in all and by tier; blocks written a request", title_justify="left")
        table.add_column("all, %", justify="right")
        for tier, share in rows[0].tiers.items():
            table.add_column(f"{tier}\n{percent(share)}", justify="right")
        for tier in rows[0].tiers:
            table.add_column(f"to {tier}", justify="right")
        for tier in rows[0].write_amplification:
            table.add_column(f"{tier}:\nwritten ÷ new", justify="right")
        for result in rows:
            hits = [getattr(result, METRICS[metric]), *result.hit_ratio_by_tier.values()]
            cells = [f"{100 * ratio:.1f}" for ratio in hits] + [f"{blocks:.1f}" for blocks in result.writes_per_request.values()]
            table.add_row(result.policy, *cells, *(f"{ratio:.2f}" for ratio in result.write_amplification.values()))
        console.print(table)


def curves(results: Sequence[Result], metric: str) -> dict[str, dict[float, float]]:
    """Returns, for each policy, a dict from capacity to the ratio that `metric` names, averaged over the traces."""
    found: dict[str, dict[float, list[float]]] = {}
    for result in results:
        found.setdefault(result.policy, {}).setdefault(result.capacity, []).append(getattr(result, METRICS[metric]))
    return {policy: {capacity: fmean(ratios) for capacity, ratios in curve.items()} for policy, curve in found.items()}


def _table(title: str, by_policy: dict[str, dict[float, float]], blocks: dict[float, str]) -> Table:
    capacities = list(next(iter(by_policy.values())))
    table = Table("policy", title=title, title_justify="left")
    for capacity in capacities:
        table.add_column(f"{percent(capacity)}{blocks.get(capacity, '')}", justify="right")
    table.add_column("mean", justify="right")
    for policy, curve in by_policy.items():
        if policy == "belady":
            table.add_section()
        table.add_row(policy, *(f"{100 * ratio:.1f}" for ratio in (*curve.values(), fmean(curve.values()))))
    return table


def percent(capacity: float) -> str:
    """Returns a share as text for people: `5 %`."""
    return f"{100 * capacity:g} %"


def sizing(by_policy: dict[str, dict[float, float]]) -> str:
    """Returns a sentence on how many times the memory LRU needs for the same hits as another policy.

    The other policy is `adaptive`, or the best one if `adaptive` was not replayed. Capacities at which it has no more hits than at a
    smaller one are left out: it needs less memory for these hits itself. Returns "" without LRU, without another policy, or if the
    other policy has no hits.
    """
    others = {policy: fmean(curve.values()) for policy, curve in by_policy.items() if policy not in ("lru", "belady")}
    if "lru" not in by_policy or not others:
        return ""
    best = "adaptive" if "adaptive" in others else max(others, key=others.__getitem__)
    hits = _rises(by_policy[best])
    if not hits:
        return ""
    needed = [f"{memory_ratio(by_policy['lru'], capacity, ratio)} at {percent(capacity)}" for capacity, ratio in hits.items()]
    needed[0] = needed[0].replace("×", f"× the memory for the same hits as {best}")
    return f"LRU needs {', '.join(needed)}"


def _rises(curve: dict[float, float]) -> dict[float, float]:
    """Returns the points of a curve at which it is higher than at all smaller capacities, and above 0."""
    found: dict[float, float] = {}
    highest = 0.0
    for capacity, ratio in sorted(curve.items()):
        if ratio > highest:
            found[capacity] = highest = ratio
    return found


def memory_ratio(lru: dict[float, float], capacity: float, ratio: float) -> str:
    """Returns, as text, how many times the memory `capacity` LRU needs to reach the hit ratio `ratio`.

    Interpolates LRU's curve linearly in log capacity.
    """
    points = sorted(lru.items())
    if ratio <= points[0][1]:
        return f"{'≤ ' if ratio < points[0][1] else ''}{_times(points[0][0] / capacity)}"
    for (left, low), (right, high) in pairwise(points):
        if low < ratio <= high:
            share = (ratio - low) / (high - low)
            return _times(math.exp(math.log(left) + share * math.log(right / left)) / capacity)
    return f"> {_times(points[-1][0] / capacity)}"


def _times(factor: float) -> str:
    """Returns a factor as text with one decimal, or with one significant digit if it is small: never `0.0 ×`."""
    return f"{factor:.1f} ×" if factor >= 0.1 else f"{factor:.1g} ×"
