"""What people see of a cluster: its nodes, their tiers, bytes, blocks and hits."""

from rich.console import Console
from rich.table import Table

from tiered_kv.config import format_size


def summarize(about: dict) -> dict:
    """The cluster as one JSON-ready record, with sums over its nodes. `about` is what `start.describe` gives."""
    nodes = []
    for node in about["nodes"]:
        stats = node["stats"]
        nodes.append(
            {
                "node": node["node"],
                "address": node.get("address"),
                "directory": node["directory"],
                "silent_s": round(node["silent_s"], 3),
                "tiers": stats["tiers"],
                "blocks": stats["blocks"],
                "sessions": stats["sessions"],
                "reserved_bytes": stats["reserved_bytes"],
                "asked_blocks": stats["asked_blocks"],
                "hit_blocks": stats["hit_blocks"],
                "hit_ratio": _ratio(stats["hit_blocks"], stats["asked_blocks"]),
                "leaving_bytes": stats["leaving_bytes"],
                "counts": stats["counts"],
            }
        )
    asked = sum(node["asked_blocks"] for node in nodes)
    hit = sum(node["hit_blocks"] for node in nodes)
    return {
        "cluster_id": about["cluster_id"],
        "policy": about["config"].policy,
        "block_tokens": about["config"].block_tokens,
        "nodes": nodes,
        "asked_blocks": asked,
        "hit_blocks": hit,
        "hit_ratio": _ratio(hit, asked),
    }


def show(summary: dict, console: Console) -> None:
    """Print the record as a table: a line for each tier of each node."""
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
    console.print(table)
    for node in summary["nodes"]:
        if said := _movement(node):
            console.print(f"{node['node']}: {said}", highlight=False)
    hits = f"{summary['hit_blocks']} of {summary['asked_blocks']} blocks asked for"
    console.print(f"block hit ratio of the cluster: {_percent(summary['hit_ratio'])} ({hits})", highlight=False)


MOVEMENT = {
    "promoted": "copied up",
    "demoted": "copied down",
    "reinserted": "written again",
    "not_admitted": "not worth a write",
    "dropped": "dropped",
    "dropped_under_pressure": "dropped because the tier below was too slow",
    "demote_failed": "could not be written",
    "lost": "lost",
    "pins_refused": "pins refused",
}
"""Counts of a node that people look for, in blocks but for the last."""


def _movement(node: dict) -> str:
    said = [f"{node['counts'][name]} {words}" for name, words in MOVEMENT.items() if node["counts"].get(name)]
    leaving_bytes = sum(node["leaving_bytes"].values())
    if leaving_bytes:
        said.append(f"{format_size(leaving_bytes)} on the way down")
    return ", ".join(said)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"
