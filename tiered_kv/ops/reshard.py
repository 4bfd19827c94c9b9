"""Which blocks of the ranks of another world can be made of a checkpoint's, and of which of its blocks each consists.

Ranks of one model in one world are a family: equal namespaces but for the rank, equal layouts. The key of a rank's block leads to the
key of the whole model's (`keys.Chain`), and from there to the key of any rank of any world; no token ids are needed.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, Chain, Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.service.resharding import Piece, pieces, resharded

if TYPE_CHECKING:
    from tiered_kv.ops.manifest import Model, Row


class Target(NamedTuple):
    """A block of a rank of the new world. `sources`: the checkpoint's block for each of the `pieces`, see `service.resharding.join`."""

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey
    depth: int | None
    hits: int
    raw_bytes: int
    sources: "tuple[Row, ...]"
    pieces: tuple[Piece, ...]


class Planned(NamedTuple):
    """What a checkpoint is for a world: blocks to be made, parents before children and the hottest first; blocks that are of that
    world already, in their order; the models of both; and in a sentence each what is left out, and why.
    """

    targets: "list[Target]"
    unchanged: "list[Row]"
    models: "list[Model]"
    skipped: list[str]


class _Rank(NamedTuple):
    """A rank of the new world, and what it consists of."""

    model: "Model"
    chain: Chain
    pieces: tuple[Piece, ...]


@dataclass(eq=False)
class _Family:
    name: str
    layout: KVLayout
    ranks: list[_Rank]


class _Member(NamedTuple):
    """A rank of a family, as it is in the checkpoint."""

    family: _Family
    rank: int
    chain: Chain


@dataclass
class _Place:
    """A family's blocks of the same tokens, by rank; its keys are those of the whole model."""

    family: _Family
    key: BlockKey
    parent: BlockKey | None = None
    rows: "dict[int, Row]" = field(default_factory=dict)


def plan(rows: "Iterable[Row]", models: "Iterable[Model]", world: int) -> Planned:
    """What of `rows` (parents before children) ranks of `world` can use, and how. Cost: some 10 µs a block.

    A block is made where all ranks that it needs have theirs and the block before it was made; else the chain ends there. What
    cannot be made is left out. Raises (kind `layout`) where that is everything.
    """
    if type(world) is not int or world < 1:
        raise TieredKVError(Kind.LAYOUT, f"world must be a whole number of at least 1, not {world!r}", world=world)
    planner = _Planner(world)
    for model in models:
        planner.know(model)
    for row in rows:
        planner.add(row)
    planned = planner.planned()
    if planned.skipped and not planned.targets and not planned.unchanged:
        message = f"nothing of the checkpoint can be restored for a world of {world}: {'; '.join(planned.skipped)}"
        raise TieredKVError(Kind.LAYOUT, message, world=world)
    return planned


class _Planner:
    """Models and rows as they come, put together to families and to places in their chains."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._kept: dict[BlockKey, Model] = {}
        self._members: dict[BlockKey, _Member] = {}
        self._refused: dict[BlockKey, str] = {}
        self._families: dict[tuple[Namespace, KVLayout], _Family] = {}
        self._places: dict[tuple[_Family, BlockKey], _Place] = {}  # in the order of the rows
        self._unchanged: list[Row] = []
        self._left_out: Counter[str] = Counter()  # blocks, by reason

    def know(self, model: "Model") -> None:
        """Find out what becomes of the blocks of a model."""
        try:
            namespace = _namespace(model)
            if namespace.world == self._world:
                self._kept[model.root] = model
            else:
                self._members[model.root] = self._member(model, namespace)
        except TieredKVError as error:
            self._refused[model.root] = f"{_name(model)}: {error}"

    def _member(self, model: "Model", namespace: Namespace) -> _Member:
        layout = resharded(model.layout, namespace.world, self._world)
        chain = namespace.chain(model.layout)
        if chain.root != model.root:
            raise TieredKVError(Kind.LAYOUT, "its namespace and layout are not those of its blocks")
        known = replace(namespace, rank=0), model.layout
        if known not in self._families:
            self._families[known] = _Family(_name(model), model.layout, self._ranks(model, namespace, layout))
        return _Member(self._families[known], namespace.rank, chain)

    def _ranks(self, model: "Model", namespace: Namespace, layout: KVLayout) -> list[_Rank]:
        ranks, heads = [], layout.kv_heads * self._world
        for rank in range(self._world):
            ours = replace(namespace, rank=rank, world=self._world)
            chain = ours.chain(layout)
            named = model._replace(root=chain.root, layout=layout, namespace=asdict(ours))
            ranks.append(_Rank(named, chain, tuple(pieces(namespace.world, self._world, heads, rank))))
        return ranks

    def add(self, row: "Row") -> None:
        """Put a row to those of other ranks at its place."""
        if row.root in self._kept:
            self._unchanged.append(row)
        elif row.root not in self._members:
            self._left_out[self._refused.get(row.root, "a model that the checkpoint does not name")] += 1
        else:
            family, rank, chain = self._members[row.root]
            if row.raw_bytes != family.layout.block_bytes:
                self._left_out[f"{family.name}: not as large as its layout says"] += 1
                return
            key = chain.whole_key(row.key)
            place = self._places.setdefault((family, key), _Place(family, key))
            place.rows[rank] = row
            if row.parent is not None:
                place.parent = chain.whole_key(row.parent)

    def planned(self) -> Planned:
        """What came, as a plan."""
        made = {row.key for row in self._unchanged}
        models = {row.root: self._kept[row.root] for row in self._unchanged}
        targets: list[Target] = []
        lacking: dict[BlockKey, str] = {}
        for place in self._places.values():
            for rank in place.family.ranks:
                target = _target(place, rank)
                if target.key in made:  # of another world's ranks, or there as it is
                    continue
                if None in target.sources or not (target.parent is None or target.parent in made):
                    lacking[target.key] = place.family.name
                    continue
                made.add(target.key)
                models[target.root] = rank.model
                targets.append(target)
        for name in (name for key, name in lacking.items() if key not in made):
            self._left_out[f"{name}: a part of them, or the block before them, is not in the checkpoint"] += 1
        skipped = [f"{reason} (blocks left out: {count})" for reason, count in self._left_out.items()]
        return Planned(targets, self._unchanged, list(models.values()), skipped)


def _target(place: _Place, rank: _Rank) -> Target:
    """The block of a rank at a place; where a rank has none that it needs, that source is None."""
    sources = tuple(place.rows.get(piece.source) for piece in rank.pieces)
    known = place.rows.values()
    return Target(
        key=rank.chain.rank_key(place.key),
        parent=None if place.parent is None else rank.chain.rank_key(place.parent),
        root=rank.chain.root,
        depth=next((row.depth for row in known if row.depth is not None), None),
        hits=max(row.hits for row in known),
        raw_bytes=rank.model.layout.block_bytes,
        sources=sources,
        pieces=rank.pieces,
    )


def _namespace(model: "Model") -> Namespace:
    try:
        return Namespace(**model.namespace)
    except TypeError as error:
        raise TieredKVError(Kind.LAYOUT, "its namespace is not known") from error


def _name(model: "Model") -> str:
    return model.name or f"model {model.root.hex()[:12]}"
