"""Restoring a checkpoint: every node is given its share of the blocks, shows them at once, and brings the hottest of them nearer."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from threading import Event
from typing import Any, NamedTuple, Protocol, TypeVar

from tiered_kv.blocks import Location, Tier
from tiered_kv.checkpoint.call_nodes import answers
from tiered_kv.checkpoint.manifest import Manifest, Model, Row
from tiered_kv.checkpoint.reshard_plan import Planned
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.loader import Filled, Shelf
from tiered_kv.node.checkpoints.reshard import Made
from tiered_kv.protocol.model_info import ModelFacts
from tiered_kv.protocol.peer_transport import Ask
from tiered_kv.tiers.objects.credentials import credentials
from tiered_kv.tiers.objects.mounted import MountedBlock

UNEVEN = 1.1
"""A chain stays on one node until that has so many times its share."""


class Chosen(NamedTuple):
    """The blocks of a checkpoint that are to be restored, in its order, and what is said of those that are not."""

    rows: list[Row]
    skipped: list[str]


class Mounted(NamedTuple):
    """Blocks of a checkpoint that are hits from now on, by node; and how many of those chosen are not: they found no room in an index, or
    carry more error than the cluster's settings allow.
    """

    by_node: dict[str, int]
    no_room: int
    too_lossy: int = 0


def chosen(manifest: Manifest, *, block_tokens: int | None = None, wanted: Callable[[Model], bool] = lambda _: True) -> Chosen:
    """The blocks of the models that are `wanted`, and that a cluster with blocks of so many tokens can have any use for."""
    skipped, roots, counts = [], set(), Counter(row.root for row in manifest.rows)
    for model in manifest.models:
        count = counts[model.root]
        if not wanted(model):
            skipped.append(f"{title(model)}: {count:,} blocks are not restored, it is none of those asked for")
        elif block_tokens is not None and model.layout is not None and model.layout.block_tokens != block_tokens:
            has = f"its blocks have {model.layout.block_tokens} tokens, those of this cluster {block_tokens}"
            skipped.append(f"{title(model)}: {count:,} blocks are not restored, nobody could hit them: {has}")
        else:
            roots.add(model.root)
    return Chosen([row for row in manifest.rows if row.root in roots], skipped)


def title(model: Model) -> str:
    """What a model is called for people."""
    facts = model.namespace or {}
    weights = str(facts.get("weights", ""))
    parts = [model.name or (weights[:12] if len(weights) == 64 else weights)]
    if facts.get("tenant", "default") != "default":
        parts.append(f"tenant {facts['tenant']}")
    if facts.get("world", 1) != 1:
        parts.append(f"rank {facts['rank']} of {facts['world']}")
    return " ".join(["namespace", *filter(None, parts), f"({model.root.hex()[:12]})"])


def matches(model: Model, wanted: Iterable[str]) -> bool:
    """Whether one of these texts names a model: the beginning of its weights' name or of its root, or its tenant."""
    facts = model.namespace or {}
    names = [model.root.hex(), str(facts.get("weights", "")), model.name]
    return any(text and (text == facts.get("tenant") or any(name.startswith(text) for name in names)) for text in wanted)


class Placed(Protocol):
    """What is given to some node: a row, or a block that is to be made."""

    key: BlockKey
    parent: BlockKey | None


P = TypeVar("P", bound=Placed)


def shares(rows: Sequence[P], shelves: Mapping[str, Shelf], size: Callable[[P], int] = attrgetter("stored_bytes")) -> dict[str, list[P]]:
    """Which node gets which rows, in their order: by the room in host memory and on disk, a chain as far as may be on one node."""
    weights = {node: shelf.host_bytes + shelf.disk_bytes for node, shelf in shelves.items()}
    if not any(weights.values()):
        weights = dict.fromkeys(shelves, 1)
    total_weight, total_bytes = sum(weights.values()), sum(map(size, rows))
    most = {node: UNEVEN * total_bytes * weight / total_weight for node, weight in weights.items()}
    load = dict.fromkeys(shelves, 0)
    given: dict[str, list[P]] = {node: [] for node in shelves}
    where: dict[BlockKey, str] = {}
    for row in rows:
        node = where.get(row.parent) if row.parent is not None else None
        if node is None or load[node] + size(row) > most[node]:
            node = min((each for each in shelves if weights[each]), key=lambda each: load[each] / weights[each])
        where[row.key] = node
        load[node] += size(row)
        given[node].append(row)
    return given


def mount(ask: Ask, nodes: Sequence[str], url: str, manifest: Manifest, rows: Sequence[Row]) -> Mounted:
    """Have nodes show these rows of a manifest's packs. Raises the first error of a node."""
    given = shares(rows, answers(ask, nodes, "shelf"))
    by_node, facts = {}, _facts(manifest.models)
    for node, mine in given.items():
        names, numbers = _packs_of(manifest, mine)
        blocks = [_mounted(row, numbers[row.pack]) for row in mine]
        by_node[node] = answers(ask, [node], "mount", url, names, blocks, facts, credentials(url))[node]
    too_lossy = filled(ask, list(given)).too_lossy
    return Mounted(by_node, len(rows) - sum(by_node.values()) - too_lossy, too_lossy)


def make(
    ask: Ask, nodes: Sequence[str], url: str, manifest: Manifest, planned: Planned, *, max_rate: float | None = None, **waiting: Any
) -> Filled:
    """Have nodes make the blocks that are `planned` for ranks of another world, and wait for it as `fill` does."""
    layouts = {model.root: model.layout for model in manifest.models}
    given = shares(planned.targets, answers(ask, nodes, "shelf"), attrgetter("raw_bytes"))
    for node, targets in given.items():
        names, numbers = _packs_of(manifest, [row for target in targets for row in target.sources])
        blocks = [
            Made(
                *(target.key, target.parent, target.root, target.depth or 0, target.hits + 1, target.raw_bytes),
                tuple(_mounted(row, numbers[row.pack]) for row in target.sources),
                target.pieces,
                layouts[target.sources[0].root],
            )
            for target in targets
        ]
        answers(ask, [node], "make", url, names, blocks, max_rate and max_rate / len(nodes), _facts(planned.models), credentials(url))
    return wait(ask, nodes, **waiting)


def _facts(models: Iterable[Model]) -> dict[BlockKey, dict]:
    """What nodes shall know of models until workers attach: enough for the next checkpoint."""
    return {
        model.root: ModelFacts(model.layout, (model.namespace or {}).get("weights", model.name), namespace=model.namespace).as_message()
        for model in models
        if model.layout is not None
    }


def _packs_of(manifest: Manifest, rows: Sequence[Row]) -> tuple[list[str], dict[int, int]]:
    """The packs that rows are in: their names, and where each pack of the manifest stands among them."""
    numbers = {pack: number for number, pack in enumerate(dict.fromkeys(row.pack for row in rows))}
    return [manifest.packs[pack][0] for pack in numbers], numbers


def _mounted(row: Row, segment: int) -> MountedBlock:
    location = Location(Tier.CHECKPOINT, row.codec, segment, row.offset, row.stored_bytes, row.raw_bytes)
    return MountedBlock(row.key, row.parent, row.root, row.depth, location, row.hits + 1)


def fill(ask: Ask, nodes: Sequence[str], *, max_rate: float | None = None, **waiting: Any) -> Filled:
    """Have nodes bring what they show nearer, and `wait` for it. Raises the first error of a node."""
    answers(ask, nodes, "fill", max_rate and max_rate / len(nodes))
    return wait(ask, nodes, **waiting)


def wait(
    ask: Ask,
    nodes: Sequence[str],
    *,
    progress: Callable[[Filled], None] = lambda _: None,
    stopped: Event | None = None,
    poll_s: float = 0.1,
) -> Filled:
    """Wait until nodes have brought nearer what they were asked to; sums over the nodes. Raises the first error of a node.

    Where `stopped` is set filling ends early (kind `storage`); what is mounted stays so.
    """
    stopped = stopped or Event()
    while True:
        total = filled(ask, nodes)
        progress(total)
        if total.error is not None:
            raise total.error
        if total.is_done:
            return total
        if stopped.wait(poll_s):
            ask(nodes, "stop_filling")
            raise TieredKVError(Kind.STORAGE, "filling was stopped; the checkpoint stays mounted, its blocks are read when they are wanted")


def filled(ask: Ask, nodes: Sequence[str]) -> Filled:
    """How filling goes on all nodes."""
    each = list(answers(ask, nodes, "filled").values())
    problems = [problem for one in each for problem in one.problems]
    sums = (sum(getattr(one, name) for one in each) for name in ("mounted", "host", "disk", "nbytes", "damaged"))
    error = next((one.error for one in each if one.error), None)
    return Filled(*sums, problems, all(one.is_done for one in each), error, sum(one.too_lossy for one in each))
