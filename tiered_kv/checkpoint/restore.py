"""Restores checkpoints: each node mounts a share of the blocks, which makes them hits at once, and then loads the hottest of them."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from threading import Event
from typing import Any, NamedTuple, Protocol, TypeVar

from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.checkpoint.call_nodes import CallNodes, call_all
from tiered_kv.checkpoint.manifest import Manifest, Model
from tiered_kv.checkpoint.manifest_rows import Row
from tiered_kv.checkpoint.reshard_plan import ReshardPlan, Target
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.layout import KVLayout
from tiered_kv.node.checkpoints.reshard import ReshardedBlock
from tiered_kv.node.checkpoints.steps import (
    LoadCapacity,
    LoadCapacityRequest,
    LoadProgress,
    LoadProgressRequest,
    LoadRequest,
    MountRequest,
    ReshardRequest,
    StopLoadingRequest,
)
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.tiers.objects.credentials import credentials
from tiered_kv.tiers.objects.mounted import MountedBlock

UNEVEN = 1.1
"""The blocks of a chain are assigned to one node until that node has this multiple of its share of the bytes."""
POLL_S = 0.1


class Selection(NamedTuple):
    """The blocks of a checkpoint to restore, in the checkpoint's order. skipped: one sentence for each model that is left out."""

    rows: list[Row]
    skipped: list[str]


class MountResult(NamedTuple):
    """The counts of a mount.

    by_node: the number of mounted blocks of each node; these are hits from now on. no_room: blocks left out because the indexes are
    full. too_lossy: blocks left out because their error is larger than the cluster's settings allow.
    """

    by_node: dict[str, int]
    no_room: int
    too_lossy: int = 0


def select(manifest: Manifest, *, block_tokens: int | None = None, wanted: Callable[[Model], bool] = lambda _: True) -> Selection:
    """Select the models to restore. Returns their blocks, and the reasons for leaving out the other models.

    A model is selected if `wanted(model)` is true and its blocks have `block_tokens` tokens (None: any number). For a model of an
    opaque layout `block_tokens` is ignored, because its engine chooses the size of its blocks.
    """
    skipped: list[str] = []
    roots: set[BlockKey] = set()
    counts = Counter(row.root for row in manifest.rows)
    for model in manifest.models:
        count = counts[model.root]
        if not wanted(model):
            skipped.append(f"{title(model)}: {count:,} blocks are not restored, because this namespace was not requested")
        elif block_tokens is not None and isinstance(model.layout, KVLayout) and model.layout.block_tokens != block_tokens:
            why = f"its blocks have {model.layout.block_tokens} tokens, but this cluster's have {block_tokens}"
            skipped.append(f"{title(model)}: {count:,} blocks are not restored, because they could never be hits: {why}")
        else:
            roots.add(model.root)
    return Selection([row for row in manifest.rows if row.root in roots], skipped)


def title(model: Model) -> str:
    """Returns a readable name of a model: its name or weights, its tenant and rank where it has them, and the start of its root."""
    facts = model.namespace or {}
    weights = str(facts.get("weights", ""))
    parts = [model.name or (weights[:12] if len(weights) == 64 else weights)]
    if facts.get("tenant", "default") != "default":
        parts.append(f"tenant {facts['tenant']}")
    if facts.get("world", 1) != 1:
        parts.append(f"rank {facts['rank']} of {facts['world']}")
    return " ".join(["namespace", *filter(None, parts), f"({model.root.hex()[:12]})"])


def matches(model: Model, wanted: Iterable[str]) -> bool:
    """Returns whether one of the texts in `wanted` matches a model.

    A text matches if it is the model's tenant, or if the model's name, its weights or its root in hex start with it.
    """
    facts = model.namespace or {}
    names = [model.root.hex(), str(facts.get("weights", "")), model.name]
    return any(text and (text == facts.get("tenant") or any(name.startswith(text) for name in names)) for text in wanted)


class ChainBlock(Protocol):
    """A block to assign to a node: a row of a manifest to mount, or a resharded block to build."""

    @property
    def key(self) -> BlockKey:
        """The block's key."""

    @property
    def parent(self) -> BlockKey | None:
        """The key of the block's parent, or None for the first block of a chain."""


B = TypeVar("B", bound=ChainBlock)


def assign_nodes(
    blocks: Sequence[B], capacities: Mapping[str, LoadCapacity], size: Callable[[B], int] = attrgetter("stored_bytes")
) -> dict[str, list[B]]:
    """Assign blocks to nodes in proportion to the room in their host memory and on disk. Returns the blocks of each node, in order.

    The blocks of one chain are assigned to one node where possible. `size`: returns the bytes of a block.
    """
    weights = {node: capacity.host_bytes + capacity.disk_bytes for node, capacity in capacities.items()}
    if not any(weights.values()):
        weights = dict.fromkeys(capacities, 1)
    total_weight, total_bytes = sum(weights.values()), sum(map(size, blocks))
    most = {node: UNEVEN * total_bytes * weight / total_weight for node, weight in weights.items()}
    load = dict.fromkeys(capacities, 0)
    shares: dict[str, list[B]] = {node: [] for node in capacities}
    node_of: dict[BlockKey, str] = {}
    for block in blocks:
        node = node_of.get(block.parent) if block.parent is not None else None
        if node is None or load[node] + size(block) > most[node]:
            node = min((each for each in capacities if weights[each]), key=lambda each: load[each] / weights[each])
        node_of[block.key] = node
        load[node] += size(block)
        shares[node].append(block)
    return shares


def mount(call: CallNodes, nodes: Sequence[str], url: str, manifest: Manifest, rows: Sequence[Row]) -> MountResult:
    """Mount these blocks of a checkpoint on the nodes, which makes them hits. Returns the counts. Raises the first error of a node."""
    shares = assign_nodes(rows, call_all(call, nodes, LoadCapacityRequest()))
    by_node: dict[str, int] = {}
    models = _descriptions(manifest.models)
    for node, mine in shares.items():
        names, numbers = _packs_of(manifest, mine)
        blocks = [_mounted(row, numbers[row.pack]) for row in mine]
        by_node[node] = call_all(call, [node], MountRequest(url, names, blocks, models, credentials(url)))[node]
    too_lossy = load_progress(call, list(shares)).too_lossy
    return MountResult(by_node, len(rows) - sum(by_node.values()) - too_lossy, too_lossy)


def reshard(
    call: CallNodes,
    nodes: Sequence[str],
    url: str,
    manifest: Manifest,
    plan: ReshardPlan,
    *,
    max_rate: float | None = None,
    progress: Callable[[LoadProgress], None] = lambda _: None,
    stopped: Event | None = None,
    poll_s: float = POLL_S,
) -> LoadProgress:
    """Make the nodes build the blocks of a plan, and wait until they are built. Returns the counts.

    `max_rate`: the limit in bytes per second for all nodes together, or None. Raises the errors of `wait_until_loaded`.
    """
    shares = assign_nodes(plan.targets, call_all(call, nodes, LoadCapacityRequest()), attrgetter("raw_bytes"))
    for node, targets in shares.items():
        names, numbers = _packs_of(manifest, [row for target in targets for row in target.sources])
        blocks = _resharded(manifest, targets, numbers)
        rate = max_rate and max_rate / len(nodes)
        call_all(call, [node], ReshardRequest(url, names, blocks, rate, _descriptions(plan.models), credentials(url)))
    return wait_until_loaded(call, nodes, progress=progress, stopped=stopped, poll_s=poll_s)


def _resharded(manifest: Manifest, targets: Iterable[Target], numbers: Mapping[int, int]) -> list[ReshardedBlock]:
    layouts = {model.root: model.layout for model in manifest.models if isinstance(model.layout, KVLayout)}
    return [
        ReshardedBlock(
            BlockInfo(target.key, target.parent, target.root, target.depth or 0),
            target.hits + 1,
            target.raw_bytes,
            tuple(_mounted(row, numbers[row.pack]) for row in target.sources),
            target.pieces,
            layouts[target.sources[0].root],
        )
        for target in targets
    ]


def _descriptions(models: Iterable[Model]) -> dict[BlockKey, dict[str, Any]]:
    """Returns the descriptions of the models, by root. The next checkpoint needs them, and nodes without workers do not have them yet."""
    return {
        model.root: ModelInfo(model.layout, (model.namespace or {}).get("weights", model.name), namespace=model.namespace).as_message()
        for model in models
        if model.layout is not None
    }


def _packs_of(manifest: Manifest, rows: Sequence[Row]) -> tuple[list[str], dict[int, int]]:
    """Returns the names of the packs that contain the rows, and a table from a pack's number in the manifest to its index in this list."""
    numbers = {pack: number for number, pack in enumerate(dict.fromkeys(row.pack for row in rows))}
    return [manifest.packs[pack][0] for pack in numbers], numbers


def _mounted(row: Row, segment: int) -> MountedBlock:
    location = Location(Tier.CHECKPOINT, row.codec, segment, row.offset, row.stored_bytes, row.raw_bytes)
    return MountedBlock(row.info, location, row.hits + 1)


def load(
    call: CallNodes,
    nodes: Sequence[str],
    *,
    max_rate: float | None = None,
    progress: Callable[[LoadProgress], None] = lambda _: None,
    stopped: Event | None = None,
    poll_s: float = POLL_S,
) -> LoadProgress:
    """Make the nodes load their mounted blocks, and wait until they have done so. Returns the counts.

    `max_rate`: the limit in bytes per second for all nodes together, or None. Raises the errors of `wait_until_loaded`.
    """
    call_all(call, nodes, LoadRequest(max_rate and max_rate / len(nodes)))
    return wait_until_loaded(call, nodes, progress=progress, stopped=stopped, poll_s=poll_s)


def wait_until_loaded(
    call: CallNodes,
    nodes: Sequence[str],
    *,
    progress: Callable[[LoadProgress], None] = lambda _: None,
    stopped: Event | None = None,
    poll_s: float = POLL_S,
) -> LoadProgress:
    """Wait until nodes have loaded their blocks. Returns the counts of all nodes together.

    progress: called with the counts after each poll. stopped: an event that the caller sets to end the loading. The mounted blocks
    are still hits then. Raises the first error of a node, and (kind `storage`) if `stopped` was set.
    """
    stopped = stopped or Event()
    while True:
        total = load_progress(call, nodes)
        progress(total)
        if total.error is not None:
            raise total.error
        if total.is_done:
            return total
        if stopped.wait(poll_s):
            call(nodes, StopLoadingRequest())
            raise TieredKVError(Kind.STORAGE, "loading was stopped; the checkpoint is still mounted, and its blocks are read on demand")


def load_progress(call: CallNodes, nodes: Sequence[str]) -> LoadProgress:
    """Returns the progress of loading, for all nodes together."""
    return total_of(call_all(call, nodes, LoadProgressRequest()).values())


def total_of(several: Iterable[LoadProgress]) -> LoadProgress:
    """Combine the progress of several nodes. Returns the sums of the counts, all problems, and the first error.

    The result is done if all nodes are done.
    """
    each = list(several)
    return LoadProgress(
        mounted=sum(one.mounted for one in each),
        host=sum(one.host for one in each),
        disk=sum(one.disk for one in each),
        nbytes=sum(one.nbytes for one in each),
        damaged=sum(one.damaged for one in each),
        problems=[problem for one in each for problem in one.problems],
        is_done=all(one.is_done for one in each),
        error=next((one.error for one in each if one.error), None),
        too_lossy=sum(one.too_lossy for one in each),
    )
