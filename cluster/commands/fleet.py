"""The options and commands about a cluster's fleet of nodes: parts of `up` and `down`, and `tiered-kv drain`."""

import argparse
import json
import tomllib
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console

from tiered_kv.cluster.commands.command import add_command
from tiered_kv.cluster.commands.progress import bar, count, print_line
from tiered_kv.config import format_size
from tiered_kv.errors import Kind, TieredKVError

UP_TEXT = (
    "Start a cluster of cache nodes: on new Ray nodes on this machine, or one cache node on each node of a running Ray cluster. Ray nodes "
    "that join later get a cache node within seconds. If the cluster is up already, `up` checks it and starts what is missing; "
    "settings that differ are errors."
)
UP_EXAMPLES = """tiered-kv up --device 2GiB --host 16GiB --disk 200GiB:/nvme/tkv
  tiered-kv up --address 10.0.0.5:6379 --nodes-with cache=yes     # only on Ray nodes started with: ray start --labels cache=yes
  tiered-kv up --address 10.0.0.5:6379 --nodes-with GPU           # only on Ray nodes that have this resource
  tiered-kv up                                                    # start again what has ended of the running cluster"""

DOWN_TEXT = (
    "Stop a cluster. No process, shared memory or temporary file is left behind. A folder named in --disk keeps its blocks, and gets "
    "those that only memory had. A line for each node says what stays and what is lost."
)
DOWN_EXAMPLES = """tiered-kv down
  tiered-kv down --flush=120      # write blocks to disk for up to two minutes
  tiered-kv down --flush=0        # at once: blocks that only memory had are lost"""

DRAIN_TEXT = (
    "Take a node out of a cluster. It hands the blocks most worth keeping to other nodes that have room, writes the rest to its disk "
    "folder, if --disk names one, and closes. It is not started again until `drain --undo`, or until a new Ray node starts at its "
    "address. A lost node is no longer expected afterwards."
)
DRAIN_EXAMPLES = """tiered-kv drain node-2
  tiered-kv drain node-2 --within 300     # hand blocks over for up to five minutes
  tiered-kv drain node-2 --undo           # start it again"""
WITHIN_S = 60.0


def add_nodes_with(command: argparse.ArgumentParser) -> None:
    """Add the option `--nodes-with` to the parser of `up`."""
    text = "only Ray nodes with this label or resource get a cache node, now and when they join (default: all Ray nodes)"
    command.add_argument("--nodes-with", metavar="LABEL=VALUE|RESOURCE", help=text)


def given_settings(options: argparse.Namespace, settings: Iterable[str]) -> set[str]:
    """Returns the names of the settings that are given on the command line or in its TOML file."""
    values = {setting.replace("-", "_"): getattr(options, setting.replace("-", "_")) for setting in settings}
    given = {setting: value for setting, value in values.items() if value is not None}
    if options.config:
        with open(options.config, "rb") as file:  # `Config.from_toml` has read it already
            given = tomllib.load(file) | given
    parts = {"device": "device_name", "disk": "disk_path"}
    return set(given) | {other for setting, other in parts.items() if ":" in str(given.get(setting, ""))}


def fleet_figures(name: str) -> dict[str, Any]:
    """Returns the nodes of the cluster that this process has joined, for the JSON of `up`."""
    from tiered_kv.cluster import start

    fleet = start.describe_fleet(name)["fleet"]
    return {"nodes": [{key: member[key] for key in ("node", "address", "state")} for member in fleet["members"]]}


def add_flush(command: argparse.ArgumentParser) -> None:
    """Add the option `--flush` to the parser of `down`."""
    text = (
        "how long nodes may write blocks that only memory has to their disk folders, the most valuable first "
        "(default: 30 if --disk names a folder; 0: not at all)"
    )
    command.add_argument("--flush", metavar="SECONDS", nargs="?", type=float, const=None, default=None, help=text)


def flush_option(options: argparse.Namespace) -> float | None:
    """Returns the value of `--flush` in seconds, or None for the default. Raises (kind `config`) if it is negative or not a number."""
    if options.flush is not None and not 0 <= options.flush < float("inf"):
        raise TieredKVError(Kind.CONFIG, f"--flush: must be a number of seconds, 0 or more, got {options.flush}", setting="flush")
    return options.flush


def add_drain(commands: Any, add_name: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `drain` to the parser's `commands`."""
    command = add_command(commands, "drain", DRAIN_TEXT, DRAIN_EXAMPLES, _drain)
    command.add_argument("node", metavar="NODE", help="the node's id or address, as `tiered-kv status` shows them")
    command.add_argument("--within", metavar="SECONDS", type=float, default=WITHIN_S, help="how long to hand blocks over (default: 60)")
    command.add_argument("--undo", action="store_true", help="start a drained node again")
    command.add_argument("--force", action="store_true", help="drain the last node although its blocks are lost")
    add_name(command)
    command.add_argument("--address", help="host:port of the Ray cluster (default: the address in this machine's state file)")
    command.add_argument("--json", action="store_true", help="print what was handed over as JSON")


def _drain(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import attach, draining

    if not 0 <= options.within < float("inf"):
        raise TieredKVError(Kind.CONFIG, f"--within: must be a number of seconds, 0 or more, got {options.within}", setting="within")
    attach.join(options.name, options.address)
    tell = log_to(console)
    if options.undo:
        draining.undo(options.name, options.node, tell)
        return 0
    with bar(console, "handing over") as advance:
        drained = draining.drain(options.name, options.node, options.within, force=options.force, log=tell, advance=advance)
    for line in words(drained):
        tell(line)
    if options.json:
        print(json.dumps(drained.as_record()))
    return 0


def words(drained: Any) -> list[str]:
    """Returns lines that say what became of a drained node's blocks."""
    from tiered_kv.cluster.stop import outcome

    lines = []
    if drained.taken:
        spread = ", ".join(f"{peer} {blocks:,}" for peer, blocks in drained.taken.items())
        lines.append(f"other nodes have {count(sum(drained.taken.values()), 'block')} of {drained.node} ({spread})")
    if drained.left:
        lines.append(f"{count(drained.left, 'block')} ({format_size(drained.left_bytes)}) were not handed over: {drained.why}")
    if drained.end is not None:
        lines.append(f"{drained.node}: {outcome(drained.end)}")
    return [*lines, f"{drained.node} is drained; start it again with: tiered-kv drain {drained.node} --undo"]


def log_to(console: Console) -> Callable[[str], None]:
    """Returns a function that prints one line without markup."""
    return lambda line: print_line(console, line)
