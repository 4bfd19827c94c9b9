"""The command `tiered-kv bench`."""

import argparse
import json
from collections.abc import Callable
from typing import Any

from rich.console import Console

from tiered_kv.cluster.commands.command import add_command
from tiered_kv.errors import Kind, TieredKVError

ONLY_OF = {
    "folder": ("disk", "checkpoint"),
    "endpoint": ("checkpoint",),
    "codec": ("codec",),
    "synthetic": ("codec",),
    "model": ("codec", "held"),
    "verify_host": ("fetch",),
}
"""The options that only some benchmarks accept, each with these benchmarks."""


def add_bench(commands: Any) -> None:
    """Add `bench` to the parser's `commands`."""
    text = (
        "Measure the cache on this machine: each figure is a ratio to a baseline in the same run. The baseline is a torch memcpy of the "
        "same bytes (fetch, codec) or plain system calls (disk, checkpoint). held measures the hit ratio of the demo's workload "
        "with a codec in half the host memory."
    )
    example = "tiered-kv bench fetch --json\n  tiered-kv bench disk --folder /nvme/tkv\n  tiered-kv bench codec --codec int8,int4"
    command = add_command(commands, "bench", text, example, _bench, text.partition(":")[0] + ".")
    what = (
        "fetch: look-up, fetch and store from a second process and from another node; "
        "transfer: blocks from another node beside raw TCP, Ray and memcpy, and over slow links; "
        "decide: the time lost by wrong choices between loading and computing, over slow links; disk: writes, cold reads, and a restart; "
        "codec: encode and decode with one and two threads; held: hit ratio with int8 in half the memory; "
        "checkpoint: writing and restoring with a folder and with S3, the slowdown of workers meanwhile, and the time to the first hit"
    )
    command.add_argument("what", choices=list(RUNS), help=what)
    command.add_argument("--quick", action="store_true", help="fewer sizes and repetitions; fetch measures the same node only")
    command.add_argument("--folder", help="for disk and checkpoint: folder to measure in (default: the system's temporary folder)")
    command.add_argument(
        "--endpoint",
        metavar="URL",
        help="for checkpoint: an S3 server with a bucket `bench` (default: a moto server that the benchmark starts)",
    )
    command.add_argument("--codec", metavar="A,B,…", help="for codec: codecs to measure (default: all that the model supports)")
    command.add_argument("--model", help="for codec and held: Hugging Face id or folder of the model, or `default` (default: default)")
    command.add_argument("--synthetic", action="store_true", help="for codec: use random values in the shape of KV instead of a model")
    command.add_argument("--verify-host", action="store_true", help="for fetch: measure with the setting verify_host")
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def _bench(options: argparse.Namespace, console: Console) -> int:
    for name, users in ONLY_OF.items():
        if getattr(options, name) and options.what not in users:
            message = f"--{name.replace('_', '-')}: only allowed with bench {' and '.join(users)}, got bench {options.what}"
            raise TieredKVError(Kind.CONFIG, message, setting=name)
    report, show = RUNS[options.what](options, console.print)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, console)
    return 0


Ran = tuple[dict, Callable[[dict, Console], None]]


def _fetch(options: argparse.Namespace, log: Callable[[str], None]) -> Ran:
    from tiered_kv.tools.bench import fetch

    return fetch.run_bench(quick=options.quick, log=log, verify_host=options.verify_host), fetch.show


def _disk(options: argparse.Namespace, log: Callable[[str], None]) -> Ran:
    from tiered_kv.tools.bench import disk

    return disk.run_disk_bench(quick=options.quick, log=log, folder=options.folder), disk.show


def _checkpoint(options: argparse.Namespace, log: Callable[[str], None]) -> Ran:
    from tiered_kv.tools.bench import checkpoint

    ran = checkpoint.run_checkpoint_bench(quick=options.quick, log=log, folder=options.folder, endpoint=options.endpoint)
    return ran, checkpoint.show


def _codec(options: argparse.Namespace, log: Callable[[str], None]) -> Ran:
    from tiered_kv.tools.bench import codecs

    model = None if options.synthetic else options.model or "default"
    return codecs.run_codec_bench(options.codec or "all", model, quick=options.quick, log=log), codecs.show


def _held(options: argparse.Namespace, log: Callable[[str], None]) -> Ran:
    from tiered_kv.tools.bench import held

    return held.run_held_bench(options.model or "default", quick=options.quick, log=log), held.show


def _transfer(options: argparse.Namespace, log: Callable[[str], None]) -> Ran:
    from tiered_kv.tools.bench import transfer

    return transfer.run_transfer_bench(quick=options.quick, log=log), transfer.show


def _decide(options: argparse.Namespace, log: Callable[[str], None]) -> Ran:
    from tiered_kv.tools.bench.choices import decide

    return decide.run_decide_bench(quick=options.quick, log=log), decide.show


RUNS = {"fetch": _fetch, "transfer": _transfer, "decide": _decide, "disk": _disk, "codec": _codec, "held": _held, "checkpoint": _checkpoint}
