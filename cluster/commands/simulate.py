"""The command `tiered-kv simulate`."""

import argparse
import json
from typing import Any

from rich.console import Console

from tiered_kv.cluster.commands.command import add_command


def add_simulate(commands: Any) -> None:
    """Add `simulate` to the parser's `commands`."""
    text = (
        "Replay request traces against eviction policies, to choose a policy and to size a cache. A trace has one JSON object per line "
        "(timestamp in ms, input_length, output_length, hash_ids) and may be compressed (.gz or .zst). `belady` knows the future: it is "
        "the best result that any policy can reach. With --json a single object is written to standard output."
    )
    example = "tiered-kv simulate trace-b512.jsonl.zst --policy lru,adaptive,belady --plot curve.png"
    command = add_command(commands, "simulate", text, example, _simulate, "Replay request traces against eviction policies.")
    command.add_argument("traces", nargs="+", metavar="TRACE", help="trace files in Mooncake's format")
    command.add_argument("--policy", default="all", help="policies, separated by commas (default: all, with belady)")
    command.add_argument(
        "--capacity",
        default="0.01,0.02,0.05,0.1,0.2,0.4",
        help="cache sizes as shares of the trace's unique blocks, separated by commas (default: %(default)s)",
    )
    command.add_argument(
        "--tiers", metavar="NAME=SHARE,…", help="simulate several tiers instead, for example hot=0.02,warm=0.1,disk=0.4,cold=1"
    )
    command.add_argument(
        "--metric", choices=["tokens", "flops"], default="tokens", help="figure shown in the tables and the plot (default: tokens)"
    )
    command.add_argument(
        "--cost-weight",
        type=float,
        default=0.0,
        help="for adaptive: 0 counts every token alike, 1 weighs tokens by their prefill FLOPs (default: 0, as in a running cache)",
    )
    command.add_argument(
        "--rekey", action="store_true", help="the trace's ids hash only the content of a block: derive ids that also cover its prefix"
    )
    command.add_argument(
        "--block-tokens", type=int, help="tokens in a block (default: -bN in the file's name, or the size that fits the lengths)"
    )
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    command.add_argument("--plot", metavar="FILE", help="plot the curves to FILE; needs matplotlib (tiered-kv[plot])")
    command.add_argument("--jobs", type=int, help="number of processes (default: one per CPU)")


def _simulate(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.tools.simulate.command import SimulateOptions, run_simulate

    names = SimulateOptions.__dataclass_fields__
    found = run_simulate(SimulateOptions(**{name: value for name, value in vars(options).items() if name in names}), console)
    if options.json:
        print(json.dumps(found))
    return 0
