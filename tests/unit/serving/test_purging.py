"""Purges, and epochs of namespaces chosen by name: what the commands do, on nodes of one process."""

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tests.unit.serving.test_epochs import KV, LARGE, PATH, TOKENS, blocks_of, check_nodes, make_cluster  # noqa: F401
from tiered_kv import Namespace
from tiered_kv.blocks import Stored
from tiered_kv.cluster import weights
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.admission import epochs

OTHER = Namespace(weights=NAMESPACE.weights, tenant="acme")


@pytest.fixture
def cluster(make_cluster) -> InProcessCluster:  # noqa: F811
    return make_cluster()


@pytest.fixture
def clients(cluster, checked):
    return [checked(cluster.client(node, LAYOUT, namespace)) for node in cluster.nodes for namespace in (NAMESPACE, OTHER)]


def asking(cluster, silent=(), between=lambda node, method: None):
    """Returns a function that calls nodes one after the other, as `calls_to` does side by side."""

    def ask(nodes, method, *arguments):
        answers = {}
        for node in nodes:
            between(node, method)
            if node in silent:
                answers[node] = TieredKVError(Kind.TRANSPORT, "no answer")
            elif method == "stats":
                answers[node] = cluster.nodes[node].stats()
            else:
                name = {"adopt_epochs": "adopt"}.get(method, method)
                answers[node] = getattr(cluster.nodes[node].epochs, name)(*arguments)
        return answers

    return ask


def raiser(cluster, keep=False):
    return lambda families: cluster.coordinator.raise_epoch(families, keep, 1)


def test_a_purge_drops_one_namespace_on_all_nodes(cluster, clients) -> None:
    for client in clients:
        client.store(TOKENS, KV)
    change = weights.purge_on(list(cluster.nodes), asking(cluster), ["acme"])
    assert change.by_node == {"n0": 4, "n1": 4}
    assert not change.unreached
    assert [each["tenant"] for each in change.namespaces] == ["acme"]
    assert [client.fetch(TOKENS).tokens // LAYOUT.block_tokens for client in clients] == [4, 0, 4, 0]
    assert clients[1].namespace.weight_epoch == 0, "its epoch stays"
    assert clients[1].store(TOKENS, KV) == Stored(4, 0, 0)
    assert clients[1].fetch(TOKENS).tokens == len(TOKENS)
    check_nodes(cluster)


def test_no_block_comes_back_from_a_node_that_is_purged_later(cluster, clients) -> None:
    here, there = clients[0], clients[2]
    there.store(TOKENS, KV)
    cluster.report_all()
    pulled = []

    def between(node, method):
        if (node, method) == ("n1", "purge"):  # the other node has been purged, this one has not
            pulled.append(here.fetch(TOKENS).tokens)
            pulled.append(here.store(TOKENS, KV).refused)

    weights.purge_on(["n0", "n1"], asking(cluster, between=between), [NAMESPACE.weights[:8]])
    assert pulled == [0, 4]
    assert blocks_of(cluster) == 0
    assert here.store(TOKENS, KV) == Stored(4, 0, 0)


def test_a_node_that_does_not_answer_is_named(cluster, clients) -> None:
    for client in clients:
        client.store(TOKENS, KV)
    change = weights.purge_on(list(cluster.nodes), asking(cluster, silent=["n1"]), ["default"])
    assert change.unreached == {"n1": "no answer"}
    assert change.by_node["n0"] == 4


def test_a_purge_that_its_command_does_not_end_ends_by_itself(cluster, clients, monkeypatch) -> None:
    monkeypatch.setattr(epochs, "PURGE_WITHIN_S", 0.0)
    clients[0].store(TOKENS, KV)
    node = cluster.nodes["n0"]
    assert node.epochs.purge([NAMESPACE.family]) == 4
    assert clients[0].store(TOKENS, KV) == Stored(0, 0, 4)
    node.epochs.beat()
    assert clients[0].store(TOKENS, KV) == Stored(4, 0, 0)


def test_purged_blocks_do_not_come_back_from_segments_on_disk(tmp_path) -> None:
    import tiered_kv

    config = {"host": "1MiB", "disk": "8MiB", "disk_path": str(tmp_path / "disk")}
    paths = [(turn, 1, 2) for turn in range(24)]
    with tiered_kv.open(config, layout=LARGE, namespace=NAMESPACE) as client:
        node = client._on_close.__self__.node
        for path in paths:
            client.store(tokens_of(path, LARGE), kv_of(path, LARGE))
        node.engine.settle()
        assert node.storage.disk.used_bytes
        node.epochs.purge([NAMESPACE.family])
        node.epochs.end_purge([NAMESPACE.family])
    with tiered_kv.open(config, layout=LARGE, namespace=NAMESPACE) as client:
        assert not any(client.fetch(tokens_of(path, LARGE)).tokens for path in paths)
        for path in paths:
            client.store(tokens_of(path, LARGE), kv_of(path, LARGE))
    with tiered_kv.open(config, layout=LARGE, namespace=NAMESPACE) as client:
        assert any(client.fetch(tokens_of(path, LARGE)).tokens for path in paths), "what was stored after the purge stays"


def test_an_epoch_is_raised_for_chosen_namespaces_or_for_all(cluster, clients) -> None:
    for client in clients:
        client.store(TOKENS, KV)
    change = weights.raise_on(list(cluster.nodes), asking(cluster), raiser(cluster), ["acme"])
    assert [client.fetch(TOKENS).tokens // LAYOUT.block_tokens for client in clients] == [4, 0, 4, 0]
    assert clients[1].namespace.weight_epoch == change.number == 1
    every = weights.raise_on(list(cluster.nodes), asking(cluster, silent=["n1"]), raiser(cluster), [])
    assert every.number == 2
    assert every.namespaces == []
    assert list(every.unreached) == ["n1"]
    assert blocks_of(cluster) == 4
    cluster.report_all()
    assert blocks_of(cluster) == 0
    assert {client.namespace.weight_epoch for client in clients} == {2}
    assert clients[0].new_epoch() > 2
    check_nodes(cluster)


def test_a_name_that_nothing_has_is_an_error_that_lists_the_names(cluster, clients) -> None:
    for wanted in ("nobody", ""):
        with pytest.raises(TieredKVError, match=r"known are: .made up for . of tenant") as caught:
            weights.purge_on(list(cluster.nodes), asking(cluster), [wanted])
        assert caught.value.kind is Kind.CONFIG
    assert [each["family"] for each in weights.chosen(cluster.nodes["n0"].stats()["namespaces"], [OTHER.family.hex()[:10]])] == [
        OTHER.family.hex()
    ]
    assert PATH
