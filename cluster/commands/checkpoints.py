"""The commands `checkpoint`, `restore`, `verify` and `checkpoints`, and the option `up --restore`.

They write a cluster's blocks to object storage, load them back, and check and list what was written.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from tiered_kv.blocks import Tier
from tiered_kv.cluster.commands.command import add_command
from tiered_kv.cluster.commands.progress import age, bar, count, print_line
from tiered_kv.cluster.commands.restoring import Restoring, calls_to_nodes, mounted_bytes, must_be_there, must_have_use, opened, read
from tiered_kv.config import Config, format_size, parse_size
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    from tiered_kv.checkpoint.call_nodes import CallNodes
    from tiered_kv.checkpoint.garbage_collection import CollectionResult
    from tiered_kv.checkpoint.manifest import Model
    from tiered_kv.checkpoint.repository import CheckpointSummary, Repository
    from tiered_kv.checkpoint.take import CheckpointResult

BUSY_POLL_S = 2.0
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PLACES = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder, or a folder's path"


def add_checkpoints(commands: Any, add_name: Callable, add_settings: Callable, config_of: Callable) -> None:
    """Add the four commands to the parser's `commands`.

    `add_name` and `add_settings` add the options that all commands on a cluster share. `config_of` builds a `Config` from options.
    """
    _add_checkpoint(commands, add_name)
    _add_restore(commands, add_name, add_settings, config_of)
    _add_verify(commands)
    _add_list(commands)


# Writing


def _add_checkpoint(commands: Any, add_name: Callable) -> None:
    text = (
        "Write the blocks of a running cluster to object storage, while it serves. Blocks that are in an earlier checkpoint at the "
        "same URL are not written again. After Ctrl-C or a crash the next checkpoint continues from what was already written."
    )
    example = (
        "tiered-kv checkpoint s3://bucket/kv\n"
        "  tiered-kv checkpoint --every 10m --keep 5 --max-rate 200MiB s3://bucket/kv\n"
        "  tiered-kv checkpoint /mnt/shared/kv --tiers host --min-hits 1"
    )
    command = add_command(commands, "checkpoint", text, example, _checkpoint)
    command.add_argument("url", metavar="URL", help=PLACES)
    command.add_argument("--tiers", metavar="TIER,…", help="write only blocks in these tiers (default: all but objects)")
    _add_namespace(command)
    command.add_argument(
        "--min-hits", type=int, default=0, metavar="N", help="write only blocks that were used at least N times (default: 0)"
    )
    command.add_argument(
        "--every", metavar="TIME", help="write one checkpoint every TIME, for example 10m, until Ctrl-C (default: only one)"
    )
    command.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="after each checkpoint, delete all but the newest N, and the packs that no checkpoint uses any more",
    )
    _add_rate_and_cluster(command, add_name)
    command.add_argument("--json", action="store_true", help="print the figures as JSON, one line per checkpoint")


def _add_rate_and_cluster(command: argparse.ArgumentParser, add_name: Callable) -> None:
    command.add_argument("--max-rate", metavar="SIZE", help="maximum bytes per second, for example 100MiB (default: no limit)")
    add_name(command)
    command.add_argument("--address", help="host:port of the Ray cluster (default: the address in this machine's state file)")


def _add_namespace(command: argparse.ArgumentParser) -> None:
    text = "only namespaces whose weights' name or root starts with NAME (see `tiered-kv checkpoints`), or of tenant NAME; may be repeated"
    command.add_argument("--namespace", action="append", metavar="NAME", default=[], help=text)


class _CheckpointOptions(NamedTuple):
    """The parsed values of `--tiers`, `--every` and `--max-rate`."""

    tiers: tuple[int, ...] | None
    every_s: float | None
    rate: float | None


def _checkpoint(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import attach
    from tiered_kv.cluster.commands.record import interrupted

    given = _CheckpointOptions(_tiers(options.tiers), _seconds(options.every), _rate(options.max_rate))
    for setting, value, least in (("keep", options.keep, 1), ("min-hits", options.min_hits, 0)):
        if value is not None and value < least:
            raise TieredKVError(Kind.CONFIG, f"--{setting}: must be at least {least}, got {value}", setting=setting)
    attach.join(options.name, options.address)
    with opened(options.url) as repository, interrupted() as stopped:
        while True:
            begun_s = time.monotonic()
            try:
                _write_checkpoint(options, console, repository, given, stopped)
            except TieredKVError as error:
                if given.every_s is None or (error.kind is Kind.CLUSTER and not stopped.is_set()):
                    raise
                if stopped.is_set():
                    print_line(console, str(error))
                    return 0
                print_line(console, f"this checkpoint failed; the next one continues from what was written: {error}")
            if given.every_s is None or stopped.wait(max(given.every_s - (time.monotonic() - begun_s), 0)):
                return 0


def _write_checkpoint(
    options: argparse.Namespace, console: Console, repository: "Repository", given: _CheckpointOptions, stopped: Event
) -> None:
    from tiered_kv.cluster import start
    from tiered_kv.node.checkpoints.steps import NoteRequest, WrittenCheckpoint

    about = start.describe(options.name)
    nodes, call = [node["node"] for node in about["nodes"]], calls_to_nodes(options.name)
    taken, seconds = _take_when_free(options, console, repository, given, stopped, nodes, call)
    call(nodes, NoteRequest(WrittenCheckpoint(name=taken.name, url=repository.store.url, at_s=time.time(), blocks=taken.blocks)))
    _report_checkpoint(console, taken, seconds)
    collected = repository.collect(options.keep) if options.keep else None
    if collected is not None:
        _report_collected(console, collected)
    tokens = about["config"].block_tokens
    sized = "" if tokens == Config.block_tokens else f" --block-tokens {tokens}"
    print_line(console, f"to restore it:  tiered-kv up{sized} --restore {options.url}")
    if options.json:
        print(json.dumps({**taken._asdict(), "seconds": round(seconds, 3), "collected": collected and collected._asdict()}), flush=True)


def _take_when_free(
    options: argparse.Namespace,
    console: Console,
    repository: "Repository",
    given: _CheckpointOptions,
    stopped: Event,
    nodes: list[str],
    call: "CallNodes",
) -> "tuple[CheckpointResult, float]":
    """Write a checkpoint as soon as the nodes are not busy with another one. Returns its counts, and the seconds that it took."""
    from tiered_kv.checkpoint.restore import matches
    from tiered_kv.checkpoint.take import CheckpointFilter, CheckpointJob

    wanted = CheckpointFilter(
        given.tiers, lambda model: not options.namespace or matches(model, options.namespace), options.min_hits, False
    )
    reported = ""
    while True:
        begun_s = time.monotonic()
        with bar(console, "writing") as advance:
            job = CheckpointJob(
                call,
                nodes,
                repository,
                origin=options.name,
                max_rate=given.rate,
                progress=lambda going: advance(going.nbytes, going.all_bytes, f"{going.blocks:,} of {going.all_blocks:,} blocks"),
                log=lambda line: print_line(console, line),
                stopped=stopped,
            )
            try:
                return job.take(wanted), time.monotonic() - begun_s
            except TieredKVError as error:
                if not error.context.get("busy"):
                    raise
                if reported != str(error):
                    reported = str(error)
                    print_line(console, f"waiting: {reported}")
        if stopped.wait(BUSY_POLL_S):
            raise TieredKVError(Kind.STORAGE, "the checkpoint was stopped before it started")


def _report_checkpoint(console: Console, taken: "CheckpointResult", seconds: float) -> None:
    whole = f"{count(taken.blocks, 'block')}, {format_size(taken.nbytes)}, in {count(taken.packs, 'pack')}"
    rate = f", {format_size(taken.written_bytes / seconds)}/s" if seconds and taken.written_bytes else ""
    was_there = taken.blocks - taken.new_blocks
    rest = f"; the other {was_there:,} were already at this URL" if was_there else ""
    print_line(console, f"checkpoint {taken.name}: {whole}")
    print_line(console, f"written: {count(taken.new_blocks, 'block')}, {format_size(taken.written_bytes)} in {seconds:.1f} s{rate}{rest}")
    if taken.left:
        why = "they, or a block of their prefix, were evicted before they could be written"
        print_line(console, f"left out: {count(taken.left, 'block')}; {why}")
    if taken.orphans:
        why = "a block of their prefix is on none of these nodes and tiers, so they could never be hits"
        print_line(console, f"left out: {count(taken.orphans, 'block')}; {why}")


def _report_collected(console: Console, collected: "CollectionResult") -> None:
    if collected.skipped:
        print_line(console, f"no checkpoints were deleted this time: {collected.skipped}")
    elif collected.manifests_deleted or collected.packs_deleted:
        deleted = f"{count(collected.manifests_deleted, 'older checkpoint')} and {count(collected.packs_deleted, 'pack')}"
        print_line(console, f"deleted: {deleted}, {format_size(collected.bytes_deleted)}")


# Restoring


def _add_restore(commands: Any, add_name: Callable, add_settings: Callable, config_of: Callable) -> None:
    text = (
        "Restore a checkpoint into a running cluster of any size, or into a new cluster that --nodes starts. Its blocks are hits "
        "as soon as the manifest has been read. Then the hottest blocks are copied to host memory and disk until these are full."
    )
    example = "tiered-kv restore s3://bucket/kv\n  tiered-kv restore s3://bucket/kv --nodes 2 --host 16GiB"
    command = add_command(commands, "restore", text, example, lambda options, console: _restore(options, console, config_of))
    command.add_argument("url", metavar="URL", help=PLACES)
    _add_which(command)
    command.add_argument("--nodes", type=int, metavar="N", help="start a new cluster of N nodes (default: use the running cluster)")
    _add_namespace(command)
    command.add_argument(
        "--world",
        type=int,
        metavar="M",
        help="restore for M tensor-parallel ranks: blocks written for another number of ranks are split or joined by heads",
    )
    _add_rate_and_cluster(command, add_name)
    add_settings(command)
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def _add_which(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", metavar="NAME", help="name of the checkpoint at URL (default: the latest)")


def _restore(options: argparse.Namespace, console: Console, config_of: Callable) -> int:
    from tiered_kv.cluster import attach, start, state
    from tiered_kv.cluster.commands.record import interrupted

    rate, found = _rate(options.max_rate), state.find(options.name)
    is_up = options.address is not None or (found is not None and found.has_head())
    if options.nodes is not None and is_up:
        message = f"--nodes: only allowed if no cluster is up, but {options.name!r} is; leave the option out, or stop the cluster first"
        raise TieredKVError(Kind.CONFIG, message, setting="nodes")
    if options.nodes is None and not is_up:
        message = f"no cluster {options.name!r} is up; start one with `tiered-kv up --restore {options.url}`, or pass --nodes here"
        raise TieredKVError(Kind.CLUSTER, message, name=options.name)
    with opened(options.url, must_exist=True) as repository, interrupted() as stopped:
        name, manifest = read(repository, options.checkpoint, console)
        if is_up:
            attach.join(options.name, options.address)
        else:
            config = config_of(options)
            must_have_use(manifest, name, config)
            spare = mounted_bytes(manifest, options.nodes)
            start.up(config, name=options.name, nodes=options.nodes, log=console.print, mounted_bytes=spare)
        restoring = Restoring(options.name, repository, name, manifest, console)
        restoring.mount(options.namespace, options.world)
        loaded = restoring.load(rate, stopped)
        if options.json:
            print(json.dumps(restoring.figures(loaded)))
    return 1 if loaded.damaged else 0


def add_restore_option(command: argparse.ArgumentParser) -> None:
    """Add the option `--restore` to the parser of `up`."""
    text = "start with the latest checkpoint at URL: its blocks are hits at once, and are copied to memory and disk in the background"
    command.add_argument("--restore", metavar="URL", help=text)


# Inspecting


def _add_verify(commands: Any) -> None:
    text = "Read every object of the checkpoints at a URL, and report damaged or missing ones. The exit status is 1 if there are any."
    command = add_command(commands, "verify", text, "tiered-kv verify s3://bucket/kv", _verify)
    command.add_argument("url", metavar="URL", help=PLACES)
    command.add_argument("--checkpoint", metavar="NAME", help="verify only this checkpoint (default: all)")
    command.add_argument("--json", action="store_true", help="print the problems as JSON")


def _verify(options: argparse.Namespace, console: Console) -> int:
    with opened(options.url, must_exist=True) as repository:
        names = [options.checkpoint] if options.checkpoint else None
        if options.checkpoint:
            must_be_there(repository, options.checkpoint)
        with bar(console, "verifying") as advance:
            problems = repository.verify(names, progress=lambda done, total: advance(done, total, ""))
        number = len(names or repository.names())
    for problem in problems:
        console.print(f"[red]damaged[/]: {problem.message}", highlight=False, soft_wrap=True)
    print_line(console, f"{count(number, 'checkpoint')} at {options.url}: {count(len(problems), 'problem')}")
    if problems:
        print_line(console, "to repair: delete the damaged packs; the next checkpoint writes their blocks again if they are in the cache")
    if options.json:
        print(json.dumps({"checkpoints": number, "problems": [problem._asdict() for problem in problems]}))
    return 1 if problems else 0


def _add_list(commands: Any) -> None:
    text = "List the checkpoints at a URL: age, blocks, bytes, the share of bytes used by other checkpoints too, and the models."
    command = add_command(commands, "checkpoints", text, "tiered-kv checkpoints s3://bucket/kv", _list)
    command.add_argument("url", metavar="URL", help=PLACES)
    command.add_argument("--json", action="store_true", help="print the list as JSON")


def _list(options: argparse.Namespace, console: Console) -> int:
    with opened(options.url, must_exist=True) as repository:
        listed = repository.overview()
    if options.json:
        print(json.dumps([{**each._asdict(), "models": [_model_record(model) for model in each.models]} for each in listed], indent=1))
    elif listed:
        console.print(_table(listed, options.url))
    else:
        print_line(console, f"there are no checkpoints at {options.url}")
    return 0


def _table(listed: "list[CheckpointSummary]", url: str) -> Table:
    from tiered_kv.checkpoint.restore import title

    table = Table(title=f"checkpoints at {url}", caption="shared: the share of its packs' bytes that other checkpoints use too")
    table.add_column("name", no_wrap=True)
    for column in ("age", "blocks", "bytes", "shared"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("model", overflow="fold")
    for each in listed:
        if each.error:
            table.add_row(each.name, "", "", "", "", f"[red]cannot be used[/]: {each.error}")
            continue
        shared = f"{each.shared_bytes / each.pack_bytes:.0%}" if each.pack_bytes else "–"
        whose = "\n".join(title(model).removeprefix("namespace ") for model in each.models)
        table.add_row(each.name, age(time.time() - each.created_s), f"{each.blocks:,}", format_size(each.bytes), shared, whose)
    return table


def _model_record(model: "Model") -> dict:
    return {
        "root": model.root.hex(),
        "name": model.name,
        "layout": asdict(model.layout) if model.layout else None,
        "namespace": model.namespace,
    }


# Parsing option values


def _tiers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    known = {tier.label: int(tier) for tier in Tier}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise TieredKVError(Kind.CONFIG, f"--tiers: must be one or more of {', '.join(known)}, got {name!r}", setting="tiers")
    return tuple(known[name] for name in names)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not found or not float(found[1]) > 0:
        raise TieredKVError(Kind.CONFIG, f"--every: must be a positive time such as 30s, 10m or 1h, got {text!r}", setting="every")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def _rate(text: str | None) -> float | None:
    if text is None:
        return None
    rate = parse_size(text, "--max-rate")
    if rate < 1:
        raise TieredKVError(Kind.CONFIG, f"--max-rate: must be at least 1 byte per second, got {text}", setting="max-rate")
    return float(rate)
