"""The results of the demo: the JSON record and the printed tables."""

import statistics
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tiered_kv.cluster.status import coded_blocks, saved
from tiered_kv.config import Config, format_size

if TYPE_CHECKING:
    from tiered_kv.tools.demo.run import DemoOptions

REFERENCES = {
    "float32": "one plain generate without any cache",
    "bfloat16": "the same model in one process, reusing its own past_key_values of the same prefix",
}


EQUAL_SHARE_NEEDED = {"exact": 1.0, "near_exact": 0.95}
"""The share of outputs that must equal the reference, by quality.

Other qualities allow more error and need no equal output.
"""


def summarize(options: "DemoOptions", about: dict, requests: list[dict], cluster: dict, config: Config) -> dict:
    """Returns all results as one dict for JSON. `requests`: the records of all requests, in the order in which they were sent."""
    warm = [request for request in requests if request["reused_tokens"] * 2 >= request["prompt_tokens"]]
    cold = [request for request in requests if request not in warm]
    prompt_tokens = sum(request["prompt_tokens"] for request in requests)
    reused_tokens = sum(request["reused_tokens"] for request in requests)
    equal = sum(request["equal"] for request in requests)
    is_named = config.codec is not None or config.error_budget is not None
    needed_share = 0.0 if is_named else EQUAL_SHARE_NEEDED.get(config.quality, 0.0)
    return {
        "quality": config.quality,
        "codec": config.codec,
        "error_budget": config.error_budget,
        "dtype": options.dtype,
        "reference": REFERENCES[options.dtype],
        "block_tokens": about["block_tokens"],
        "block_bytes": about["block_bytes"],
        "requests": requests,
        "replicas": [_of_replica(name, requests, about) for name in sorted({request["replica"] for request in requests})],
        "cold_ttft_s": median([request["ttft_s"] for request in cold]),
        "warm_ttft_s": median([request["ttft_s"] for request in warm]),
        "warm_in_process_ttft_s": median([request["in_process_ttft_s"] for request in warm]),
        "warm_vs_in_process": median([request["ttft_s"] / request["in_process_ttft_s"] for request in warm]),
        "warm_vs_in_process_by_tier": _by_tier(warm),
        "prompt_tokens": prompt_tokens,
        "reused_tokens": reused_tokens,
        "token_hit_ratio": reused_tokens / prompt_tokens,
        "equal": equal,
        "all_equal": equal == len(requests),
        "passed": equal >= needed_share * len(requests),
        "cluster": cluster,
    }


def _of_replica(name: str, requests: list[dict], about: dict) -> dict:
    own = [request for request in requests if request["replica"] == name]
    by_tier: Counter[str] = Counter()
    for request in own:
        by_tier.update(request["reused_tokens_by_tier"])
    return {
        "replica": name,
        "requests": len(own),
        "prompt_tokens": sum(request["prompt_tokens"] for request in own),
        "reused_tokens_by_tier": dict(by_tier),
        "fetched_bytes": sum(by_tier.values()) * about["token_bytes"],
        "stored_bytes": sum(request["stored_blocks"]["new"] for request in own) * about["block_bytes"],
    }


def _by_tier(warm: list[dict]) -> dict[str, float]:
    """Returns by tier a median over requests: time to first token, divided by the same with reuse within one process.

    A request counts for the tier from which most of its reused tokens were read.
    """
    ratios: dict[str, list[float]] = {}
    for request in warm:
        tier = max(request["reused_tokens_by_tier"], key=request["reused_tokens_by_tier"].get)
        ratios.setdefault(tier, []).append(request["ttft_s"] / request["in_process_ttft_s"])
    return {tier: statistics.median(values) for tier, values in ratios.items()}


def median(values: list[float]) -> float | None:
    """Returns the median, or None if there are no values."""
    return statistics.median(values) if values else None


def show(result: dict, console: Console) -> None:
    """Print the requests, the replicas, and the verdict."""
    console.print(_requests_table(result))
    console.print(_replicas_table(result))
    if result["cold_ttft_s"] and result["warm_ttft_s"]:
        console.print(
            f"time to first token: {result['cold_ttft_s']:.2f} s cold, {result['warm_ttft_s']:.2f} s warm "
            f"({result['cold_ttft_s'] / result['warm_ttft_s']:.1f} × faster); reusing the same KV within one process takes "
            f"{result['warm_in_process_ttft_s']:.2f} s (with the cache it is {result['warm_vs_in_process']:.2f} × that time"
            + "".join(f"; from {tier} {ratio:.2f} ×" for tier, ratio in result["warm_vs_in_process_by_tier"].items())
            + ")",
            highlight=False,
        )
    console.print(
        f"tokens reused: {result['reused_tokens']} of {result['prompt_tokens']} prompt tokens ({result['token_hit_ratio']:.1%})",
        highlight=False,
    )
    if said := saved(result["cluster"]):
        console.print(said, highlight=False)
    for request in result["requests"]:
        if not request["equal"]:
            console.print(f"{request['document']}: {difference(request)}", highlight=False, markup=False, soft_wrap=True)
    if coded := coded_blocks(result["cluster"]):
        console.print(f"blocks by codec: {coded}", highlight=False, soft_wrap=True)
    color = "green" if result["all_equal"] else "yellow" if result["passed"] else "bold red"
    verdict = f"[{color}]{'equal' if result['all_equal'] else 'equal (differences: see above)'}[/]"
    console.print(
        f"outputs with the cache: {result['equal']} of {len(result['requests'])} are token for token {verdict} to the reference "
        f"({result['dtype']}: {result['reference']})",
        highlight=False,
    )


def difference(request: dict) -> str:
    """Returns a text that says at which token an output differs from the reference, with both outputs."""
    pairs = zip(request["output_ids"], request["reference_ids"], strict=False)
    at = next(
        (at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), min(map(len, (request["output_ids"], request["reference_ids"])))
    )
    return f"differs from new token {at + 1} on: got {request['output_text']!r}, the reference is {request['reference_text']!r}"


def _requests_table(result: dict) -> Table:
    table = Table(title="every request")
    table.add_column("document")
    table.add_column("replica")
    for column in ("prompt", "reused", "from", "first token", "in process", "equal"):
        table.add_column(column, justify="right")
    for request in result["requests"]:
        table.add_row(
            request["document"],
            request["replica"],
            str(request["prompt_tokens"]),
            str(request["reused_tokens"]),
            ", ".join(request["reused_tokens_by_tier"]) or "–",
            f"{request['ttft_s']:.2f} s",
            f"{request['in_process_ttft_s']:.2f} s",
            "yes" if request["equal"] else "NO",
        )
    return table


def _replicas_table(result: dict) -> Table:
    table = Table(title="by replica")
    table.add_column("replica")
    for column in ("requests", "prompt tokens", "reused by tier", "fetched", "stored"):
        table.add_column(column, justify="right")
    for replica in result["replicas"]:
        tiers = ", ".join(f"{tier} {tokens}" for tier, tokens in replica["reused_tokens_by_tier"].items())
        table.add_row(
            replica["replica"],
            str(replica["requests"]),
            str(replica["prompt_tokens"]),
            tiers or "–",
            format_size(replica["fetched_bytes"]),
            format_size(replica["stored_bytes"]),
        )
    return table
