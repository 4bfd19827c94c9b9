"""Nodes of one process that transfer blocks over TCP: every kind of block, by one request, and shared."""

import threading
import time
from collections.abc import Callable

import pytest

from tests.contracts.transport import wait_until
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tests.unit.serving.test_cluster import check_nodes
from tiered_kv import Config, KVLayout
from tiered_kv.embedded import InProcessCluster
from tiered_kv.node.peers import block_server
from tiered_kv.protocol.peer_channel import Channel

T = LAYOUT.block_tokens
PATH = (1, 2, 0, 1, 2, 2, 1, 0)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)


@pytest.fixture
def make_cluster(checked):
    def make(nodes: int = 2, **settings: object) -> InProcessCluster:
        config = Config.of({"host": "1MiB", "heartbeat_s": 1000.0, **settings})
        cluster = checked(InProcessCluster(config, nodes, streams=True))
        checked(cluster.coordinator)
        return cluster

    return make


@pytest.fixture
def cluster(make_cluster) -> InProcessCluster:
    return make_cluster()


@pytest.fixture
def clients(cluster, checked):
    return clients_of(cluster, checked)


def clients_of(cluster: InProcessCluster, checked: Callable, layout: KVLayout = LAYOUT) -> list:
    return [checked(cluster.client(node, layout, NAMESPACE)) for node in cluster.nodes]


def pair(cluster: InProcessCluster, node: str = "n1", peer: str = "n0") -> dict:
    return cluster.nodes[node].stats()["peers"]["peers"][peer]


def forbid_direct_calls(cluster: InProcessCluster) -> None:
    """Only streams work between nodes, and to the directory."""
    cluster.unreachable |= {*cluster.nodes, "coordinator"}


# Blocks come over


def test_blocks_and_look_ups_travel_over_streams(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    forbid_direct_calls(cluster)
    assert there.match(TOKENS).tokens_by_tier == {"peer": 8 * T}
    fetched = there.fetch(TOKENS)
    assert assert_is_prefix(fetched, PATH) == 8
    assert fetched.tokens_by_tier == {"peer": 8 * T}
    figures = pair(cluster)
    assert (figures["blocks"], figures["bytes"], figures["failures"]) == (8, 8 * LAYOUT.block_bytes, {})
    assert figures["seconds"] > 0
    holder = cluster.nodes["n0"]
    wait_until(holder, lambda: holder.stats()["peers"]["served_blocks"] == 8)  # counted when all is sent, while it arrives
    assert cluster.nodes["n1"].stats()["peers"]["located"] == 2
    check_nodes(cluster)


def test_a_pulled_block_is_sealed_and_has_its_place_in_the_chain(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    there.fetch(TOKENS)
    node = cluster.nodes["n1"]
    for depth, key in enumerate(node.engine.machine.blocks):
        location = node.engine.machine.blocks[key].best
        node.storage.host.verify(key, location)
        assert node.storage.host.headers.is_sealed(location.offset)
        assert node.storage.host.header(location.offset).info.depth == depth


def test_a_long_chain_comes_in_batches_by_one_request(make_cluster, checked, monkeypatch) -> None:
    monkeypatch.setattr(block_server, "BATCH_BYTES", 4 * LAYOUT.block_bytes)
    cluster = make_cluster()
    here, there = clients_of(cluster, checked)
    path = tuple(range(50))
    here.store(tokens_of(path), kv_of(path))
    cluster.report_all()
    requests = []
    request = cluster.links["n1"].request
    monkeypatch.setattr(cluster.links["n1"], "request", lambda node, keys: requests.append(len(keys)) or request(node, keys))
    assert assert_is_prefix(there.fetch(tokens_of(path)), path) == 50
    assert requests == [50]
    check_nodes(cluster)


def test_blocks_on_the_disk_of_a_peer_come_straight_from_its_segment(make_cluster, checked, tmp_path, monkeypatch) -> None:
    cluster = make_cluster(disk="8MiB", disk_path=str(tmp_path / "disk"), store_wait_ms=10_000)
    here, there = clients_of(cluster, checked)
    paths = [(turn, 1, 2, 0) for turn in range(60)]
    for path in paths:
        here.store(tokens_of(path), kv_of(path))
    cluster.nodes["n0"].engine.settle()
    assert here.match(tokens_of(paths[0])).tokens_by_tier == {"disk": 4 * T}
    cluster.report_all()
    sent = []
    send_file = Channel.send_file
    monkeypatch.setattr(Channel, "send_file", lambda *arguments: sent.append(arguments) or send_file(*arguments))
    assert assert_is_prefix(there.fetch(tokens_of(paths[0])), paths[0]) == 4
    assert len(sent) == 4
    check_nodes(cluster)


def test_encoded_blocks_stay_encoded_on_the_way(make_cluster, checked) -> None:
    cluster = make_cluster(codec="host=int8", host="2MiB")
    layout = KVLayout(2, 2, 32, "float32", 32)
    here, there = clients_of(cluster, checked, layout)
    paths = [(turn, 1, 2, 0) for turn in range(16)]
    for path in paths:
        here.store(tokens_of(path, layout), kv_of(path, layout))
    cluster.nodes["n0"].engine.settle()
    there.store(tokens_of((999,), layout), kv_of((999,), layout))  # the model is known there
    cluster.report_all()
    coded = [path for path in paths if any(each.codec not in (None, "raw") for each in here.explain(tokens_of(path, layout)))]
    assert coded, "the staging area was too small for all blocks"
    mine, theirs = here.fetch(tokens_of(coded[0], layout)), there.fetch(tokens_of(coded[0], layout))
    assert theirs.tokens == mine.tokens == 4 * layout.block_tokens
    assert mine.kv.equal(theirs.kv)
    check_nodes(cluster)


def test_a_block_that_is_not_sealed_yet_is_sealed_before_it_is_sent(cluster, clients, monkeypatch) -> None:
    here, there = clients
    monkeypatch.setattr(cluster.nodes["n0"].seals, "committed", lambda keys: None)
    here.store(TOKENS, KV)
    cluster.report_all()
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8


def test_a_bit_that_flipped_in_the_holders_memory_is_found_and_the_holder_drops_the_block(cluster, clients, monkeypatch) -> None:
    here, there = clients
    monkeypatch.setattr(cluster.nodes["n0"].seals, "_scrub_paced", lambda: 0.05)  # the holder does not find it by itself
    here.store(TOKENS, KV)
    holder = cluster.nodes["n0"]
    keys = [bytes.fromhex(each.key) for each in here.explain(TOKENS)]
    for key in keys:
        holder.storage.host.verify(key, holder.engine.machine.blocks[key].best)
    offset = holder.engine.machine.blocks[keys[5]].best.offset
    holder.storage.host.payload(offset, 1)[0] ^= 1
    cluster.report_all()
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 5
    assert pair(cluster)["failures"] == {"checksum": 1}
    deadline_s = time.monotonic() + 10
    while keys[5] in holder.engine.machine.blocks and time.monotonic() < deadline_s:
        time.sleep(0.01)  # the holder is told by a message, and examines the block
    assert keys[5] not in holder.engine.machine.blocks


def test_a_chain_of_two_holders_is_assembled(make_cluster, checked) -> None:
    cluster = make_cluster(nodes=3)
    clients = clients_of(cluster, checked)
    clients[0].store(TOKENS[: 4 * T], kv_of(PATH[:4]))
    clients[1].store(TOKENS, kv_of(PATH, first=4), start=4 * T)
    cluster.report_all()
    assert assert_is_prefix(clients[2].fetch(TOKENS), PATH) == 8
    assert (pair(cluster, "n2", "n0")["blocks"], pair(cluster, "n2", "n1")["blocks"]) == (4, 4)
    check_nodes(cluster)


def test_two_pulls_of_one_prefix_share_one_transfer(make_cluster, checked, monkeypatch) -> None:
    cluster = make_cluster()
    here, there = clients_of(cluster, checked)
    other = checked(cluster.client("n1", LAYOUT, NAMESPACE))
    longer = (*PATH, 5, 6)
    here.store(tokens_of(longer), kv_of(longer))
    cluster.report_all()
    entered, gate = threading.Event(), threading.Event()
    serve = block_server.BlockServer._send_run

    def held(self, channel, wait_s, keys) -> None:
        entered.set()
        assert gate.wait(30.0)
        serve(self, channel, wait_s, keys)

    monkeypatch.setattr(block_server.BlockServer, "_send_run", held)
    fetched: list = []
    first = threading.Thread(target=lambda: fetched.append(there.fetch(TOKENS)))
    first.start()
    assert entered.wait(30.0)
    second = threading.Thread(target=lambda: fetched.append(other.fetch(tokens_of(longer))))
    second.start()
    gate.set()
    first.join(30.0)
    second.join(30.0)
    assert sorted(assert_is_prefix(each, longer if each.tokens > 8 * T else PATH) for each in fetched) == [8, 10]
    assert pair(cluster)["blocks"] == 10, "no block travelled twice"
    check_nodes(cluster)


def test_a_peer_without_streams_is_asked_by_the_other_link(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    del cluster._labels["n0"]["peer_address"]
    cluster.report_all()
    assert not cluster.links["n1"].streams_from("n0")
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    assert "n0" not in cluster.nodes["n1"].stats()["peers"]["peers"]


def test_a_cluster_that_turns_streams_off_works(checked) -> None:
    cluster = checked(InProcessCluster(Config.of({"host": "1MiB", "peer_address": "off"}), 2))
    assert "peer_address" not in cluster.nodes["n0"].info()
    assert cluster.nodes["n0"].stats()["peers"]["address"] is None


def test_more_blocks_than_fit_end_the_pull_without_blaming_the_peer(make_cluster, checked) -> None:
    cluster = make_cluster()
    here, there = clients_of(cluster, checked)
    path = tuple(range(100))
    here.store(tokens_of(path), kv_of(path))
    cluster.report_all()
    assert assert_is_prefix(there.fetch(tokens_of(path)), path) > 50
    assert pair(cluster)["failures"] == {}
    check_nodes(cluster)
