"""Checkpoints of several nodes, restored on others: the same keys hit, and their content is equal."""

from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.serving.prompts import NAMESPACE, kv_of, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.checkpoint.manifest import Manifest
from tiered_kv.checkpoint.repository import Repository, open_repository
from tiered_kv.checkpoint.reshard_plan import plan
from tiered_kv.checkpoint.restore import assign_nodes, load, matches, mount, reshard, select, title
from tiered_kv.checkpoint.take import CheckpointFilter, CheckpointJob, CheckpointResult
from tiered_kv.codecs import is_lossy
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import as_token_ids
from tiered_kv.node.checkpoints.steps import CheckpointRequest, LoadCapacity, SnapshotRequest

WHOLE = KVLayout(2, 4, 16, "float32", 64)
"""Blocks of 64 KiB."""
T = WHOLE.block_tokens
TREE = [(turn, 1, 2) for turn in range(8)] + [(0, 1, 3), (0, 4), (5, 1, 2, 3, 4)]
COUNT = len({path[:end] for path in TREE for end in range(1, len(path) + 1)})


@contextmanager
def cluster_of(nodes: int, **settings):
    with InProcessCluster(Config(**{"host": "4MiB", "store_wait_ms": 10_000, **settings}), nodes) as cluster:
        yield cluster


def calls_to(cluster: InProcessCluster):
    def ask(nodes: Iterable[str], request: CheckpointRequest[Any]) -> dict[str, Any]:
        found = {}
        for node in nodes:
            try:
                found[node] = cluster.nodes[node].checkpoint(request)
            except TieredKVError as error:
                found[node] = error
        return found

    return ask


@contextmanager
def client_of(cluster: InProcessCluster, node: str, layout: KVLayout = WHOLE, namespace=NAMESPACE):
    client = cluster.client(node, layout, namespace)
    try:
        yield client
    finally:
        client.close()


def store(cluster: InProcessCluster, node: str, paths, layout: KVLayout = WHOLE, namespace=NAMESPACE, kv=kv_of) -> None:
    with client_of(cluster, node, layout, namespace) as client:
        for path in paths:
            assert client.store(tokens_of(path, layout), kv(path, layout)).refused == 0


def take(cluster: InProcessCluster, repository: Repository, wanted: CheckpointFilter | None = None, **more) -> CheckpointResult:
    job = CheckpointJob(calls_to(cluster), list(cluster.nodes), repository, origin="test", poll_s=0.002, **more)
    return job.take(wanted or CheckpointFilter())


def restored(cluster: InProcessCluster, repository: Repository, manifest: Manifest, rows=None):
    nodes = list(cluster.nodes)
    mounted = mount(calls_to(cluster), nodes, repository.store.url, manifest, manifest.rows if rows is None else rows)
    assert mounted.no_room == 0
    filled = load(calls_to(cluster), nodes, poll_s=0.002)
    cluster.report_all()
    return filled


def assert_all_hit(cluster: InProcessCluster, node: str, paths=TREE, layout: KVLayout = WHOLE, namespace=NAMESPACE, kv=kv_of) -> None:
    with client_of(cluster, node, layout, namespace) as client:
        for path in paths:
            fetched = client.fetch(tokens_of(path, layout))
            assert fetched.tokens == len(path) * layout.block_tokens, (path, fetched.tokens_by_tier)
            assert torch.equal(fetched.kv, kv(path, layout))


@pytest.fixture
def repository(tmp_path):
    with open_repository(str(tmp_path / "checkpoints")) as opened:
        yield opened


def two_nodes(repository: Repository) -> CheckpointResult:
    """A checkpoint of two nodes with a part of the tree each, and some on both."""
    with cluster_of(2) as cluster:
        store(cluster, "n0", TREE[:6])
        store(cluster, "n1", TREE[4:])
        cluster.report_all()
        with client_of(cluster, "n1") as client:
            client.fetch(tokens_of(TREE[0], WHOLE))  # by its peer
        return take(cluster, repository)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_a_checkpoint_of_two_nodes_is_all_there_on_any_number_of_nodes(repository, nodes: int) -> None:
    taken = two_nodes(repository)
    assert (taken.left, taken.orphans) == (0, 0)
    assert repository.verify() == []
    manifest = repository.read()
    assert len(manifest.rows) == taken.blocks == COUNT
    with cluster_of(nodes) as cluster:
        filled = restored(cluster, repository, manifest)
        assert (filled.host, filled.damaged) == (COUNT, 0)
        for node in cluster.nodes:
            assert_all_hit(cluster, node)
            cluster.nodes[node].check()
        again = take(cluster, repository)
        assert (again.blocks, again.written_bytes) == (COUNT, 0)
        assert repository.read().models == manifest.models


def test_a_restored_cluster_that_no_worker_has_met_can_be_kept_elsewhere(repository, tmp_path) -> None:
    two_nodes(repository)
    manifest = repository.read()
    with cluster_of(1, host="1MiB") as cluster, open_repository(str(tmp_path / "other")) as other:
        restored(cluster, repository, manifest)
        taken = take(cluster, other)
        assert taken.new_blocks == COUNT
        assert other.verify() == []
        assert other.read().models == manifest.models


def test_blocks_are_written_once_whoever_holds_them_and_only_those_that_are_new(repository) -> None:
    with cluster_of(2) as cluster:
        store(cluster, "n0", TREE)
        store(cluster, "n1", TREE)
        first = take(cluster, repository, pack_bytes=200_000)
        assert first.new_blocks == first.blocks == COUNT
        assert first.written_bytes < 1.05 * first.nbytes
        assert take(cluster, repository).written_bytes == 0
        store(cluster, "n1", [(90, 91)])
        second = take(cluster, repository)
        assert (second.blocks, second.new_blocks, second.new_packs) == (COUNT + 2, 2, 1)
        assert repository.verify() == []


def test_a_block_whose_parent_nobody_holds_is_left_out_with_all_behind_it(repository) -> None:
    with cluster_of(1) as cluster:
        node = cluster.nodes["n0"]
        store(cluster, "n0", TREE[:1])
        parent = NAMESPACE.chain(WHOLE).keys(as_token_ids(tokens_of((60, 61, 62), WHOLE)))
        with client_of(cluster, "n0") as client:
            client.store(tokens_of((60, 61, 62), WHOLE), kv_of((60, 61, 62), WHOLE, 1), start=T)
        assert parent[1] in node.engine.machine.blocks
        taken = take(cluster, repository)
        assert (taken.blocks, taken.orphans) == (3, 2)


def test_only_what_was_hit_and_only_what_lies_in_a_tier(repository, tmp_path) -> None:
    with cluster_of(1, disk=f"4MiB:{tmp_path / 'disk'}") as cluster:
        store(cluster, "n0", TREE)
        with client_of(cluster, "n0") as client:
            client.fetch(tokens_of(TREE[3], WHOLE))
        hit = take(cluster, repository, CheckpointFilter(min_hits=1))
        assert hit.blocks == 3
        assert take(cluster, repository, CheckpointFilter(tiers=(3,))).blocks == 0
        assert take(cluster, repository, CheckpointFilter(models=lambda model: matches(model, ["other"]))).blocks == 0
        assert take(cluster, repository, CheckpointFilter(models=lambda model: matches(model, [NAMESPACE.weights[:8]]))).blocks == COUNT


def test_the_hottest_are_listed_first_and_kept_where_memory_is_small(repository) -> None:
    with cluster_of(1) as cluster:
        store(cluster, "n0", TREE)
        with client_of(cluster, "n0") as client:
            for _ in range(3):
                client.fetch(tokens_of(TREE[5], WHOLE))
        take(cluster, repository)
    manifest = repository.read()
    keys = NAMESPACE.chain(WHOLE).keys(as_token_ids(tokens_of(TREE[5], WHOLE)))
    assert [row.key for row in manifest.rows[:3]] == keys
    assert manifest.rows[0].hits == 3
    with cluster_of(1, host="1MiB") as cluster:
        filled = restored(cluster, repository, manifest)
        assert 0 < filled.host < 16
        with client_of(cluster, "n0") as client:
            assert client.match(tokens_of(TREE[5], WHOLE)).tokens_by_tier == {"host": 3 * T}
        assert_all_hit(cluster, "n0")


def test_a_restart_of_the_node_keeps_what_came_nearer_and_misses_the_rest(repository) -> None:
    two_nodes(repository)
    manifest = repository.read()
    with cluster_of(1, host="1MiB") as cluster:
        filled = restored(cluster, repository, manifest)
        cluster.nodes["n0"].close(remove=False)
        node = cluster.start_node("n0")
        node.check()
        assert node.stats()["blocks"] == filled.host < COUNT


def test_a_namespace_with_other_blocks_is_skipped_and_said(repository) -> None:
    two_nodes(repository)
    manifest = repository.read()
    picked = select(manifest, block_tokens=32)
    assert picked.rows == []
    assert "64 tokens, but this cluster's have 32" in picked.skipped[0]
    assert select(manifest, block_tokens=64).skipped == []
    assert "because this namespace was not requested" in select(manifest, wanted=lambda model: matches(model, ["x"])).skipped[0]
    assert NAMESPACE.weights in title(manifest.models[0])


def test_a_stopped_checkpoint_leaves_no_manifest_and_the_next_one_writes_the_rest_only(repository) -> None:
    with cluster_of(1) as cluster:
        store(cluster, "n0", TREE)

        class Stopped:
            count = 0

            def wait(self, _: float) -> bool:
                self.count += 1
                return self.count > 30

        with pytest.raises(TieredKVError, match="stopped") as error:
            take(cluster, repository, max_rate=2e6, pack_bytes=150_000, stopped=Stopped())
        assert error.value.kind is Kind.STORAGE
        assert repository.names() == []
        there = set(repository.store.sizes())
        assert there
        taken = take(cluster, repository, pack_bytes=150_000)
        assert taken.blocks == COUNT
        assert taken.new_blocks == COUNT - 2 * len(there)
        assert there < set(repository.store.sizes())


def test_shares_keep_chains_together_and_follow_the_room() -> None:
    with cluster_of(1) as cluster:
        store(cluster, "n0", TREE)
        snapshot = cluster.nodes["n0"].checkpoint(SnapshotRequest())
    rows = sorted(snapshot.blocks, key=lambda seen: seen.depth)
    shelves = {"small": LoadCapacity(1 << 20, 0, 100), "large": LoadCapacity(2 << 20, 1 << 20, 100), "full": LoadCapacity(0, 0, 100)}
    given = assign_nodes(rows, shelves)
    assert given["full"] == []
    assert 5 <= len(given["small"]) <= 11
    assert sum(map(len, given.values())) == len(rows)
    of = {row.key: node for node, mine in given.items() for row in mine}
    apart = sum(of[row.key] != of[row.parent] for row in rows if row.parent)
    assert apart <= 2
    nowhere = assign_nodes(rows, {node: LoadCapacity(0, 0, 100) for node in "ab"})
    assert abs(len(nowhere["a"]) - len(nowhere["b"])) <= 4


# Ranks


def ranks(world: int) -> list:
    return [(replace(NAMESPACE, rank=rank, world=world), replace(WHOLE, kv_heads=4 // world)) for rank in range(world)]


def kv_of_rank(rank: int, world: int):
    heads = 4 // world
    return lambda path, _: kv_of(path, WHOLE)[:, :, rank * heads : (rank + 1) * heads]


@pytest.mark.parametrize(("world", "other"), [(1, 2), (2, 1), (2, 4), (4, 2), (1, 4), (4, 1)])
def test_blocks_of_the_ranks_of_a_world_are_restored_for_another(repository, world: int, other: int) -> None:
    with cluster_of(2) as cluster:
        for rank, (namespace, layout) in enumerate(ranks(world)):
            store(cluster, f"n{rank % 2}", TREE, layout, namespace, kv_of_rank(rank, world))
        take(cluster, repository)
    manifest = repository.read()
    planned = plan(manifest.rows, manifest.models, other)
    assert (planned.unchanged, planned.skipped) == ([], [])
    with cluster_of(2) as cluster:
        nodes = list(cluster.nodes)
        made = reshard(calls_to(cluster), nodes, repository.store.url, manifest, planned, poll_s=0.002)
        assert made.host == made.mounted == COUNT * other
        cluster.report_all()
        for rank, (namespace, layout) in enumerate(ranks(other)):
            assert_all_hit(cluster, f"n{rank % 2}", TREE, layout, namespace, kv_of_rank(rank, other))
        for node in cluster.nodes.values():
            node.check()


def test_a_damaged_source_costs_the_blocks_made_of_it_only(repository) -> None:
    with cluster_of(1) as cluster:
        store(cluster, "n0", TREE)
        take(cluster, repository)
    manifest = repository.read()
    bad = manifest.rows[-1]
    path = repository.store.folder / manifest.packs[bad.pack][0]
    content = bytearray(path.read_bytes())
    content[bad.offset + 300] ^= 4
    path.write_bytes(content)
    with cluster_of(1) as cluster:
        planned = plan(manifest.rows, manifest.models, 2)
        made = reshard(calls_to(cluster), ["n0"], repository.store.url, manifest, planned, poll_s=0.002)
        assert (made.host, made.damaged) == (2 * COUNT - 2, 2)
        assert made.problems
        cluster.nodes["n0"].check()


def test_of_several_checkpoints_the_newest_that_is_whole_is_taken(repository) -> None:
    with pytest.raises(TieredKVError, match="there is no checkpoint"):
        repository.read_latest()
    with cluster_of(1) as cluster:
        names = []
        for path in TREE[:3]:
            store(cluster, "n0", [path])
            names.append(take(cluster, repository).name)
    said: list[str] = []
    for name in reversed(names[1:]):
        assert repository.read_latest(said.append)[0] == name
        path = repository.store.folder / name
        path.write_bytes(path.read_bytes()[:-1])
    assert repository.read_latest(said.append)[0] == names[0]
    assert any(names[2] in line for line in said)
    path = repository.store.folder / names[0]
    path.write_bytes(b"")
    with pytest.raises(TieredKVError) as error:
        repository.read_latest(said.append)
    assert error.value.kind is Kind.CORRUPT


def test_a_checkpoint_of_less_quality_is_not_shown_and_its_frames_are_not_used_again(tmp_path) -> None:
    """Two clusters, of int8 and exact, write the same blocks to one place."""
    with open_repository(str(tmp_path)) as repository:
        with cluster_of(1, host="2MiB", quality="near_exact") as lossy:
            store(lossy, "n0", TREE)
            lossy.nodes["n0"].engine.settle()
            take(lossy, repository)
        manifest = Manifest.read(repository.store, repository.latest())
        worn = [row for row in manifest.rows if is_lossy(row.codec)]
        assert len(worn) > 5
        with cluster_of(2) as exact:
            mounted = mount(calls_to(exact), list(exact.nodes), repository.store.url, manifest, manifest.rows)
            assert (mounted.no_room, mounted.too_lossy) == (0, len(worn))
            load(calls_to(exact), list(exact.nodes), poll_s=0.002)
            for node in exact.nodes:
                store(exact, node, TREE)
            assert take(exact, repository).new_blocks == len(worn)
        manifest = Manifest.read(repository.store, repository.latest())
        assert len(manifest.rows) == COUNT
        assert not any(is_lossy(row.codec) for row in manifest.rows)
        with cluster_of(1) as other, client_of(other, "n0") as client:
            mounted = mount(calls_to(other), ["n0"], repository.store.url, manifest, manifest.rows)
            assert mounted == ({"n0": COUNT}, 0, 0)
            for path in TREE:
                fetched = client.fetch(tokens_of(path, WHOLE))
                assert torch.equal(fetched.kv, kv_of(path, WHOLE))
