"""Checkpoints of named tenants, and of raised weight epochs: where they are hits, and where they must not be."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.unit.checkpoint.test_restore import TREE, assert_all_hit, calls_to, client_of, restored, store, take
from tests.unit.serving.prompts import NAMESPACE, tokens_of
from tiered_kv.checkpoint.repository import Repository, open_repository
from tiered_kv.checkpoint.restore import mount
from tiered_kv.config import Config
from tiered_kv.embedded import InProcessCluster

ACME = replace(NAMESPACE, tenant="acme")
SECRET = b"a secret that two clusters have."
PATHS = TREE[:4]


@contextmanager
def cluster_with(secret: bytes = SECRET):
    with InProcessCluster(Config(host="4MiB", store_wait_ms=10_000), 1, secret=secret) as cluster:
        yield cluster


@pytest.fixture
def repository(tmp_path):
    with open_repository(str(tmp_path / "checkpoints")) as opened:
        yield opened


def hits(cluster: InProcessCluster, namespace) -> int:
    with client_of(cluster, "n0", namespace=namespace) as client:
        return sum(client.fetch(tokens_of(path, client.layout)).tokens for path in PATHS)


@pytest.mark.parametrize(("secret", "is_hit"), [(SECRET, True), (b"another secret, of one cluster..", False), (b"", False)])
def test_a_named_tenants_checkpoint_is_hit_with_the_same_secret_only(repository: Repository, secret: bytes, is_hit: bool) -> None:
    with cluster_with() as cluster:
        for namespace in (NAMESPACE, ACME):
            store(cluster, "n0", PATHS, namespace=namespace)
        take(cluster, repository)
    with cluster_with(secret) as cluster:
        restored(cluster, repository, repository.read())
        assert_all_hit(cluster, "n0", PATHS)  # the default tenant's blocks are shared everywhere
        assert bool(hits(cluster, ACME)) == is_hit
        if is_hit:
            assert_all_hit(cluster, "n0", PATHS, namespace=ACME)


def test_a_checkpoint_brings_its_epoch_to_a_new_cluster(repository: Repository) -> None:
    with cluster_with() as cluster:
        with client_of(cluster, "n0") as client:
            number = client.new_epoch()
        store(cluster, "n0", PATHS)
        take(cluster, repository)
    with cluster_with() as cluster, client_of(cluster, "n0") as early:
        assert early.namespace.weight_epoch == 0
        restored(cluster, repository, repository.read())
        assert early.namespace.weight_epoch == number, "a worker that was there before follows"
        assert_all_hit(cluster, "n0", PATHS)


def test_a_checkpoint_of_before_an_epoch_is_not_hit_after_it(repository: Repository) -> None:
    with cluster_with() as cluster:
        store(cluster, "n0", PATHS)
        take(cluster, repository)
        manifest = repository.read()
        with client_of(cluster, "n0") as client:
            client.new_epoch()
        mounted = mount(calls_to(cluster), ["n0"], repository.store.url, manifest, manifest.rows)
        assert mounted.by_node == {"n0": 0}
        assert not cluster.nodes["n0"].engine.machine.blocks
        assert hits(cluster, NAMESPACE) == 0


def test_an_epoch_that_is_raised_while_a_checkpoint_is_mounted_ends_its_blocks(repository: Repository) -> None:
    with cluster_with() as cluster:
        store(cluster, "n0", PATHS)
        take(cluster, repository)
    with cluster_with() as cluster, client_of(cluster, "n0") as client:
        manifest = repository.read()
        mount(calls_to(cluster), ["n0"], repository.store.url, manifest, manifest.rows)
        node = cluster.nodes["n0"]
        assert node.storage.mounted.used_bytes
        client.new_epoch()
        assert not node.engine.machine.blocks
        assert not node.storage.mounted.used_bytes
        assert hits(cluster, NAMESPACE) == 0
