"""The command line of `tiered-kv simulate`."""

import argparse
import json
from typing import Any

from rich.console import Console

from tiered_kv.cluster.command import add_command


def add_simulate(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    text = (
        "Replay request traces against eviction policies, to choose one and to size a cache. Traces have one JSON object a line "
        "(timestamp in ms, input_length, output_length, hash_ids), plain, .gz or .zst. `belady` is the best that could be done "
        "knowing the future. With --json a single object goes to standard output."
    )
    example = "tiered-kv simulate trace-b512.jsonl.zst --policy lru,adaptive,belady --plot curve.png"
    command = add_command(commands, "simulate", text, example, _simulate, "Replay request traces against eviction policies.")
    command.add_argument("traces", nargs="+", metavar="TRACE", help="files in Mooncake's format")
    command.add_argument("--policy", default="all", help="names with commas (default: all, with belady)")
    command.add_argument(
        "--capacity", default="0.01,0.02,0.05,0.1,0.2,0.4", help="shares of the trace's unique blocks, with commas (default: %(default)s)"
    )
    command.add_argument(
        "--tiers", metavar="NAME=SHARE,…", help="several tiers instead, as the store has them: hot=0.02,warm=0.1,disk=0.4,cold=1"
    )
    command.add_argument("--metric", choices=["tokens", "flops"], default="tokens", help="what tables and picture show (default: tokens)")
    command.add_argument(
        "--cost-weight",
        type=float,
        default=0.0,
        help="for adaptive, 0: every token counts alike, 1: by its prefill FLOPs (default: 0, as in a store)",
    )
    command.add_argument("--rekey", action="store_true", help="ids hash a block's content alone, not all that stands before it")
    command.add_argument("--block-tokens", type=int, help="tokens of a block (default: -bN in the file's name, or what fits the lengths)")
    command.add_argument("--json", action="store_true", help="print the results as JSON")
    command.add_argument("--plot", metavar="FILE", help="draw the curves; needs matplotlib (tiered-kv[plot])")
    command.add_argument("--jobs", type=int, help="processes to replay in (default: one a CPU)")


def _simulate(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.sim.command import SimulateOptions, run_simulate

    names = SimulateOptions.__dataclass_fields__
    found = run_simulate(SimulateOptions(**{name: value for name, value in vars(options).items() if name in names}), console)
    if options.json:
        print(json.dumps(found))
    return 0
