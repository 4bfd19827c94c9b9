"""The plan for another world: every block that can be built is planned, no other one, with a reason for each left out."""

from dataclasses import asdict, replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv import KVLayout, Namespace, OpaqueLayout
from tiered_kv.checkpoint.reshard_plan import plan
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import as_token_ids

HEADS = 12
WHOLE = KVLayout(2, HEADS, 4, "float16", 2)
OPAQUE = OpaqueLayout(4096, 2, "pages of a test")
NAMESPACE = Namespace(weights="made up for the tests of plans")
IDS = as_token_ids(range(8))
WORLDS = [1, 2, 3, 4, 6, 12]


class Row(NamedTuple):
    key: bytes
    parent: bytes | None
    root: bytes
    depth: int | None
    raw_bytes: int
    hits: int = 0


class Model(NamedTuple):
    root: bytes
    layout: KVLayout | OpaqueLayout | None
    name: str
    namespace: dict | None


def rank_of(rank: int, world: int, namespace: Namespace = NAMESPACE) -> tuple[Namespace, KVLayout]:
    return replace(namespace, rank=rank, world=world), replace(WHOLE, kv_heads=HEADS // world)


def model_of(rank: int, world: int, namespace: Namespace = NAMESPACE) -> Model:
    ours, layout = rank_of(rank, world, namespace)
    return Model(ours.root(layout), layout, "tiny", ours.as_fields())


def rows_of(rank: int, world: int, ids=IDS, namespace: Namespace = NAMESPACE, hits: int = 0) -> list[Row]:
    """Returns the rows of a rank for one prompt."""
    ours, layout = rank_of(rank, world, namespace)
    keys = ours.chain(layout).keys(as_token_ids(ids))
    parents = [None, *keys]
    return [Row(key, parents[at], ours.root(layout), at, layout.block_bytes, hits) for at, key in enumerate(keys)]


def keys_of(rank: int, world: int, ids=IDS) -> list[bytes]:
    return [row.key for row in rows_of(rank, world, ids)]


def world_of(world: int) -> tuple[list[Row], list[Model]]:
    return [row for rank in range(world) for row in rows_of(rank, world)], [model_of(rank, world) for rank in range(world)]


def refusal(match: str):
    return pytest.raises(TieredKVError, match=match, check=lambda error: error.kind is Kind.LAYOUT)


@given(st.sampled_from(WORLDS), st.sampled_from(WORLDS))
def test_every_block_of_every_rank_of_another_world_is_planned(world, target):
    rows, models = world_of(world)
    planned = plan(rows, models, target)
    assert planned.skipped == []
    assert sorted(planned.models) == sorted(model_of(rank, target) for rank in range(target))
    if world == target:
        assert (planned.unchanged, planned.targets) == (rows, [])
        return
    assert planned.unchanged == []
    assert {row.key for row in planned.targets} == {key for rank in range(target) for key in keys_of(rank, target)}
    by_key = {row.key: row for rank in range(target) for row in rows_of(rank, target)}
    for each in planned.targets:
        wanted = by_key[each.key]
        assert (each.parent, each.root, each.depth, each.raw_bytes) == (wanted.parent, wanted.root, wanted.depth, wanted.raw_bytes)
        assert [source.key for source in each.sources] == [keys_of(piece.source, world)[each.depth] for piece in each.pieces]
        assert sum(piece.heads for piece in each.pieces) == HEADS // target


def test_planned_blocks_are_in_the_order_of_the_rows_and_after_their_parents():
    hot, cold = range(100, 108), range(8)
    rows = [
        row for ids, hits in ((hot, 9), (cold, 1)) for at in range(4) for rank in (1, 0) for row in [rows_of(rank, 2, ids, hits=hits)[at]]
    ]
    planned = plan(rows, world_of(2)[1], 1)
    assert [each.key for each in planned.targets] == keys_of(0, 1, hot) + keys_of(0, 1, cold)
    assert [each.hits for each in planned.targets] == [9] * 4 + [1] * 4


def test_a_block_has_the_hits_of_the_most_used_rank():
    planned = plan(rows_of(0, 2, hits=3) + rows_of(1, 2, hits=5), world_of(2)[1], 1)
    assert {each.hits for each in planned.targets} == {5}


def test_a_chain_ends_where_a_rank_lacks_a_block():
    rows = rows_of(0, 2) + [row for row in rows_of(1, 2) if row.depth != 1]
    planned = plan(rows, world_of(2)[1], 1)
    assert [each.key for each in planned.targets] == keys_of(0, 1)[:1]
    assert planned.skipped == ["tiny: a source block or the parent is not in the checkpoint (blocks left out: 3)"]


def test_ranks_that_do_not_need_the_missing_one_are_planned():
    rows = [row for rank in (0, 1, 3) for row in rows_of(rank, 4)]
    planned = plan(rows, world_of(4)[1], 2)
    assert [each.key for each in planned.targets] == keys_of(0, 2)
    assert [model.root for model in planned.models] == [model_of(0, 2).root]
    assert len(planned.skipped) == 1


def test_a_rank_that_no_model_names_is_missing():
    with refusal("a source block or the parent is not in the checkpoint"):
        plan(rows_of(0, 2), [model_of(0, 2)], 1)


def test_blocks_of_several_worlds_are_planned_once_and_complete_each_other():
    short = rows_of(0, 2)[:2] + rows_of(1, 2)[:2]
    models = world_of(2)[1] + world_of(4)[1]
    planned = plan(short + world_of(4)[0], models, 1)
    assert [each.key for each in planned.targets] == keys_of(0, 1)
    assert [len(each.sources) for each in planned.targets] == [2, 2, 4, 4]
    assert planned.skipped == []


def test_blocks_of_the_requested_world_are_unchanged_and_not_built_again():
    there = rows_of(0, 1)[:2]
    planned = plan(there + world_of(2)[0], [model_of(0, 1), *world_of(2)[1]], 1)
    assert planned.unchanged == there
    assert [each.key for each in planned.targets] == keys_of(0, 1)[2:]
    assert planned.models == [model_of(0, 1)]


def test_other_models_are_not_mixed():
    other = replace(NAMESPACE, tenant="b")
    rows, models = rows_of(0, 2) + rows_of(1, 2, namespace=other), [model_of(0, 2), model_of(1, 2, other)]
    with refusal("a source block or the parent is not in the checkpoint"):
        plan(rows, models, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(namespace=None), "the checkpoint does not describe its namespace"),
        (dict(namespace={"weight": "w"}), "the checkpoint does not describe its namespace"),
        (dict(namespace={"weights": ""}), "must be a non-empty text"),
        (dict(layout=None), "unknown layout cannot be split"),
        (dict(layout=OPAQUE), "opaque layout cannot be split"),
        (dict(namespace=asdict(replace(NAMESPACE, tenant="b", world=2))), "do not match the root of its blocks"),
        (dict(layout=replace(WHOLE, head_dim=8)), "do not match the root of its blocks"),
    ],
)
def test_models_that_cannot_be_split_are_left_out_with_the_reason(changes, reason):
    models = [model._replace(**changes) for model in world_of(2)[1]]
    with refusal(reason):
        plan(world_of(2)[0], models, 1)
    others = replace(NAMESPACE, tenant="c")
    planned = plan(world_of(2)[0] + rows_of(0, 3, namespace=others), [*models, model_of(0, 3, others)], 12)
    assert len(planned.targets) == 16
    assert any(f"tiny: {reason}" in said or reason in said for said in planned.skipped)


def test_a_world_that_cannot_share_the_heads_is_refused():
    with refusal(r"tiny: 12 KV heads cannot be divided evenly among 5 ranks \(blocks left out: 8\)"):
        plan(*world_of(2), 5)
    for world in (0, -1, 2.0, True, None):
        with refusal("world: must be a whole number of at least 1"):
            plan(*world_of(2), world)


@pytest.mark.parametrize("layout", [None, OPAQUE])
def test_a_model_of_an_unknown_or_opaque_layout_is_unchanged_in_its_own_world(layout):
    models = [model._replace(layout=layout) for model in world_of(2)[1]]
    planned = plan(world_of(2)[0], models, 2)
    assert (planned.unchanged, planned.skipped) == (world_of(2)[0], [])


def test_an_opaque_model_is_left_out_beside_one_that_is_resharded():
    ranks = [replace(NAMESPACE, tenant="engine", rank=rank, world=2) for rank in range(2)]
    opaque = [Model(rank.root(OPAQUE), OPAQUE, "engine", asdict(rank)) for rank in ranks]
    rows = [Row(rank.chain(OPAQUE).keys(IDS)[0], None, rank.root(OPAQUE), 0, 4096) for rank in ranks]
    planned = plan(rows + world_of(2)[0], opaque + world_of(2)[1], 1)
    assert [each.key for each in planned.targets] == keys_of(0, 1)
    why = "blocks of an opaque layout cannot be split: the positions of their heads are unknown"
    assert planned.skipped == [f"engine: {why} (blocks left out: 2)"]


def test_rows_without_a_model_and_of_another_size_are_left_out():
    rows = world_of(2)[0]
    with refusal("of a model that the checkpoint does not describe"):
        plan(rows, [], 1)
    with refusal("the size of a block differs from its layout"):
        plan([row._replace(raw_bytes=row.raw_bytes + 1) for row in rows], world_of(2)[1], 1)


def test_nothing_is_planned_for_a_checkpoint_without_blocks():
    assert plan([], world_of(2)[1], 5) == ([], [], [], [])
