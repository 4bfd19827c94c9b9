"""Checkpoints of models with an opaque layout: taken, verified and restored as others, but never for another world."""

from contextlib import closing
from dataclasses import asdict, replace

import pytest
import torch

from tests.unit.checkpoint.test_restore import TREE, WHOLE, assert_all_hit, client_of, cluster_of, restored, take
from tests.unit.checkpoint.test_restore import store as store_kv
from tests.unit.serving.opaque_blocks import OPAQUE, fetch, store
from tests.unit.serving.prompts import NAMESPACE
from tiered_kv import BaseKVCache, CachePersistence, KVCacheConfig, KVLayout, OpaqueLayout
from tiered_kv.checkpoint import load_local
from tiered_kv.checkpoint.manifest import Manifest
from tiered_kv.checkpoint.repository import Repository, open_repository
from tiered_kv.checkpoint.reshard_plan import plan
from tiered_kv.checkpoint.restore import select
from tiered_kv.cluster.commands import checkpoints, restoring
from tiered_kv.codecs import is_lossy
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects.folder_store import FolderStore

ROOT = NAMESPACE.root(OPAQUE)
OTHER = replace(OPAQUE, description="other pages")
COUNT = len({path[:end] for path in TREE for end in range(1, len(path) + 1)})


@pytest.fixture
def repository(tmp_path):
    with open_repository(str(tmp_path / "checkpoints")) as opened:
        yield opened


def assert_all_there(cluster, node: str) -> None:
    """Assert that all opaque blocks of the tree are hits, bit for bit, and that an engine with other pages hits none."""
    with client_of(cluster, node, OPAQUE) as client:
        for path in TREE:
            assert sum(fetch(client, path).values()) == len(path)
    with client_of(cluster, node, OTHER) as client:
        assert fetch(client, TREE[0]) == {}


def two_models(repository: Repository, quality: str = "exact") -> Manifest:
    """A checkpoint of two nodes that have blocks of an opaque layout and of a `KVLayout`."""
    with cluster_of(2, quality=quality) as cluster:
        for node, paths in (("n0", TREE[:6]), ("n1", TREE[4:])):
            with client_of(cluster, node, OPAQUE) as client:
                store(client, *paths)
            store_kv(cluster, node, paths)
        cluster.report_all()
        assert take(cluster, repository).left == 0
    return repository.read()


@pytest.mark.parametrize("nodes", [1, 2])
def test_opaque_blocks_are_restored_beside_others(repository, nodes: int) -> None:
    manifest = two_models(repository)
    assert repository.verify() == []
    assert len(manifest.rows) == 2 * COUNT
    by_root = {model.root: model for model in manifest.models}
    assert (by_root[ROOT].layout, by_root[ROOT].namespace) == (OPAQUE, NAMESPACE.as_fields())
    assert by_root[NAMESPACE.root(WHOLE)].layout == WHOLE
    with cluster_of(nodes) as cluster:
        assert restored(cluster, repository, manifest).host == 2 * COUNT
        for number in range(nodes):
            assert_all_there(cluster, f"n{number}")
            assert_all_hit(cluster, f"n{number}")
        for node in cluster.nodes.values():
            node.check()


def test_a_quality_with_an_error_writes_opaque_blocks_without_one(repository) -> None:
    with cluster_of(1, quality="compact", host="1MiB", disk="8MiB") as cluster:
        with client_of(cluster, "n0", OPAQUE) as client:
            store(client, *TREE)
            cluster.nodes["n0"].engine.settle()
        take(cluster, repository)
    manifest = repository.read()
    assert not any(is_lossy(row.codec) for row in manifest.rows)
    assert sum(row.stored_bytes for row in manifest.rows) < sum(row.raw_bytes for row in manifest.rows)
    for quality in ("exact", "compact"):
        with cluster_of(1, quality=quality) as cluster:
            assert restored(cluster, repository, manifest).host == COUNT
            assert_all_there(cluster, "n0")


def test_a_restored_cluster_that_no_worker_has_met_describes_the_layout_again(repository, tmp_path) -> None:
    manifest = two_models(repository)
    with open_repository(str(tmp_path / "elsewhere")) as elsewhere:
        with cluster_of(1, quality="near_exact") as cluster:
            restored(cluster, repository, manifest)
            take(cluster, elsewhere)
        assert sorted(elsewhere.read().models) == sorted(manifest.models)


def test_opaque_blocks_are_selected_whatever_the_clusters_block_size_is(repository) -> None:
    manifest = two_models(repository)
    assert OPAQUE.block_tokens not in (WHOLE.block_tokens, 32)
    assert len(select(manifest, block_tokens=WHOLE.block_tokens).rows) == 2 * COUNT
    picked = select(manifest, block_tokens=32)
    assert {row.root for row in picked.rows} == {ROOT}
    assert len(picked.skipped) == 1
    restoring.must_have_use(manifest, "name", Config(block_tokens=32))
    only_open = manifest._replace(rows=tuple(row for row in manifest.rows if row.root != ROOT))
    with pytest.raises(TieredKVError, match=f"--block-tokens {WHOLE.block_tokens} would fit"):
        restoring.must_have_use(only_open, "name", Config(block_tokens=32))


def test_an_opaque_model_is_not_restored_for_another_world(repository) -> None:
    manifest = two_models(repository)
    planned = plan(manifest.rows, manifest.models, 2)
    assert {target.root for target in planned.targets} == {
        replace(NAMESPACE, rank=rank, world=2).root(replace(WHOLE, kv_heads=2)) for rank in range(2)
    }
    (why,) = planned.skipped
    assert "blocks of an opaque layout cannot be split" in why
    assert f"blocks left out: {COUNT}" in why
    same = plan(manifest.rows, manifest.models, 1)
    assert (len(same.unchanged), same.targets, same.skipped) == (2 * COUNT, [], [])


def test_ranks_of_an_opaque_model_are_restored_in_their_own_world(repository) -> None:
    ranks = [replace(NAMESPACE, rank=rank, world=2) for rank in range(2)]
    with cluster_of(2) as cluster:
        for rank, namespace in enumerate(ranks):
            with client_of(cluster, f"n{rank}", OPAQUE, namespace) as client:
                store(client, *TREE[:3], engine=str(rank))
        take(cluster, repository)
    manifest = repository.read()
    planned = plan(manifest.rows, manifest.models, 2)
    assert planned.skipped == []
    with pytest.raises(TieredKVError, match=r"no block of the checkpoint can be restored for 4 ranks: .* of an opaque layout") as caught:
        plan(manifest.rows, manifest.models, 4)
    assert caught.value.kind is Kind.LAYOUT
    with cluster_of(1) as cluster:
        restored(cluster, repository, manifest, planned.unchanged)
        for rank, namespace in enumerate(ranks):
            with client_of(cluster, "n0", OPAQUE, namespace) as client:
                for path in TREE[:3]:
                    assert sum(fetch(client, path, engine=str(rank)).values()) == len(path)


def test_a_node_in_one_process_loads_opaque_blocks(repository) -> None:
    two_models(repository)
    manifest = load_local.read(repository.store, repository.latest())
    with cluster_of(1) as cluster:
        assert load_local.load(cluster.nodes["n0"], repository.store, manifest, {ROOT}) == (COUNT, 0)
        assert_all_there(cluster, "n0")


def test_a_library_cache_leaves_opaque_blocks_out(tmp_path, caplog) -> None:
    """Even one whose own layout is not known yet."""
    folder = tmp_path / "place"
    with closing(BaseKVCache(KVCacheConfig(max_tokens=4096, cache_strategy="lru"))) as cache:
        layout = KVLayout(2, 4, 16, "float32", cache.config.block_tokens)
        cache.store(range(128), torch.randn(layout.kv_shape(128)))
        CachePersistence(folder).save_cache(cache, "own.tkv")
    here = FolderStore(folder)
    own = Manifest.read(here, "own.tkv")
    opaque = own.models[0]._replace(layout=OpaqueLayout(layout.block_bytes, layout.block_tokens, "pages"), name="engine")
    own._replace(models=(opaque,)).write(here, "opaque.tkv")
    with closing(BaseKVCache(KVCacheConfig(max_tokens=4096, cache_strategy="lru"))) as cache:
        with pytest.raises(TieredKVError, match="an order that only their engine knows") as caught:
            CachePersistence(folder).load_cache(cache, "opaque.tkv")
        assert caught.value.kind is Kind.MODEL


def test_the_record_of_a_model_has_the_fields_of_its_layout(repository) -> None:
    records = [checkpoints._model_record(model) for model in two_models(repository).models]
    assert sorted((record["layout"] for record in records), key=len) == [asdict(OPAQUE), asdict(WHOLE)]
