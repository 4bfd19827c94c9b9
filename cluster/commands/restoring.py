"""Restores a checkpoint into a cluster: a running cluster, or one that starts with the checkpoint."""

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tiered_kv.cluster.commands.progress import bar, count, print_line
from tiered_kv.config import Config, format_size
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

if TYPE_CHECKING:
    from tiered_kv.checkpoint.call_nodes import CallNodes
    from tiered_kv.checkpoint.manifest import Manifest, Model
    from tiered_kv.checkpoint.repository import Repository
    from tiered_kv.checkpoint.reshard_plan import ReshardPlan
    from tiered_kv.node.checkpoints.steps import CheckpointRequest, LoadProgress, StepAnswer

ANSWER_WITHIN_S = 120.0
INDEX_BYTES_A_BLOCK = 64 << 10
"""The index has one slot per this many bytes of lower tiers."""
MOUNTED_SPARE = 1.3  # index slots per node, relative to an even share of the checkpoint


def opened(url: str, must_exist: bool = False) -> "AbstractContextManager[Repository]":
    """Open the repository of checkpoints at a URL. Returns a context manager.

    A missing folder is created, or is an error with `must_exist`.
    """
    from tiered_kv.checkpoint.repository import open_repository

    return open_repository(url, create=not must_exist)


def calls_to_nodes(cluster: str) -> "CallNodes":
    """Returns a function that sends a step of writing or restoring a checkpoint to several nodes at once."""
    from tiered_kv.cluster.node_calls import calls_to

    ask = calls_to(cluster, ANSWER_WITHIN_S)

    def call(nodes: Iterable[str], request: "CheckpointRequest[StepAnswer]") -> "dict[str, StepAnswer | TieredKVError]":
        return ask(nodes, "checkpoint", request)  # `NodeActor.checkpoint`

    return call


def must_be_there(repository: "Repository", name: str) -> None:
    """Raise (kind `storage`) unless a checkpoint of this name exists. The error lists the existing checkpoints."""
    if "/" in name or not repository.is_there(name):
        known = ", ".join(repository.names()) or "none"
        raise TieredKVError(Kind.STORAGE, f"--checkpoint: there is no {name!r} at {repository.store.url}; there are: {known}", missing=True)


def read(repository: "Repository", name: str | None, console: Console) -> "tuple[str, Manifest]":
    """Read the manifest of the checkpoint `name`, or of the latest one if None, and print a description.

    Returns the checkpoint's name and its manifest.
    """
    if name is None:
        chosen, manifest = repository.read_latest(
            lambda line: console.print(f"[bold yellow]warning[/]: {line}", highlight=False, soft_wrap=True)
        )
    else:
        must_be_there(repository, name)
        chosen, manifest = name, repository.read(name)
    made = datetime.fromtimestamp(manifest.created_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
    nbytes = format_size(sum(row.stored_bytes for row in manifest.rows))
    whose = f", from cluster {manifest.origin}" if manifest.origin else ""
    print_line(console, f"checkpoint {chosen} of {made}{whose}: {count(len(manifest.rows), 'block')}, {nbytes}")
    return chosen, manifest


@contextmanager
def warm(url: str | None, cluster: str, nodes: int, config: Config, console: Console) -> Iterator[int]:
    """Restore the checkpoint at `url` into the cluster that the caller starts inside this context.

    Yields `mounted_bytes` for `start.up`, or 0 if `url` is None. The manifest is read first, so that a wrong URL starts
    no cluster. If the nodes cannot restore the checkpoint, a warning is printed and the cluster stays up without it.
    """
    if url is None:
        yield 0
        return
    with opened(url, must_exist=True) as repository:
        name, manifest = read(repository, None, console)
        must_have_use(manifest, name, config)
        yield mounted_bytes(manifest, nodes)
        try:
            restoring = Restoring(cluster, repository, name, manifest, console)
            restoring.mount([], None)
            restoring.begin_to_load()
        except TieredKVError as error:
            console.print(f"[bold yellow]warning[/]: the cluster starts without the checkpoint: {error}", highlight=False, soft_wrap=True)


def must_have_use(manifest: "Manifest", name: str, config: Config) -> None:
    """Raise (kind `model`) if no block of a checkpoint could be a hit under these settings."""
    from tiered_kv.checkpoint.restore import select

    picked = select(manifest, block_tokens=config.block_tokens)
    if not picked.rows:
        why = "; ".join(picked.skipped) or "it has no blocks"
        sizes = {model.layout.block_tokens for model in manifest.models if isinstance(model.layout, KVLayout)}
        flag = f"; --block-tokens {sizes.pop()} would fit" if len(sizes) == 1 and config.block_tokens not in sizes else ""
        raise TieredKVError(Kind.MODEL, f"checkpoint {name}: none of its blocks can be restored: {why}{flag}", setting="block_tokens")


def mounted_bytes(manifest: "Manifest", nodes: int) -> int:
    """Returns `mounted_bytes` for `start.up`: each node's index is sized as if its lower tiers were larger by this many bytes.

    The index has one slot per `INDEX_BYTES_A_BLOCK` bytes of lower tiers. With the additional slots, the index has room for the
    node's share of the checkpoint.
    """
    return int(MOUNTED_SPARE * len(manifest.rows) * INDEX_BYTES_A_BLOCK / nodes)


class Restoring:
    """Restores one checkpoint into a cluster whose Ray this process has joined."""

    def __init__(self, cluster: str, repository: "Repository", name: str, manifest: "Manifest", console: Console) -> None:
        from tiered_kv.cluster.start import describe

        about = describe(cluster)
        self._repository, self._name, self._manifest, self._console = repository, name, manifest, console
        self._nodes = [node["node"] for node in about["nodes"]]
        self._config: Config = about["config"]
        self._call = calls_to_nodes(cluster)
        self._skipped: list[str] = []
        self._plan: ReshardPlan | None = None
        self._mounted = self._no_room = self._too_lossy = 0

    def mount(self, namespaces: list[str], world: int | None) -> None:
        """Mount the checkpoint's blocks, so that they are hits, and print which blocks are left out.

        `namespaces`: restore only these, or all if empty. `world`: the number of tensor-parallel ranks to restore for,
        or None for the blocks as they are. Raises `TieredKVError` (kind `model`) if no block can be restored.
        """
        from tiered_kv.checkpoint.reshard_plan import plan
        from tiered_kv.checkpoint.restore import matches, mount, select

        def wanted(model: "Model") -> bool:
            return not namespaces or matches(model, namespaces)

        picked = select(self._manifest, block_tokens=self._config.block_tokens, wanted=wanted)
        rows, self._skipped = picked.rows, picked.skipped
        if world is not None and rows:
            self._plan = plan(rows, self._manifest.models, world)
            rows, self._skipped = self._plan.unchanged, self._skipped + self._plan.skipped
        for line in self._skipped:
            print_line(self._console, line)
        if not picked.rows:
            raise TieredKVError(Kind.MODEL, f"checkpoint {self._name}: none of its blocks can be restored into this cluster")
        if not rows:
            return
        begun_s = time.monotonic()
        mounted = mount(self._call, self._nodes, self._repository.store.url, self._manifest, rows)
        self._mounted, self._no_room, self._too_lossy = sum(mounted.by_node.values()), mounted.no_room, mounted.too_lossy
        spread = ", ".join(f"{node} {blocks:,}" for node, blocks in mounted.by_node.items())
        print_line(self._console, f"{count(self._mounted, 'block')} are hits from now on ({spread}; {time.monotonic() - begun_s:.2f} s)")
        if mounted.no_room:
            text = f"the coldest {count(mounted.no_room, 'block')} are left out: the nodes' indexes have no free slots"
            print_line(self._console, text)
        if mounted.too_lossy:
            text = f"{count(mounted.too_lossy, 'block')} are not shown: they carry more error than this cluster's quality allows"
            print_line(self._console, text)

    def begin_to_load(self) -> None:
        """Make the nodes copy the mounted blocks to host memory and disk in the background. Returns at once."""
        from tiered_kv.checkpoint.call_nodes import call_all
        from tiered_kv.node.checkpoints.steps import LoadRequest

        call_all(self._call, self._nodes, LoadRequest())
        print_line(self._console, "blocks are copied to host memory and disk in the background; `tiered-kv status` shows the progress")

    def load(self, max_rate: float | None, stopped: Event) -> "LoadProgress":
        """Make the nodes copy the mounted blocks to host memory and disk, and convert blocks of another number of ranks.

        Waits until the nodes are done or `stopped` is set. `max_rate`: bytes per second, None for no limit. Returns the counts.
        """
        from tiered_kv.checkpoint.restore import load, reshard, total_of
        from tiered_kv.node.checkpoints.steps import LoadProgress

        loaded = LoadProgress(0, 0, 0, 0, 0, [], is_done=True)
        all_bytes = sum(row.stored_bytes for row in self._manifest.rows)
        with bar(self._console, "reading") as advance:

            def progress(going: "LoadProgress") -> None:
                advance(going.nbytes, all_bytes, count(going.host + going.disk, "block"))

            if self._mounted:
                mounted = load(self._call, self._nodes, max_rate=max_rate, progress=progress, stopped=stopped)
                self._report("restored", mounted, "were in the cache already, or are read from the checkpoint's packs on demand")
                loaded = total_of([loaded, mounted])
            if self._plan and self._plan.targets:
                url = self._repository.store.url
                built = reshard(
                    *(self._call, self._nodes, url, self._manifest, self._plan), max_rate=max_rate, progress=progress, stopped=stopped
                )
                self._report("converted from other ranks' blocks", built, "were in the cache already, or there was no room for them")
                loaded = total_of([loaded, built])
        return loaded

    def _report(self, doing: str, loaded: "LoadProgress", rest: str) -> None:
        left = loaded.mounted - loaded.host - loaded.disk - loaded.damaged
        others = f"; the other {left:,} {rest}" if left else ""
        print_line(self._console, f"{doing}: {count(loaded.host, 'block')} to host memory, {loaded.disk:,} to disk{others}")
        for line in loaded.problems:
            self._console.print(f"[yellow]damaged[/]: {line}", highlight=False, soft_wrap=True)
        if loaded.damaged:
            print_line(self._console, f"{count(loaded.damaged, 'block')} damaged and left out; all others are restored")

    def figures(self, loaded: "LoadProgress") -> dict[str, Any]:
        """Returns the counts as a dict for `--json`."""
        record = loaded._asdict() | {"name": self._name, "skipped": self._skipped, "no_room": self._no_room}
        record["too_lossy"] = max(self._too_lossy, loaded.too_lossy)
        del record["error"], record["is_done"]
        return record
