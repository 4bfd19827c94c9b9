"""`checkpoint`, `restore`, `verify`, `checkpoints`, and `up --restore`: a cluster's blocks on object storage, and back."""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from tiered_kv.blocks import Tier
from tiered_kv.cluster.command import add_command
from tiered_kv.config import Config, format_size, parse_size
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    from tiered_kv.ops.checkpoint import Taken
    from tiered_kv.ops.manifest import Manifest, Model
    from tiered_kv.ops.nodes import Ask
    from tiered_kv.ops.repository import Repository
    from tiered_kv.ops.reshard import Planned
    from tiered_kv.service.filling import Filled

ANSWER_WITHIN_S = 120.0
SAY_EVERY_S = 5.0
INDEX_BYTES_A_BLOCK = 64 << 10
"""For so many bytes of lower tiers the index has one slot."""
MOUNTED_SPARE = 1.3
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
PLACES = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder, or a folder's path"


def add_checkpoints(commands: Any, add_name: Callable, add_settings: Callable, config_of: Callable) -> None:
    """The four commands. `config_of`: settings from options; the others add what all commands of a cluster have in common."""
    _add_checkpoint(commands, add_name)
    _add_restore(commands, add_name, add_settings, config_of)
    _add_verify(commands)
    _add_list(commands)


# Writing


def _add_checkpoint(commands: Any, add_name: Callable) -> None:
    text = (
        "Write what a running cluster holds to object storage, while it serves. Blocks that an earlier checkpoint at the same URL has "
        "are not written again; after Ctrl-C or a crash the next one goes on from there."
    )
    example = (
        "tiered-kv checkpoint s3://bucket/kv\n"
        "  tiered-kv checkpoint --every 10m --keep 5 --max-rate 200MiB s3://bucket/kv\n"
        "  tiered-kv checkpoint /mnt/shared/kv --tiers host --min-hits 1"
    )
    command = add_command(commands, "checkpoint", text, example, _checkpoint)
    command.add_argument("url", metavar="URL", help=PLACES)
    command.add_argument("--tiers", metavar="TIER,…", help="only what lies in these tiers (default: all but objects)")
    _add_namespace(command)
    command.add_argument("--min-hits", type=int, default=0, metavar="N", help="only blocks that were used so often (default: 0)")
    command.add_argument("--every", metavar="TIME", help="again and again, for example 10m; Ctrl-C ends it (default: once)")
    command.add_argument("--keep", type=int, metavar="N", help="afterwards delete all but the newest N, and packs that none needs any more")
    command.add_argument("--max-rate", metavar="SIZE", help="bytes a second at most, for example 100MiB (default: as fast as it goes)")
    add_name(command)
    command.add_argument("--address", help="host:port of the Ray cluster (default: what this machine knows)")
    command.add_argument("--json", action="store_true", help="print the figures as JSON, a line for each checkpoint")


def _add_namespace(command: argparse.ArgumentParser) -> None:
    text = "only this namespace: how its weights' name or its root begins (as `checkpoints` shows them), or a tenant; may be given again"
    command.add_argument("--namespace", action="append", metavar="NAME", default=[], help=text)


def _checkpoint(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.cluster import attach, start
    from tiered_kv.cluster.record import interrupted

    tiers, every_s, rate = _tiers(options.tiers), _seconds(options.every), _rate(options.max_rate)
    for setting, value, least in (("keep", options.keep, 1), ("min-hits", options.min_hits, 0)):
        if value is not None and value < least:
            raise TieredKVError(Kind.CONFIG, f"--{setting}: must be at least {least}, got {value}", setting=setting)
    attach.join(options.name, options.address)
    with _repository(options.url) as repository, interrupted() as stopped:
        while True:
            begun_s = time.monotonic()
            nodes = [node["node"] for node in start.describe(options.name)["nodes"]]
            try:
                _take(options, console, repository, nodes, tiers, rate, stopped)
            except TieredKVError as error:
                if every_s is None or stopped.is_set():
                    raise
                _say(console, f"this checkpoint failed, the next one goes on from there: {error}")
            if every_s is None or stopped.wait(max(every_s - (time.monotonic() - begun_s), 0)):
                return 0


def _take(
    options: argparse.Namespace,
    console: Console,
    repository: "Repository",
    nodes: list[str],
    tiers: tuple[int, ...] | None,
    rate: float | None,
    stopped: Event,
) -> None:
    from tiered_kv.ops.checkpoint import Taking, Wanted
    from tiered_kv.ops.restore import matches

    begun_s = time.monotonic()
    with _bar(console, "writing") as advance:
        taking = Taking(
            _asking(options.name),
            nodes,
            repository,
            origin=options.name,
            max_rate=rate,
            progress=lambda going: advance(going.nbytes, going.all_bytes, f"{going.blocks:,} of {going.all_blocks:,} blocks"),
            say=lambda line: _say(console, line),
            stopped=stopped,
        )
        taken = taking.take(Wanted(tiers, lambda model: not options.namespace or matches(model, options.namespace), options.min_hits))
    seconds = time.monotonic() - begun_s
    collected = repository.collect(options.keep) if options.keep else None
    _report_taken(console, options.url, taken, seconds)
    if collected is not None:
        gone = f"{collected.manifests_deleted} older checkpoints and {collected.packs_deleted} packs"
        why = f" ({collected.skipped})" if collected.skipped else ""
        _say(console, f"deleted {gone}, {format_size(collected.bytes_deleted)}{why}")
    if options.json:
        print(json.dumps({**taken._asdict(), "seconds": round(seconds, 3), "collected": collected and collected._asdict()}), flush=True)


def _report_taken(console: Console, url: str, taken: "Taken", seconds: float) -> None:
    whole = f"{taken.blocks:,} blocks, {format_size(taken.nbytes)}, in {taken.packs} packs"
    rate = f", {format_size(taken.written_bytes / seconds)}/s" if seconds and taken.written_bytes else ""
    _say(console, f"checkpoint {taken.name}: {whole}")
    _say(console, f"written: {taken.new_blocks:,} blocks, {format_size(taken.written_bytes)} in {seconds:.1f} s{rate}; the rest was there")
    if taken.left:
        _say(console, f"{taken.left:,} blocks are not in it: they, or a block before them, left the cache before they could be written")
    if taken.orphans:
        _say(console, f"{taken.orphans:,} blocks are not in it: a block before them is on no node, so that nobody could hit them")
    _say(console, f"bring it back:  tiered-kv up --restore {url}")


# Restoring


def _add_restore(commands: Any, add_name: Callable, add_settings: Callable, config_of: Callable) -> None:
    text = (
        "Bring a checkpoint into a running cluster of any number of nodes, or into a new one that is started with --nodes. Its blocks are "
        "hits as soon as the manifest is read; then the hottest are copied to memory and disk until these are full."
    )
    example = "tiered-kv restore s3://bucket/kv\n  tiered-kv restore s3://bucket/kv --nodes 2 --host 16GiB"
    command = add_command(commands, "restore", text, example, lambda options, console: _restore(options, console, config_of))
    command.add_argument("url", metavar="URL", help=PLACES)
    _add_which(command)
    command.add_argument("--nodes", type=int, metavar="N", help="start a cluster of N nodes for it, if none is up (default: one is up)")
    _add_namespace(command)
    command.add_argument(
        "--world", type=int, metavar="M", help="for M tensor-parallel ranks: blocks of other worlds are split or joined by heads"
    )
    command.add_argument("--max-rate", metavar="SIZE", help="bytes a second at most (default: as fast as it goes)")
    add_name(command)
    command.add_argument("--address", help="host:port of the Ray cluster (default: what this machine knows)")
    add_settings(command)
    command.add_argument("--json", action="store_true", help="print the figures as JSON")


def _add_which(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", metavar="NAME", help="which of those at URL (default: the latest)")


def _restore(options: argparse.Namespace, console: Console, config_of: Callable) -> int:
    from tiered_kv.cluster import attach, start, state
    from tiered_kv.cluster.record import interrupted

    rate, found = _rate(options.max_rate), state.find(options.name)
    is_up = options.address is not None or (found is not None and found.alive())
    if options.nodes is not None and is_up:
        message = f"--nodes: cluster {options.name!r} is up and has its nodes; leave it away, or stop the cluster first"
        raise TieredKVError(Kind.CONFIG, message, setting="nodes")
    if options.nodes is None and not is_up:
        message = f"no cluster {options.name!r} is up; start one with `tiered-kv up --restore {options.url}`, or give --nodes here"
        raise TieredKVError(Kind.CLUSTER, message, name=options.name)
    with _repository(options.url) as repository, interrupted() as stopped:
        name, manifest = _read(repository, options.checkpoint, console)
        if is_up:
            attach.join(options.name, options.address)
        else:
            config = config_of(options)
            _must_have_use(manifest, name, config)
            spare = mounted_bytes(manifest, options.nodes)
            start.up(config, name=options.name, nodes=options.nodes, say=console.print, mounted_bytes=spare)
        restoring = Restoring(options.name, repository, name, manifest, console)
        restoring.mount(options.namespace, options.world)
        filled = restoring.fill(rate, stopped)
        if options.json:
            print(json.dumps(restoring.figures(filled)))
    return 1 if filled.damaged else 0


def add_restore_option(command: argparse.ArgumentParser) -> None:
    """`up --restore`."""
    text = "begin with the latest checkpoint at URL: its blocks are hits at once, and come nearer in the background, the hottest first"
    command.add_argument("--restore", metavar="URL", help=text)


@contextmanager
def warm(url: str | None, cluster: str, nodes: int, config: Config, console: Console) -> Iterator[int]:
    """Start a cluster inside of this, with as many bytes of lower tiers more in mind, and it begins with the checkpoint at `url`.

    The manifest is read first, so that a wrong URL starts nothing. Should the nodes not take it, the cluster is up all the same.
    """
    if url is None:
        yield 0
        return
    with _repository(url) as repository:
        name, manifest = _read(repository, None, console)
        _must_have_use(manifest, name, config)
        yield mounted_bytes(manifest, nodes)
        try:
            restoring = Restoring(cluster, repository, name, manifest, console)
            restoring.mount([], None)
            restoring.begin_to_fill()
        except TieredKVError as error:
            console.print(f"[bold yellow]warning[/]: the cluster begins without the checkpoint: {error}", highlight=False, soft_wrap=True)


def _must_have_use(manifest: "Manifest", name: str, config: Config) -> None:
    from tiered_kv.ops.restore import chosen

    picked = chosen(manifest, block_tokens=config.block_tokens)
    if not picked.rows:
        why = "; ".join(picked.skipped) or "it has no blocks"
        raise TieredKVError(Kind.MODEL, f"checkpoint {name}: nothing in it could be restored: {why}", setting="block_tokens")


def mounted_bytes(manifest: "Manifest", nodes: int) -> int:
    """For how many bytes more each node's index must have slots, so that it can show its share of the checkpoint."""
    return int(MOUNTED_SPARE * len(manifest.rows) * INDEX_BYTES_A_BLOCK / nodes)


class Restoring:
    """One checkpoint on its way into a cluster whose Ray this process has joined."""

    def __init__(self, cluster: str, repository: "Repository", name: str, manifest: "Manifest", console: Console) -> None:
        from tiered_kv.cluster.start import describe

        about = describe(cluster)
        self._repository, self._name, self._manifest, self._console = repository, name, manifest, console
        self._nodes = [node["node"] for node in about["nodes"]]
        self._config: Config = about["config"]
        self._ask = _asking(cluster)
        self._skipped: list[str] = []
        self._planned: Planned | None = None
        self._mounted = self._no_room = 0

    def mount(self, namespaces: list[str], world: int | None) -> None:
        """Make the blocks hits; says what is left out."""
        from tiered_kv.ops.reshard import plan
        from tiered_kv.ops.restore import chosen, matches, mount

        def wanted(model: "Model") -> bool:
            return not namespaces or matches(model, namespaces)

        picked = chosen(self._manifest, block_tokens=self._config.block_tokens, wanted=wanted)
        rows, self._skipped = picked.rows, picked.skipped
        if world is not None and rows:
            self._planned = plan(rows, self._manifest.models, world)
            rows, self._skipped = self._planned.unchanged, self._skipped + self._planned.skipped
        for line in self._skipped:
            _say(self._console, line)
        if not picked.rows:
            raise TieredKVError(Kind.MODEL, f"checkpoint {self._name}: there is nothing in it that could be restored here")
        if not rows:
            return
        begun_s = time.monotonic()
        mounted = mount(self._ask, self._nodes, self._repository.store.url, self._manifest, rows)
        self._mounted, self._no_room = sum(mounted.by_node.values()), mounted.no_room
        spread = ", ".join(f"{node} {count:,}" for node, count in mounted.by_node.items())
        took = f"{time.monotonic() - begun_s:.2f} s"
        _say(self._console, f"checkpoint {self._name}: {self._mounted:,} blocks are hits from now on ({spread}; {took})")
        if mounted.no_room:
            _say(self._console, f"{mounted.no_room:,} blocks, the coldest, are left out: the nodes' indexes have no slots for them")

    def begin_to_fill(self) -> None:
        """Have the nodes bring blocks nearer, in the background."""
        from tiered_kv.ops.nodes import answers

        answers(self._ask, self._nodes, "fill", None)
        _say(self._console, "host memory and disk are being filled in the background; `tiered-kv status` shows how far it is")

    def fill(self, max_rate: float | None, stopped: Event) -> "Filled":
        """Have the nodes bring blocks nearer, and make those of other ranks; waits for it."""
        from tiered_kv.ops.restore import fill, make

        filled = None
        all_bytes = sum(row.stored_bytes for row in self._manifest.rows)
        with _bar(self._console, "reading") as advance:

            def progress(going: "Filled") -> None:
                advance(going.nbytes, all_bytes, f"{going.host + going.disk:,} blocks")

            if self._mounted:
                filled = fill(self._ask, self._nodes, max_rate=max_rate, progress=progress, stopped=stopped)
                self._report("restored", filled, "stay in the checkpoint's packs")
            if self._planned and self._planned.targets:
                url = self._repository.store.url
                made = make(
                    *(self._ask, self._nodes, url, self._manifest, self._planned), max_rate=max_rate, progress=progress, stopped=stopped
                )
                self._report("made of other ranks' blocks", made, "found no room")
                filled = made if filled is None else _sum(filled, made)
        return filled

    def _report(self, doing: str, filled: "Filled", rest: str) -> None:
        left = filled.mounted - filled.host - filled.disk - filled.damaged
        _say(self._console, f"{doing}: {filled.host:,} blocks to host memory, {filled.disk:,} to disk; {left:,} {rest}")
        for line in filled.problems:
            self._console.print(f"[yellow]damaged[/]: {line}", highlight=False, soft_wrap=True)
        if filled.damaged:
            _say(self._console, f"{filled.damaged:,} blocks are damaged and were left out; all others are restored")

    def figures(self, filled: "Filled") -> dict:
        """For scripts."""
        record = filled._asdict() | {"name": self._name, "skipped": self._skipped, "no_room": self._no_room}
        del record["error"], record["is_done"]
        return record


def _sum(one: "Filled", other: "Filled") -> "Filled":
    counts = (getattr(one, name) + getattr(other, name) for name in ("mounted", "host", "disk", "nbytes", "damaged", "problems"))
    return type(one)(*counts, is_done=True)


# Looking


def _add_verify(commands: Any) -> None:
    text = "Read everything that checkpoints at a URL consist of, and say what is damaged or missing. Exit status 1 if anything is."
    command = add_command(commands, "verify", text, "tiered-kv verify s3://bucket/kv", _verify)
    command.add_argument("url", metavar="URL", help=PLACES)
    command.add_argument("--checkpoint", metavar="NAME", help="only this one (default: all)")
    command.add_argument("--json", action="store_true", help="print the problems as JSON")


def _verify(options: argparse.Namespace, console: Console) -> int:
    with _repository(options.url) as repository:
        names = [options.checkpoint] if options.checkpoint else None
        with _bar(console, "verifying") as advance:
            problems = repository.verify(names, progress=lambda done, total: advance(done, total, ""))
        count = len(names or repository.names())
    for problem in problems:
        console.print(f"[red]damaged[/]: {problem.message}", highlight=False, soft_wrap=True)
    _say(console, f"{count} checkpoints at {options.url}: {len(problems) or 'no'} problems")
    if problems:
        _say(console, "delete a pack that is damaged, and the next checkpoint writes those of its blocks that are in the cache again")
    if options.json:
        print(json.dumps({"checkpoints": count, "problems": [problem._asdict() for problem in problems]}))
    return 1 if problems else 0


def _add_list(commands: Any) -> None:
    text = "List the checkpoints at a URL: age, blocks, bytes, how much each shares with others, and whose blocks they are."
    command = add_command(commands, "checkpoints", text, "tiered-kv checkpoints s3://bucket/kv", _list)
    command.add_argument("url", metavar="URL", help=PLACES)
    command.add_argument("--json", action="store_true", help="print the list as JSON")


def _list(options: argparse.Namespace, console: Console) -> int:
    from tiered_kv.ops.restore import title

    with _repository(options.url) as repository:
        listed = repository.overview()
    if options.json:
        print(json.dumps([{**each._asdict(), "models": [_model_record(model) for model in each.models]} for each in listed], indent=1))
        return 0
    if not listed:
        _say(console, f"there are no checkpoints at {options.url}")
        return 0
    table = Table(title=f"checkpoints at {options.url}")
    for column, justify in (
        ("name", "left"),
        ("age", "right"),
        ("blocks", "right"),
        ("bytes", "right"),
        ("shared", "right"),
        ("of", "left"),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for each in listed:
        if each.error:
            table.add_row(each.name, "", "", "", "", f"[red]cannot be used[/]: {each.error}")
            continue
        shared = f"{format_size(each.shared_bytes)} of {format_size(each.pack_bytes)}"
        whose = "\n".join(title(model) for model in each.models)
        table.add_row(each.name, _age(time.time() - each.created_s), f"{each.blocks:,}", format_size(each.bytes), shared, whose)
    console.print(table)
    return 0


def _model_record(model: "Model") -> dict:
    return {
        "root": model.root.hex(),
        "name": model.name,
        "layout": asdict(model.layout) if model.layout else None,
        "namespace": model.namespace,
    }


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds, 0):.0f} s"


# What the commands share


def _repository(url: str) -> "AbstractContextManager[Repository]":
    from tiered_kv.ops.repository import open_repository

    return open_repository(url if "://" in url else str(Path(url).expanduser().absolute()))


def _asking(cluster: str) -> "Ask":
    from tiered_kv.cluster.asking import asking

    ask = asking(cluster, ANSWER_WITHIN_S)
    return lambda nodes, step, *arguments: ask(nodes, "checkpoint", step, *arguments)


def _read(repository: "Repository", name: str | None, console: Console) -> "tuple[str, Manifest]":
    if name is None:
        chosen, manifest = repository.read_latest(lambda line: console.print(f"[bold yellow]warning[/]: {line}", soft_wrap=True))
    else:
        chosen, manifest = name, repository.read(name)
    made = datetime.fromtimestamp(manifest.created_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    nbytes = format_size(sum(row.stored_bytes for row in manifest.rows))
    _say(console, f"checkpoint {chosen} of {made}, from {manifest.origin or 'nobody knows where'}: {len(manifest.rows):,} blocks, {nbytes}")
    return chosen, manifest


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _tiers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    known = {tier.label: int(tier) for tier in Tier}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise TieredKVError(Kind.CONFIG, f"--tiers: {name!r} is none of {', '.join(known)}", setting="tiers")
    return tuple(known[name] for name in names)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not found or not float(found[1]) > 0:
        raise TieredKVError(Kind.CONFIG, f"--every: {text!r} is no time; write for example 30s, 10m or 1h", setting="every")
    return float(found[1]) * _SECONDS[found[2] or "s"]


def _rate(text: str | None) -> float | None:
    if text is None:
        return None
    rate = parse_size(text, "--max-rate")
    if rate < 1:
        raise TieredKVError(Kind.CONFIG, f"--max-rate: must be at least 1 byte a second, got {text}", setting="max-rate")
    return float(rate)


@contextmanager
def _bar(console: Console, doing: str) -> Iterator[Callable[[float, float, str], None]]:
    """Progress of bytes: a bar on a terminal, elsewhere a line now and then."""
    if not console.is_terminal:
        last_s = [time.monotonic()]

        def tell(done: float, total: float, words: str) -> None:
            if time.monotonic() - last_s[0] >= SAY_EVERY_S:
                last_s[0] = time.monotonic()
                _say(console, f"{doing}: {words + ', ' if words else ''}{format_size(done)} of {format_size(total)}")

        yield tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda done, total, words: progress.update(task, completed=done, total=total, description=f"{doing} {words}")
