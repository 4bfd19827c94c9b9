"""Weight epochs: once `new_epoch` has returned, no block of the former weights can be had from any tier of any node."""

import threading
from dataclasses import replace

import pytest
import torch

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import Stored, Tier
from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.messages import NodeStats
from tiered_kv.store import events as ev

LARGE = KVLayout(2, 2, 16, "float32", 64)
"""Blocks of 32 KiB: 30 fill the arena of a 1 MiB host tier."""
T = LAYOUT.block_tokens
PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)


@pytest.fixture
def make_cluster(checked):
    def make(nodes: int = 2, **settings: object) -> InProcessCluster:
        return checked(InProcessCluster(Config.of({"host": "1MiB", "heartbeat_s": 1000.0, **settings}), nodes))

    return make


@pytest.fixture
def cluster(make_cluster) -> InProcessCluster:
    return make_cluster()


@pytest.fixture
def clients(cluster, checked):
    return [checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes]


def check_nodes(cluster: InProcessCluster) -> None:
    for node in cluster.nodes.values():
        node.engine.settle()
        node.engine.drain_touches()
        node.check()
        assert not node.engine.machine.endings


def blocks_of(cluster: InProcessCluster) -> int:
    return sum(len(node.engine.machine.blocks) for node in cluster.nodes.values())


def stats_of(cluster: InProcessCluster, node: str = "n0") -> NodeStats:
    return cluster.nodes[node].stats()


# All nodes and tiers


def test_no_node_has_a_block_of_the_former_weights(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    assert there.fetch(TOKENS).tokens == len(TOKENS)
    number = there.new_epoch()
    assert blocks_of(cluster) == 0
    assert [client.fetch(TOKENS).tokens for client in clients] == [0, 0]
    assert [client.match(TOKENS).tokens for client in clients] == [0, 0]
    assert [client.namespace.weight_epoch for client in clients] == [number, number]
    cluster.report_all()
    assert here.store(TOKENS, KV) == Stored(4, 0, 0)
    cluster.report_all()
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 4, "blocks of the new weights are shared as ever"
    assert there.new_epoch() > number
    assert here.fetch(TOKENS).tokens == 0
    check_nodes(cluster)


def test_blocks_in_every_tier_are_dropped(make_cluster, checked, tmp_path) -> None:
    cluster = make_cluster(1, device="1MiB:cpu", disk="2MiB", disk_segment="256KiB", objects=str(tmp_path / "objects"))
    client = checked(cluster.client("n0", LARGE, NAMESPACE))
    node = cluster.nodes["n0"]
    paths = [(turn, 1, 2) for turn in range(60)]
    for path in paths:
        client.store(tokens_of(path, LARGE), kv_of(path, LARGE))
        client.fetch(tokens_of(path, LARGE))
        node.engine.drain_touches()
        node.engine.settle()
    by_tier = node.engine.machine.blocks_by_tier
    assert all(by_tier[tier] for tier in (Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.OBJECTS)), by_tier
    client.new_epoch()
    assert not any(by_tier.values())
    assert node.engine.machine.counts["ended"] > 60
    assert not any(client.fetch(tokens_of(path, LARGE)).tokens for path in paths)
    client.store(tokens_of(paths[0], LARGE), kv_of(paths[0], LARGE))
    assert assert_is_prefix(client.fetch(tokens_of(paths[0], LARGE)), paths[0], LARGE) == 3
    check_nodes(cluster)


def test_other_models_and_tenants_keep_their_blocks(cluster, checked) -> None:
    ours = [replace(NAMESPACE, rank=1, world=2), replace(NAMESPACE, epoch=7), replace(NAMESPACE, variant="v"), NAMESPACE]
    others = [replace(NAMESPACE, tenant="other"), replace(NAMESPACE, weights="others")]
    clients = [checked(cluster.client("n0", LAYOUT, namespace)) for namespace in [*ours, *others]]
    for client in clients:
        client.store(TOKENS, KV)
    clients[0].new_epoch()
    assert [client.fetch(TOKENS).tokens // T for client in clients] == [0, 0, 0, 0, 4, 4]
    check_nodes(cluster)


def test_a_kept_epoch_is_unreachable_but_not_dropped(cluster, clients) -> None:
    here, there = clients
    before = here.namespace
    here.store(TOKENS, KV)
    number = there.new_epoch(keep=True)
    assert blocks_of(cluster) == 4
    assert here.fetch(TOKENS).tokens == 0
    assert here.store(TOKENS, KV) == Stored(4, 0, 0)
    assert here.fetch(TOKENS, namespace=before).tokens == len(TOKENS), "who asks for the former epoch by name gets it"
    assert there.new_epoch() > number
    assert blocks_of(cluster) == 0, "a later epoch ends the kept one too"
    check_nodes(cluster)


def test_a_callers_number_moves_one_client_only(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    assert here.new_epoch(7) == 7
    assert here.fetch(TOKENS).tokens == 0
    cluster.report_all()
    assert there.fetch(TOKENS).tokens == len(TOKENS)
    assert here.new_epoch(0) == 0
    assert here.fetch(TOKENS).tokens == len(TOKENS)


# What is under way


def test_a_fetch_that_is_under_way_returns_nothing_old(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    source = here._source
    read = source.read

    def slow(*arguments):
        done = read(*arguments)
        there.new_epoch()
        return done

    source.read = slow
    assert here.fetch(TOKENS).tokens == 0
    assert here.stats()["client"]["hit_blocks"] == 0


def test_a_raise_for_another_model_costs_a_fetch_nothing(cluster, clients, checked) -> None:
    here, _ = clients
    here.store(TOKENS, KV)
    other = checked(cluster.client("n1", LAYOUT, replace(NAMESPACE, weights="others")))
    read = here._source.read

    def slow(*arguments):
        done = read(*arguments)
        other.new_epoch()
        return done

    here._source.read = slow
    calls = here.node_calls
    assert here.fetch(TOKENS).tokens == len(TOKENS)
    assert here.fetch(TOKENS).tokens == len(TOKENS)
    assert here.node_calls == calls, "a worker notices an epoch without a call"


@pytest.mark.parametrize("keep", [False, True])
def test_a_store_that_is_under_way_stores_nothing_for_the_new_weights(cluster, clients, keep) -> None:
    here, there = clients
    write = here._writer.write_packed

    def slow(session, root, keys, missing, parent, wait_s, pack):
        def packed(*arguments):
            there.new_epoch(keep=keep)
            return pack(*arguments)

        return write(session, root, keys, missing, parent, wait_s, packed)

    here._writer.write_packed = slow
    stored = here.store(TOKENS, KV)
    assert stored == (Stored(4, 0, 0) if keep else Stored(0, 0, 4))
    assert blocks_of(cluster) == (4 if keep else 0)
    cluster.report_all()
    assert [client.fetch(TOKENS).tokens for client in clients] == [0, 0]
    check_nodes(cluster)


def test_kv_computed_before_the_raise_is_not_stored_for_the_new_weights(cluster, clients) -> None:
    here, there = clients
    before = here.namespace
    there.new_epoch()
    assert here.store(TOKENS, KV, namespace=before) == Stored(0, 0, 4)
    assert here.fetch(TOKENS).tokens == 0


def test_a_pull_that_is_under_way_brings_nothing_back(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    link = cluster.nodes["n1"]._puller._link
    request = link.request

    def slow(*arguments):
        transfer = request(*arguments)  # the peer's frames have arrived
        here.new_epoch()
        return transfer

    link.request = slow
    assert there.fetch(TOKENS).tokens == 0
    assert blocks_of(cluster) == 0
    check_nodes(cluster)


def test_a_block_that_is_being_read_is_hidden_now_and_freed_later(cluster, clients) -> None:
    here, _ = clients
    here.store(TOKENS, KV)
    node = cluster.nodes["n0"]
    used_bytes = node.storage.host.used_bytes
    with node.serving(list(node.engine.machine.blocks)) as frames:
        before = [bytes(piece) for frame in frames for piece in frame]
        here.new_epoch()
        assert not node.engine.machine.blocks
        assert node.storage.host.used_bytes == used_bytes, "its bytes must not be given to another block"
        here.store(TOKENS, torch.zeros_like(KV))
        assert [bytes(piece) for frame in frames for piece in frame] == before
    node.engine.settle()
    assert node.storage.host.used_bytes == used_bytes
    check_nodes(cluster)


def test_a_block_that_is_being_copied_is_hidden_now_and_freed_later(make_cluster, checked) -> None:
    cluster = make_cluster(1, disk="4MiB")
    client = checked(cluster.client("n0", LARGE, NAMESPACE))
    node = cluster.nodes["n0"]
    may_write, append = threading.Event(), node.storage.append
    node.storage.append = lambda *arguments: may_write.wait(30) and append(*arguments)
    paths = [(turn, 1, 2) for turn in range(9)]
    for path in paths:
        client.store(tokens_of(path, LARGE), kv_of(path, LARGE))
    key = next(iter(node.engine.machine.blocks))
    node.engine.handle([ev.Needed(Tier.HOST, 4 * LARGE.block_bytes)])
    assert any(block.copying_to is Tier.DISK for block in node.engine.machine.blocks.values())
    client.new_epoch()
    assert key not in node.engine.machine.blocks
    assert not node.engine.machine.blocks
    may_write.set()
    check_nodes(cluster)
    assert node.storage.host.used_bytes == 0
    assert not node.engine.machine.blocks


# Nodes that cannot be reached


def test_a_node_that_does_not_answer_is_named_and_told_later(cluster, clients) -> None:
    here, there = clients
    there.store(TOKENS, KV)
    cluster.unreachable.add("n1")
    with pytest.raises(TieredKVError, match="n1") as caught:
        here.new_epoch()
    assert caught.value.kind is Kind.CLUSTER
    assert caught.value.context["nodes"] == ["n1"]
    assert here.namespace.weight_epoch == caught.value.context["epoch"]
    assert there.fetch(TOKENS).tokens == len(TOKENS), "it does not know yet: that is what the error says"
    cluster.unreachable.clear()
    cluster.report_all()
    assert there.fetch(TOKENS).tokens == 0
    assert blocks_of(cluster) == 0
    assert here.new_epoch() > caught.value.context["epoch"]


def test_nothing_changes_while_the_coordinator_does_not_answer(cluster, clients) -> None:
    here, _ = clients
    here.store(TOKENS, KV)
    cluster.unreachable.add("coordinator")
    with pytest.raises(TieredKVError) as caught:
        here.new_epoch()
    assert caught.value.kind is Kind.TRANSPORT
    assert here.fetch(TOKENS).tokens == len(TOKENS)


def test_a_restarted_coordinator_learns_the_epochs_again(cluster, clients) -> None:
    here, there = clients
    cluster.unreachable.add("n1")
    with pytest.raises(TieredKVError):
        here.new_epoch()
    there.store(TOKENS, KV)
    cluster.unreachable.clear()
    cluster.coordinator = Coordinator(cluster._clock, 5.0)
    cluster.report_all()
    cluster.report_all()
    assert there.namespace.weight_epoch == here.namespace.weight_epoch
    assert there.fetch(TOKENS).tokens == 0


def test_a_restarted_node_knows_its_epochs_and_shows_nothing_old(cluster, clients) -> None:
    here, _ = clients
    number = here.new_epoch()
    here.store(TOKENS, KV)
    cluster.unreachable.add("coordinator")
    cluster.nodes["n0"].close(remove=False)
    cluster.start_node("n0")
    assert here.namespace.weight_epoch == number
    assert here.fetch(TOKENS).tokens == len(TOKENS)
    old = cluster.client("n0", LAYOUT, NAMESPACE)
    assert old.namespace.weight_epoch == number
    old.close()


def test_a_node_that_was_down_while_the_epoch_was_raised_shows_nothing_old(cluster, clients) -> None:
    here, there = clients
    there.store(TOKENS, KV)
    cluster.nodes["n1"].close(remove=False)
    cluster.unreachable.add("n1")
    with pytest.raises(TieredKVError):
        here.new_epoch()
    cluster.unreachable.clear()
    cluster.start_node("n1")
    assert there.fetch(TOKENS).tokens == 0
    assert blocks_of(cluster) == 0


def test_a_node_without_memory_of_an_epoch_learns_it_from_a_worker(cluster, clients) -> None:
    here, _ = clients
    number = here.new_epoch()
    node = cluster.nodes["n0"]
    node.close()
    cluster.coordinator = Coordinator(cluster._clock, 5.0)
    cluster.unreachable.add("n1")
    cluster.start_node("n0")
    assert cluster.nodes["n0"].epochs.everything() == []
    assert here.namespace.weight_epoch == number, "a worker's epoch never goes back"
    assert here.store(TOKENS, KV) == Stored(4, 0, 0)
    assert [each.number for each in cluster.nodes["n0"].epochs.everything()] == [number]
    assert stats_of(cluster)["namespaces"][0]["epoch"] == number


def test_a_folder_on_disk_keeps_the_epoch(tmp_path) -> None:
    import tiered_kv

    config = {"host": "1MiB", "disk": "8MiB", "disk_path": str(tmp_path / "disk")}
    paths = [(turn, 1, 2) for turn in range(12)]
    number = 0
    for life in range(3):
        with tiered_kv.open(config, layout=LARGE, namespace=NAMESPACE) as client:
            assert client.namespace.weight_epoch == number
            hits = [client.fetch(tokens_of(path, LARGE)).tokens for path in paths]
            assert any(hits) == (life == 1), "blocks of the ended epoch are still in the segments, and never shown"
            for path in paths:
                client.store(tokens_of(path, LARGE), kv_of(path, LARGE))
            if life == 1:
                number = client.new_epoch()
