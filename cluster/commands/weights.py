"""The commands `epoch` and `purge`: end the KV of former weights, or drop the KV of a namespace, on all nodes."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from tiered_kv.cluster.commands.command import add_command
from tiered_kv.cluster.commands.progress import count


def add_weights(commands: Any, add_name: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `epoch` and `purge` to the parser's `commands`."""
    text = (
        "Raise the weight epoch after a change of weights: from then on, no block of the former weights can be had from any tier "
        "of any node. Call it when all workers have the new weights, and before they serve again. Exit status 1 if a node did not confirm."
    )
    command = add_command(commands, "epoch", text, "tiered-kv epoch --namespace my-tenant", _epoch)
    _add_namespace(command, "default: all", required=False)
    command.add_argument("--keep", action="store_true", help="do not drop the former blocks; they are unreachable, and are evicted in time")
    _add_rest(command, add_name)
    text = (
        "Drop all blocks of a namespace in all tiers of all nodes, those of former epochs too. Its epoch stays, and its workers "
        "may store again. Checkpoints keep their files. Exit status 1 if a node did not answer."
    )
    command = add_command(commands, "purge", text, "tiered-kv purge --namespace my-tenant", _purge)
    _add_namespace(command, "may be given several times", required=True)
    _add_rest(command, add_name)


def _add_namespace(command: argparse.ArgumentParser, more: str, required: bool) -> None:
    text = f"a tenant, or the start of the name of weights or of a family in `status --json` ({more})"
    command.add_argument("--namespace", metavar="TEXT", action="append", default=[], required=required, help=text)


def _add_rest(command: argparse.ArgumentParser, add_name: Callable[[argparse.ArgumentParser], None]) -> None:
    add_name(command)
    command.add_argument("--address", help="host:port of the Ray cluster (default: the address in this machine's state file)")
    command.add_argument("--json", action="store_true", help="print the outcome as JSON")


def _epoch(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import attach, weights

    attach.join(options.name, options.address)
    change = weights.new_epoch(options.name, options.namespace, keep=options.keep)
    confirmed = len(change.by_node) - len(change.unreached)
    whose = f"{count(len(change.namespaces), 'namespace')}" if change.namespaces else "all namespaces"
    console.print(f"the weight epoch of {whose} is {change.number} on {count(confirmed, 'node')}", highlight=False)
    for node, why in change.unreached.items():
        console.print(
            f"[bold red]not confirmed[/] by {node}: its workers may still get former blocks until it reaches the coordinator ({why})",
            highlight=False,
            soft_wrap=True,
        )
    return _finish(options, change, {"epoch": change.number, "keep": options.keep})


def _purge(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import attach, weights

    attach.join(options.name, options.address)
    change = weights.purge(options.name, options.namespace)
    dropped = sum(answer for node, answer in change.by_node.items() if node not in change.unreached)
    console.print(f"dropped {count(dropped, 'block')} of {count(len(change.namespaces), 'namespace')}", highlight=False)
    for node, why in change.unreached.items():
        console.print(
            f"[bold red]not purged[/]: {node} may still have blocks, and give them to others; purge again when it answers ({why})",
            highlight=False,
            soft_wrap=True,
        )
    return _finish(options, change, {"dropped_blocks": dropped})


def _finish(options: argparse.Namespace, change: Any, facts: dict[str, Any]) -> int:
    if options.json:
        confirmed = [node for node in sorted(change.by_node) if node not in change.unreached]
        print(json.dumps(facts | {"namespaces": change.namespaces, "nodes": confirmed, "unreached": change.unreached}))
    return 1 if change.unreached or not change.by_node else 0
