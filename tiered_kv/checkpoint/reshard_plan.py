"""Plans resharding: which blocks for another number of tensor-parallel ranks can be built from a checkpoint's blocks.

A world is a number of ranks. Here the ranks of one model in one world are called a family: they have equal layouts, and equal
namespaces except for the rank. The key of a rank's block determines the key of the whole model's block (`keys.ChainKeys`), which
determines the key of any rank's block in any world. So no token ids are needed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tiered_kv.checkpoint.manifest import Model
from tiered_kv.checkpoint.manifest_rows import Row
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, ChainKeys, Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.node.checkpoints.reshard_layout import Piece, opened_layout, pieces, resharded


class Target(NamedTuple):
    """A block to build for one rank of the new number of ranks.

    `pieces`: the parts of the block, each a range of KV heads. `sources`: for each piece, the checkpoint's block that contains
    it (see `node.checkpoints.reshard_layout.join`).
    """

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey
    depth: int | None
    hits: int
    raw_bytes: int
    sources: tuple[Row, ...]
    pieces: tuple[Piece, ...]


class ReshardPlan(NamedTuple):
    """The plan for restoring a checkpoint with the new number of ranks.

    targets: blocks to build, parents before children and hottest first. unchanged: the checkpoint's blocks that already have
    the new number of ranks, in the checkpoint's order. models: the models of targets and unchanged blocks. skipped: one
    sentence for each reason why blocks are left out.
    """

    targets: list[Target]
    unchanged: list[Row]
    models: list[Model]
    skipped: list[str]


class _Rank(NamedTuple):
    """A rank of the new world: its model, its layout, its keys, and the pieces of source ranks that its blocks consist of."""

    model: Model
    layout: KVLayout
    chain: ChainKeys
    pieces: tuple[Piece, ...]


@dataclass(eq=False)
class _Family:
    name: str
    layout: KVLayout
    ranks: list[_Rank]


class _RankMember(NamedTuple):
    """One rank of a model in the checkpoint: its family, its number, and its keys."""

    family: _Family
    rank: int
    chain: ChainKeys


@dataclass
class _BlockOfRanks:
    """One block of the whole model. `rows`: the checkpoint's blocks for it, by rank. `key`, `parent`: keys of the whole model."""

    family: _Family
    key: BlockKey
    parent: BlockKey | None = None
    rows: dict[int, Row] = field(default_factory=dict)


def plan(rows: Iterable[Row], models: Iterable[Model], world: int) -> ReshardPlan:
    """Plan how a model on `world` ranks can use the checkpoint's blocks. Returns the plan. `rows` must have parents before children.

    A block is built if the checkpoint has it for all source ranks, and if its parent is built or unchanged. Otherwise the block and
    its descendants are left out. Raises (kind `layout`) if all blocks are left out. Cost: about 10 µs per block.
    """
    if type(world) is not int or world < 1:
        raise TieredKVError(Kind.LAYOUT, f"world: must be a whole number of at least 1, got {world!r}", world=world)
    planner = _Planner(world)
    for model in models:
        planner.know(model)
    for row in rows:
        planner.add(row)
    planned = planner.planned()
    if planned.skipped and not planned.targets and not planned.unchanged:
        message = f"world: no block of the checkpoint can be restored for {world} ranks: {'; '.join(planned.skipped)}"
        raise TieredKVError(Kind.LAYOUT, message, world=world)
    return planned


class _Planner:
    """Collects models and rows, and groups them by family and by block of the whole model."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._kept: dict[BlockKey, Model] = {}
        self._members: dict[BlockKey, _RankMember] = {}
        self._refused: dict[BlockKey, str] = {}
        self._families: dict[tuple[Namespace, KVLayout], _Family] = {}
        self._places: dict[tuple[_Family, BlockKey], _BlockOfRanks] = {}  # in the order of the rows
        self._unchanged: list[Row] = []
        self._left_out: Counter[str] = Counter()  # number of blocks by reason

    def know(self, model: Model) -> None:
        """Add a model, and decide whether its blocks will be kept unchanged, resharded, or left out."""
        try:
            namespace = _namespace(model)
            if namespace.world == self._world:
                self._kept[model.root] = model
            else:
                self._members[model.root] = self._member(model, namespace)
        except TieredKVError as error:
            self._refused[model.root] = f"{_name(model)}: {error}"

    def _member(self, model: Model, namespace: Namespace) -> _RankMember:
        layout = opened_layout(model.layout)
        target_layout = resharded(layout, namespace.world, self._world)
        chain = namespace.chain(layout)
        if chain.root != model.root:
            raise TieredKVError(Kind.LAYOUT, "its namespace and layout do not match the root of its blocks")
        known = replace(namespace, rank=0), layout
        if known not in self._families:
            self._families[known] = _Family(_name(model), layout, self._ranks(model, namespace, target_layout))
        return _RankMember(self._families[known], namespace.rank, chain)

    def _ranks(self, model: Model, namespace: Namespace, layout: KVLayout) -> list[_Rank]:
        ranks: list[_Rank] = []
        heads = layout.kv_heads * self._world
        for rank in range(self._world):
            ours = replace(namespace, rank=rank, world=self._world)
            chain = ours.chain(layout)
            named = model._replace(root=chain.root, layout=layout, namespace=ours.as_fields())
            ranks.append(_Rank(named, layout, chain, tuple(pieces(namespace.world, self._world, heads, rank))))
        return ranks

    def add(self, row: Row) -> None:
        """Add a row. A row to reshard is grouped with the rows of other ranks for the same block of the whole model."""
        if row.root in self._kept:
            self._unchanged.append(row)
        elif row.root not in self._members:
            self._left_out[self._refused.get(row.root, "blocks of a model that the checkpoint does not describe")] += 1
        else:
            family, rank, chain = self._members[row.root]
            if row.raw_bytes != family.layout.block_bytes:
                self._left_out[f"{family.name}: the size of a block differs from its layout"] += 1
                return
            key = chain.whole_key(row.key)
            place = self._places.setdefault((family, key), _BlockOfRanks(family, key))
            place.rows[rank] = row
            if row.parent is not None:
                place.parent = chain.whole_key(row.parent)

    def planned(self) -> ReshardPlan:
        """Returns the plan for all models and all rows of the manifest (one for each block) that were added so far."""
        available = {row.key for row in self._unchanged}
        models = {row.root: self._kept[row.root] for row in self._unchanged}
        targets: list[Target] = []
        lacking: dict[BlockKey, str] = {}
        for place in self._places.values():
            for rank in place.family.ranks:
                key = rank.chain.rank_key(place.key)
                if key in available:  # already built from another world, or unchanged
                    continue
                target = _target(place, rank)
                if target is None or not (target.parent is None or target.parent in available):
                    lacking[key] = place.family.name
                    continue
                available.add(key)
                models[target.root] = rank.model
                targets.append(target)
        for name in (name for key, name in lacking.items() if key not in available):
            self._left_out[f"{name}: a source block or the parent is not in the checkpoint"] += 1
        skipped = [f"{reason} (blocks left out: {count})" for reason, count in self._left_out.items()]
        return ReshardPlan(targets, self._unchanged, list(models.values()), skipped)


def _target(place: _BlockOfRanks, rank: _Rank) -> Target | None:
    """Returns the block to build for a rank, or None if the checkpoint does not have the block for every source rank."""
    if any(piece.source not in place.rows for piece in rank.pieces):
        return None
    sources = tuple(place.rows[piece.source] for piece in rank.pieces)
    known = place.rows.values()
    return Target(
        key=rank.chain.rank_key(place.key),
        parent=None if place.parent is None else rank.chain.rank_key(place.parent),
        root=rank.chain.root,
        depth=next((row.depth for row in known if row.depth is not None), None),
        hits=max(row.hits for row in known),
        raw_bytes=rank.layout.block_bytes,
        sources=sources,
        pieces=rank.pieces,
    )


def _namespace(model: Model) -> Namespace:
    try:
        return Namespace(**(model.namespace or {}))
    except TypeError as error:
        raise TieredKVError(Kind.LAYOUT, "the checkpoint does not describe its namespace") from error


def _name(model: Model) -> str:
    return model.name or f"model {model.root.hex()[:12]}"
