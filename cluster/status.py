"""Shows a cluster to people: its nodes, and their tiers, bytes, blocks and hits."""

import time
from collections import Counter

from rich.console import Console
from rich.table import Table

from tiered_kv.cluster.commands.progress import age, count
from tiered_kv.config import format_size


def summarize(about: dict) -> dict:
    """Returns the cluster as one JSON-ready record, with sums over its nodes.

    `about` is a result of `start.describe` or `survey.survey`. The field `degraded` has a text for each part that is missing,
    restarting or silent.
    """
    nodes = [_node_record(node) for node in about["nodes"]]
    fleet = about.get("fleet")
    members = fleet["members"] if fleet else []
    asked = sum(node["asked_blocks"] for node in nodes)
    hit = sum(node["hit_blocks"] for node in nodes)
    return {
        "cluster_id": about["cluster_id"],
        "policy": about["config"].policy,
        "quality": about["config"].quality,
        "codec": about["config"].codec,
        "error_budget": about["config"].error_budget,
        "codecs": _plans(nodes),
        "block_tokens": about["config"].block_tokens,
        "nodes": nodes,
        "expected_nodes": about.get("expected_nodes", [node["node"] for node in nodes]),
        "answering_nodes": sum(node["answers"] for node in nodes),
        "lost_nodes": [member["node"] for member in members if member["state"] == "lost"],
        "drained_nodes": about.get("drained", []),
        "members": members,
        "coordinator": {"restarts": fleet["restarts"], "uptime_s": round(fleet["uptime_s"], 3)} if fleet else None,
        "metrics": {"address": about.get("metrics_address"), "problem": about.get("metrics_problem", "")},
        "nodes_with": fleet["selector"] if fleet else None,
        "source": about.get("source", "coordinator"),
        "degraded": about.get("degraded", []),
        "last_checkpoint": max((node["stats"]["saved"] for node in about["nodes"] if node["stats"]["saved"]), key=_at, default=None),
        "asked_blocks": asked,
        "hit_blocks": hit,
        "hit_ratio": _ratio(hit, asked),
        "more_room": _more_room([node["stats"].get("ceiling") for node in about["nodes"]]),
        "prefill_tokens_saved": sum(node["prefill_tokens_saved"] for node in nodes),
        "prefill_seconds_saved": round(sum(node["prefill_seconds_saved"] for node in nodes), 3),
    }


def _node_record(node: dict) -> dict:
    stats = node["stats"]
    return {
        "node": node["node"],
        "address": node.get("address"),
        "directory": node["directory"],
        "silent_s": round(node["silent_s"], 3),
        "metrics_address": node.get("metrics_address"),
        "metrics_problem": node.get("metrics_problem", ""),
        "tiers": stats["tiers"],
        "blocks": stats["blocks"],
        "answers": node.get("answers", True),
        **{name: stats.get(name) for name in ("uptime_s", "restarts", "refused_blocks", "rates")},  # None: an older version
        "sessions": stats["sessions"],
        "reserved_bytes": stats["reserved_bytes"],
        "asked_blocks": stats["asked_blocks"],
        "hit_blocks": stats["hit_blocks"],
        "hit_ratio": _ratio(stats["hit_blocks"], stats["asked_blocks"]),
        "more_room": _more_room([stats.get("ceiling")]),
        "prefill_tokens_saved": stats["prefill_tokens_saved"],
        "prefill_seconds_saved": round(stats["prefill_seconds_saved"], 3),
        "leaving_bytes": stats["leaving_bytes"],
        "counts": {"dropped_under_pressure": 0, "not_admitted": 0} | stats["counts"],
        "codecs": stats["codecs"],
        "policy": stats["policy"],
        "recording": stats["recording"],
        "filling": stats["filling"],
        "namespaces": stats.get("namespaces", []),
        "tenants": stats.get("tenants", {}),
    }


def show(summary: dict, console: Console) -> None:
    """Print the result of `summarize`: a table with a row for each tier of each node, and lines of text."""
    table = Table(title=f"cluster {summary['cluster_id']}: policy {summary['policy']}, blocks of {summary['block_tokens']} tokens")
    for column in ("node", "address", "workers", "tier"):
        table.add_column(column)
    for column in ("used", "of", "blocks", "block hits"):
        table.add_column(column, justify="right")
    for node in summary["nodes"]:
        for number, (tier, figures) in enumerate(node["tiers"].items()):
            first = number == 0
            table.add_row(
                node["node"] if first else "",
                str(node["address"]) if first else "",
                str(node["sessions"]) if first else "",
                tier,
                format_size(figures["used_bytes"]),
                format_size(figures["capacity_bytes"]),
                str(figures["blocks"]),
                _percent(node["hit_ratio"]) if first else "",
            )
    shown = {node["node"] for node in summary["nodes"]}
    for missing in (node for node in summary["expected_nodes"] if node not in shown):
        table.add_row(missing, "", "", "does not answer")
    console.print(table)
    for text in summary["degraded"]:
        console.print(f"degraded: {text}", style="bold red", highlight=False, soft_wrap=True, markup=False)
    for text in fleet_lines(summary):
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    for node in summary["nodes"]:
        if text := "; ".join(
            part for part in (saved(node), _quotas(node), _filling(node), _movement(node), _writes(node), _learned(node)) if part
        ):
            console.print(f"{node['node']}: {text}", highlight=False, soft_wrap=True)
    for model, plan in summary["codecs"].items():
        chosen = ", ".join(f"{tier} {each['codec']} ({each['why']})" for tier, each in plan.items())
        console.print(f"codecs of model {model}: {chosen}", highlight=False, soft_wrap=True)
    if text := coded_blocks(summary):
        console.print(f"compressed: {text}", highlight=False, soft_wrap=True)
    hits = f"{summary['hit_blocks']} of {summary['asked_blocks']} requested blocks"
    console.print(f"block hit ratio of the cluster: {_percent(summary['hit_ratio'])} ({hits})", highlight=False)
    if text := more_room(summary):
        console.print(text, highlight=False, soft_wrap=True)
    if text := saved(summary):
        console.print(text, highlight=False)
    if last := summary["last_checkpoint"]:
        text = f"last checkpoint: {age(time.time() - last['at_s'])} ago, {count(last['blocks'], 'block')}, {last['name']} at {last['url']}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)


def _more_room(figures: list[dict | None]) -> dict:
    """Returns the hit ratios, since the nodes started, of these nodes and of caches with more room. None while nothing was requested.

    `figures`: the entry `ceiling` of each node's figures; None for a node of an older version.
    """
    known = [each for each in figures if each is not None]
    total = Counter[str]()
    for each in known:
        total.update(each)
    asked = total["asked_blocks"]
    return {
        "asked_blocks": asked,
        "hit_ratio": _ratio(total["hit_blocks"], asked),
        "hit_ratio_twice_room": _ratio(total["hit_blocks_twice_room"], asked),
        "hit_ratio_infinite": _ratio(total["hit_blocks_infinite"], asked),
    }


def more_room(record: dict) -> str:
    """Returns a text on the hit ratio that caches with more room would have had. Returns "" while nothing was requested."""
    ratios = record["more_room"]
    if not ratios["asked_blocks"]:
        return ""
    twice, infinite = _percent(ratios["hit_ratio_twice_room"]), _percent(ratios["hit_ratio_infinite"])
    return f"since the nodes started, {_percent(ratios['hit_ratio'])} hit; with twice the room about {twice}, with any room {infinite}"


def fleet_lines(summary: dict) -> list[str]:
    """Returns lines about the fleet: how many nodes answer, which are drained, and uptime and restarts of coordinator and nodes."""
    lines = []
    if summary["source"] == "machine":
        lines.append("shown are only the nodes on this machine, from their own files and sockets: the cluster's Ray does not answer")
    expected = len(summary["expected_nodes"])
    lines.append(f"nodes: {summary['answering_nodes']} of {count(expected, 'expected node')} answer")
    if summary["nodes_with"]:
        lines[-1] += f"; a Ray node with {summary['nodes_with']} gets one"
    leaving = [member for member in summary["members"] if member["node"] in summary["drained_nodes"]]
    lines += [f"{member['node']} at {member['address']} is {member['state']}" for member in leaving]
    if about := summary["coordinator"]:
        lines.append(f"coordinator: {_service(about)}")
    lines += [f"{node['node']}: {_service(node)}" for node in summary["nodes"] if node["uptime_s"] is not None]
    return lines + metrics_lines(summary)


def metrics_lines(summary: dict) -> list[str]:
    """Returns a line with the addresses at which nodes and coordinator serve `/metrics`, and a line for each that cannot."""
    parts = [(node["node"], node["metrics_address"], node["metrics_problem"]) for node in summary["nodes"]]
    parts.append(("coordinator", summary["metrics"]["address"], summary["metrics"]["problem"]))
    serving = ", ".join(f"{name} http://{address}/metrics" for name, address, _ in parts if address)
    lines = [f"metrics: {serving}"] if serving else []
    return lines + [f"{name} serves no metrics: {problem}" for name, _, problem in parts if problem]


def _service(record: dict) -> str:
    """Returns a text with the uptime, restarts, refusals and rates of a node or of the coordinator."""
    texts = [f"up {_duration(record['uptime_s'])}"]
    if restarts := record["restarts"]:
        texts.append(f"restarted {count(restarts, 'time')}")
    if refused := record.get("refused_blocks"):
        texts.append(f"refused {count(refused, 'block')} for lack of room")
    if (rates := record.get("rates")) and rates["hit_blocks_per_s"]:
        texts.append(f"{_amount(rates['hit_blocks_per_s'])} hits/s, {format_size(rates['hit_bytes_per_s'])}/s")
    return ", ".join(texts)


def _plans(nodes: list[dict]) -> dict[str, dict]:
    """Returns, for each model (named by the start of its weights' digest), each tier's codec and why it was chosen.

    It is one plan per model, because all nodes choose the same codecs.
    """
    plans: dict[str, dict] = {}
    for node in nodes:
        for plan in node["codecs"]["plans"].values():
            plans[plan["weights"]] = {tier: each for tier, each in plan.items() if tier != "weights"}
    return plans


def coded_blocks(summary: dict) -> str:
    """Returns a text on how many blocks all nodes have compressed so far, by tier and codec, and how many fell back to another codec.

    Returns "" if there are none.
    """
    blocks, raw_bytes, kept_bytes = Counter(), Counter(), Counter()
    fell_back: Counter[str] = Counter()
    for node in summary["nodes"]:
        fell_back.update(node["codecs"]["fell_back"])
        for tier, codecs in node["codecs"]["coded"].items():
            for codec, figures in codecs.items():
                blocks[tier, codec] += figures["blocks"]
                raw_bytes[tier, codec] += figures["raw_bytes"]
                kept_bytes[tier, codec] += figures["kept_bytes"]
    texts = [
        f"{tier} {count} blocks as {codec}, {raw_bytes[tier, codec] / kept_bytes[tier, codec]:.2f} × smaller"
        for (tier, codec), count in blocks.items()
    ]
    texts += [f"{count} blocks fell back to a better codec ({why})" for why, count in fell_back.items()]
    return ", ".join(texts)


def saved(record: dict) -> str:
    """Returns a text on how much prefill a node or the cluster has saved its workers, or "" if none."""
    tokens, seconds = record["prefill_tokens_saved"], record["prefill_seconds_saved"]
    time = f", {_duration(seconds)}" if seconds else ""
    return f"prefill saved: {_amount(tokens)} tokens{time}" if tokens else ""


def _filling(node: dict) -> str:
    """Returns a text on a node's last restore: its progress and problems. Returns "" if there was none."""
    filling = node["filling"]
    if filling is None:
        return ""
    going = ", done" if filling["is_done"] else " so far"
    texts = [f"from a checkpoint: {filling['nearer']:,} of {count(filling['blocks'], 'block')} brought to memory or disk{going}"]
    if filling["damaged"]:
        texts.append(f"{count(filling['damaged'], 'block')} of the checkpoint damaged and left out")
    if filling["error"]:
        texts.append(f"loading from the checkpoint ended early: {filling['error']}")
    return "; ".join(texts)


def _quotas(node: dict) -> str:
    """Returns a text on each tenant that has a quota, and how much of the quota it uses."""
    texts = [
        f"tenant {tenant} {tier} {format_size(each['used_bytes'])} of {format_size(each['quota_bytes'])}"
        for tenant, tiers in node["tenants"].items()
        for tier, each in tiers.items()
        if each["quota_bytes"] is not None
    ]
    return ", ".join(texts)


def _at(checkpoint: dict) -> float:
    return checkpoint["at_s"]


MOVEMENT = {
    "shrunk": "compressed in memory",
    "promoted": "promoted",
    "demoted": "demoted",
    "reinserted": "written again",
    "not_admitted": "not admitted to the tier below",
    "dropped": "dropped",
    "dropped_under_pressure": "dropped because the tier below was too slow",
    "demote_failed": "could not be written",
    "lost": "lost",
    "pins_refused": "pins refused",
}
"""The counts of a node that are shown, each with its text. They are numbers of blocks, except the last one."""


def _movement(node: dict) -> str:
    texts = [f"{node['counts'][name]} {words}" for name, words in MOVEMENT.items() if node["counts"].get(name)]
    leaving_bytes = sum(node["leaving_bytes"].values())
    if leaving_bytes:
        texts.append(f"{format_size(leaving_bytes)} being demoted")
    return ", ".join(texts)


def _writes(node: dict) -> str:
    ratios = {tier: figures.get("write_amplification") for tier, figures in node["tiers"].items() if figures["blocks"]}
    return ", ".join(f"{tier} writes {ratio:.2f} bytes for each byte of blocks" for tier, ratio in ratios.items() if ratio)


def _learned(node: dict) -> str:
    age_s = node["policy"]["adopted_age_s"]
    texts = [] if age_s is None else [f"last got the other nodes' policy statistics {_duration(age_s)} ago"]
    return ", ".join(texts + ["is being recorded"] * node["recording"])


def _amount(number: float) -> str:
    """Returns a number as short text: 950, 12 k, 1.2 M."""
    units = ["", " k", " M", " G"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:.1f}{units[0]}" if units[0] and number < 10 else f"{number:.0f}{units[0]}"


def _duration(seconds: float) -> str:
    for unit, length_s in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"
