"""The command line of `tiered-kv bench`."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from tiered_kv.cluster.command import add_command
from tiered_kv.errors import Kind, TieredKVError

ONLY_OF = {
    "folder": ("disk", "checkpoint"),
    "endpoint": ("checkpoint",),
    "codec": ("codec",),
    "synthetic": ("codec",),
    "model": ("codec", "held"),
    "verify_host": ("fetch",),
}
"""Options that not every bench has."""


def add_bench(commands: Any) -> None:
    """Add the command to the parser's `commands`."""
    text = (
        "Measure the cache on this machine, each figure as a ratio in the same run: to a torch memcpy of the same bytes (fetch, codec), "
        "or to plain system calls (disk, checkpoint). held: the hit ratio of the demo's workload with a codec in half the host memory."
    )
    example = "tiered-kv bench fetch --json\n  tiered-kv bench disk --folder /nvme/tkv\n  tiered-kv bench codec --codec int8,int4"
    command = add_command(commands, "bench", text, example, _bench, text.partition(":")[0])
    what = (
        "fetch: look-up, fetch and store from a second process and from another node; disk: writes, cold reads, and a restart; "
        "codec: encode and decode with one and two threads; held: hits with int8 in half the memory; "
        "checkpoint: writing and restoring in a folder and on S3, what workers feel of it, the first hit"
    )
    command.add_argument("what", choices=list(RUNS), help=what)
    command.add_argument("--quick", action="store_true", help="fewer sizes and repetitions; of fetch the same node only")
    command.add_argument("--folder", help="of disk and checkpoint: where to measure (default: the system's temporary folder)")
    command.add_argument(
        "--endpoint", metavar="URL", help="of checkpoint: an S3 server with a bucket `bench` (default: moto, started for it)"
    )
    command.add_argument("--codec", metavar="A,B,…", help="of codec: which (default: all that the model has)")
    command.add_argument("--model", help="of codec and held: whose KV, an id, a folder or `default` (default: default)")
    command.add_argument("--synthetic", action="store_true", help="of codec: noise of KV's size and shape, where there is no model")
    command.add_argument("--verify-host", action="store_true", help="of fetch: with the setting verify_host")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def _bench(options: argparse.Namespace, console: Console) -> int:
    for name, users in ONLY_OF.items():
        if getattr(options, name) and options.what not in users:
            raise TieredKVError(
                Kind.CONFIG, f"--{name.replace('_', '-')}: is for bench {' and '.join(users)}, not {options.what}", setting=name
            )
    report, show = RUNS[options.what](options, console.print)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, console)
    return 0


Ran = tuple[dict, Callable[[dict, Console], None]]


def _fetch(options: argparse.Namespace, say: Callable[[str], None]) -> Ran:
    from tiered_kv.bench import fetch

    return fetch.run_bench(quick=options.quick, say=say, verify_host=options.verify_host), fetch.show


def _disk(options: argparse.Namespace, say: Callable[[str], None]) -> Ran:
    from tiered_kv.bench import disk

    return disk.run_disk_bench(quick=options.quick, say=say, folder=options.folder), disk.show


def _checkpoint(options: argparse.Namespace, say: Callable[[str], None]) -> Ran:
    from tiered_kv.bench import checkpoint

    ran = checkpoint.run_checkpoint_bench(quick=options.quick, say=say, folder=options.folder, endpoint=options.endpoint)
    return ran, checkpoint.show


def _codec(options: argparse.Namespace, say: Callable[[str], None]) -> Ran:
    from tiered_kv.bench import codecs

    model = None if options.synthetic else options.model or "default"
    return codecs.run_codec_bench(options.codec or "all", model, quick=options.quick, say=say), codecs.show


def _held(options: argparse.Namespace, say: Callable[[str], None]) -> Ran:
    from tiered_kv.bench import held

    return held.run_held_bench(options.model or "default", quick=options.quick, say=say), held.show


RUNS = {"fetch": _fetch, "disk": _disk, "codec": _codec, "held": _held, "checkpoint": _checkpoint}
