"""Nodes of one process that transfer blocks over TCP: every way in which a peer, or the network to it, can fail."""

# ruff: noqa: F401, F811 - fixtures are imported by name

import socket
import threading
import time
from collections.abc import Callable

import pytest

from tests.unit.peers.pairs import identity_of
from tests.unit.peers.test_streams import KV, PATH, TOKENS, T, clients, clients_of, cluster, make_cluster, pair
from tests.unit.serving.prompts import LAYOUT, assert_is_prefix, kv_of, tokens_of
from tests.unit.serving.test_cluster import check_nodes
from tiered_kv.blocks import Stored
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node import puller
from tiered_kv.node.peers import block_server, network, streams
from tiered_kv.protocol.peer_address import PeerPlace
from tiered_kv.protocol.peer_channel import Channel, PeerIdentity
from tiered_kv.protocol.peer_listener import PeerListener
from tiered_kv.store import events as ev

LATE_S = 0.5
"""Beyond a deadline: the machine of the tests is busy. The benchmark measures the true figure."""


class BadPeer:
    """Takes the place of a node's streams. `act(channel, keys)` answers each request."""

    def __init__(self, cluster: InProcessCluster, node: str, act: Callable[[Channel, list[bytes]], None], own: PeerIdentity | None = None):
        self.listener = PeerListener(PeerPlace.of(None).listen("127.0.0.1"), own or cluster._identity(node))
        self.asked = 0
        self._act = act
        self.listener.start(self._serve)
        announce(cluster, node, self.listener.address)

    def _serve(self, channel: Channel) -> None:
        while True:
            _, _, keys = channel.next(block_server.Limit.within(60.0))
            self.asked += 1
            self._act(channel, keys)

    def close(self) -> None:
        self.listener.close()


def announce(cluster: InProcessCluster, node: str, address: str) -> None:
    """The coordinator names this address as the node's."""
    cluster.announce(node, address)
    cluster.report_all()  # the answer to the first report of the others may have come before the node's
    assert all(link._addresses[node] == address for link in cluster.links.values())


def timed_fetch(client, deadline_ms: float, tokens=TOKENS) -> tuple:
    begun_s = time.monotonic()
    fetched = client.fetch(tokens, deadline_ms=deadline_ms)
    return fetched, time.monotonic() - begun_s


def half_a_batch(cluster: InProcessCluster, node: str, blocks: int) -> Callable[[Channel, list[bytes]], None]:
    """A peer that sends some whole blocks and half a block, and then hangs."""
    server = block_server.BlockServer(cluster.nodes[node], cluster.links[node]._figures)
    sizes = []

    def act(channel: Channel, keys: list[bytes]) -> None:
        send_bytes = channel.send_bytes

        def some(buffers, limit) -> None:
            sizes.extend(buffers)
            send_bytes([*buffers[: 1 + blocks], buffers[1 + blocks][: LAYOUT.block_bytes // 2]], limit)
            raise TieredKVError(Kind.TRANSPORT, "it hangs", reason="test")

        channel.send_bytes = some
        try:
            server._send_run(channel, 30.0, keys)
        except TieredKVError:
            channel.send_bytes = send_bytes
            channel.next(block_server.Limit.within(30.0))  # until the other side gives up

    return act


def test_a_peer_that_hangs_after_half_a_block_ends_at_the_deadline_and_is_then_avoided(cluster, clients, checked) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    bad = checked(BadPeer(cluster, "n0", half_a_batch(cluster, "n0", 3)))
    fetched, took_s = timed_fetch(there, 300)
    assert took_s < 0.3 + LATE_S
    assert assert_is_prefix(fetched, PATH) in (0, 3), "blocks of a batch become visible together"
    assert pair(cluster)["failures"] == {"timeout": 1}
    assert "timed out" in pair(cluster)["last_failure"]
    fetched, took_s = timed_fetch(there, 10_000)
    assert took_s < 5.0 and bad.asked == 1, "it is avoided"
    check_nodes(cluster)


def test_other_holders_are_tried_in_the_time_left_after_one_hangs(make_cluster, checked) -> None:
    cluster = make_cluster(nodes=3)
    clients = clients_of(cluster, checked)
    clients[0].store(TOKENS, KV)
    clients[1].store(TOKENS, KV)
    cluster.report_all()
    bad = checked(BadPeer(cluster, "n0", half_a_batch(cluster, "n0", 3)))
    fetched, took_s = timed_fetch(clients[2], 2000)
    assert assert_is_prefix(fetched, PATH) == 8
    assert took_s < 2.0 + LATE_S
    assert bad.asked == 1
    assert pair(cluster, "n2", "n0")["failures"] == {"timeout": 1}
    assert pair(cluster, "n2", "n1")["blocks"] >= 5
    check_nodes(cluster)


def test_a_holder_that_ends_midway_is_replaced_for_the_rest(make_cluster, checked, monkeypatch) -> None:
    monkeypatch.setattr(block_server, "FIRST_BLOCKS", 2)
    monkeypatch.setattr(block_server, "BATCH_BYTES", 2 * LAYOUT.block_bytes)
    cluster = make_cluster(nodes=3)
    clients = clients_of(cluster, checked)
    clients[0].store(TOKENS, KV)
    clients[1].store(TOKENS, KV)
    cluster.report_all()
    server = block_server.BlockServer(cluster.nodes["n0"], cluster.links["n0"]._figures)

    def end_midway(channel: Channel, keys: list[bytes]) -> None:
        send, batches = channel.send, []

        def first_two(message, limit, payload=()) -> None:
            if len(batches) == 2:
                raise TieredKVError(Kind.TRANSPORT, "killed", reason="test")
            batches.append(message)
            send(message, limit, payload)

        channel.send = first_two
        server._send_run(channel, 30.0, keys)

    checked(BadPeer(cluster, "n0", end_midway))
    assert assert_is_prefix(clients[2].fetch(TOKENS), PATH) == 8
    assert (pair(cluster, "n2", "n0")["blocks"], pair(cluster, "n2", "n1")["blocks"]) == (4, 4)
    assert pair(cluster, "n2", "n0")["failures"] == {"closed": 1}
    assert "last_failure" in pair(cluster, "n2", "n0"), "although some blocks came"
    check_nodes(cluster)


def test_a_holder_that_has_dropped_a_block_is_replaced_for_the_rest(make_cluster, checked) -> None:
    cluster = make_cluster(nodes=3)
    clients = clients_of(cluster, checked)
    clients[0].store(TOKENS, KV)
    clients[1].store(TOKENS, KV)
    cluster.report_all()
    keys = [bytes.fromhex(each.key) for each in clients[0].explain(TOKENS)]
    holder = cluster.nodes["n0"]
    for key in reversed(keys[3:]):
        holder.engine.handle([block_lost(holder, key)])
    assert assert_is_prefix(clients[2].fetch(TOKENS), PATH) == 8
    check_nodes(cluster)


def block_lost(node, key: bytes):
    return ev.Lost(key, node.engine.machine.blocks[key].best)


@pytest.mark.parametrize("own", [identity_of("n0", secret=bytes(32)), identity_of("n0", cluster_id="other")], ids=["secret", "cluster"])
def test_a_peer_of_another_secret_or_cluster_gets_no_request_and_the_other_link_serves(cluster, clients, checked, own) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    if own.secret == bytes(32):
        own = own._replace(cluster_id=cluster.cluster_id)
    bad = checked(BadPeer(cluster, "n0", lambda channel, keys: None, own))
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    reason = "cluster" if own.cluster_id == "other" else "secret"
    assert pair(cluster)["failures"] == {reason: 1}
    assert bad.asked == 0
    deadline_s = time.monotonic() + 10
    while not bad.listener.refusals and time.monotonic() < deadline_s:
        time.sleep(0.01)  # it sees the end of the connection a moment later
    assert sum(bad.listener.refusals.values()) == 1


def test_a_port_where_nobody_listens_falls_back_to_the_other_link(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    with socket.create_server(("127.0.0.1", 0)) as free:
        announce(cluster, "n0", f"127.0.0.1:{free.getsockname()[1]}")
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    assert pair(cluster)["failures"] == {"connect": 1}
    assert "nobody answers" in pair(cluster)["last_failure"]
    assert 0 <= pair(cluster)["last_failure_age_s"] < 30
    assert not cluster.links["n1"].streams_from("n0"), "not tried again at once"


def test_a_firewall_that_drops_silently_is_a_miss_within_the_deadline(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    with SilentPort() as address:
        announce(cluster, "n0", address)
        cluster.unreachable |= {"n0"}
        fetched, took_s = timed_fetch(there, 300)
    assert fetched.tokens == 0
    assert took_s < 0.3 + LATE_S
    assert pair(cluster)["failures"] == {"connect": 1}


class SilentPort:
    """A port whose queue of connections is full: the kernel answers no further caller, as behind a firewall that drops packets."""

    def __enter__(self) -> str:
        self._server = socket.socket()
        self._server.bind(("127.0.0.1", 0))
        self._server.listen(0)
        self._callers = [socket.socket() for _ in range(3)]
        for caller in self._callers:
            caller.setblocking(False)
            caller.connect_ex(self._server.getsockname())
        return f"127.0.0.1:{self._server.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        for each in [self._server, *self._callers]:
            each.close()


def test_a_silent_directory_costs_part_of_the_deadline_once_and_the_other_link_answers(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    with SilentPort() as address:
        cluster.links["n1"]._lookups.use(address)
        begun_s = time.monotonic()
        assert there.match(TOKENS).tokens_by_tier == {"peer": 8 * T}
        assert there.match(TOKENS).tokens_by_tier == {"peer": 8 * T}
        assert time.monotonic() - begun_s < 0.25 + LATE_S, "tried once"
    assert pair(cluster, peer="coordinator")["failures"] == {"connect": 1}


def test_a_peer_that_restarts_with_another_port_is_found(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    assert assert_is_prefix(there.fetch(TOKENS[: 2 * T]), PATH[:2]) == 2
    before = cluster.links["n0"].address
    cluster.stop_node("n0", remove=False)
    cluster.start_node("n0")
    assert cluster.links["n0"].address != before
    cluster.report_all()
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    assert pair(cluster)["blocks"] == 8
    check_nodes(cluster)


def test_a_connection_that_the_peer_closed_while_idle_is_replaced(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    there.fetch(TOKENS[: 2 * T])
    for connection in list(cluster.links["n0"]._listener._connections):
        connection.shutdown(socket.SHUT_RDWR)
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    assert pair(cluster)["failures"] == {}


def test_an_idle_connection_is_closed_by_the_server(cluster, clients, monkeypatch) -> None:
    monkeypatch.setattr(block_server, "IDLE_S", 0.05)
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    there.fetch(TOKENS)
    deadline_s = time.monotonic() + 10
    while cluster.links["n0"]._listener._connections and time.monotonic() < deadline_s:
        time.sleep(0.01)  # polls for an end
    assert not cluster.links["n0"]._listener._connections
    assert cluster.nodes["n0"].stats()["peers"]["refused"] == {}


def test_nothing_hangs_when_a_node_closes_during_a_transfer(cluster, clients, checked) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    checked(BadPeer(cluster, "n0", half_a_batch(cluster, "n0", 3)))
    fetching = threading.Thread(target=lambda: there.fetch(TOKENS, deadline_ms=30_000))
    fetching.start()
    deadline_s = time.monotonic() + 10
    while not cluster.links["n1"]._streams._busy and time.monotonic() < deadline_s:
        time.sleep(0.01)
    begun_s = time.monotonic()
    cluster.links["n1"].close()
    fetching.join(30.0)
    assert time.monotonic() - begun_s < 10.0


def test_a_slow_taker_is_given_up_and_its_blocks_are_free_again(cluster, clients, monkeypatch) -> None:
    """The taker reads nothing. The blocks are pinned for as long as the server waits."""
    monkeypatch.setattr(block_server, "STALLED_AFTER_S", 0.1)
    here, _ = clients
    path = tuple(range(100))
    here.store(tokens_of(path), kv_of(path))
    keys = [bytes.fromhex(each.key) for each in here.explain(tokens_of(path))]
    holder = cluster.nodes["n0"]
    connections = cluster.links["n1"]._streams
    channel = connections.take(cluster.links["n0"].address, block_server.Limit.within(5.0))
    channel._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for _ in range(20):
        channel.send(["get", 30.0, keys], block_server.Limit.within(5.0))
    deadline_s = time.monotonic() + 20
    while cluster.nodes["n0"].stats()["peers"]["refused"] != {"timeout": 1} and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert holder.stats()["peers"]["refused"] == {"timeout": 1}
    assert not any(holder.engine.machine.pinned(key) for key in keys)
    connections.drop(channel)


def test_store_goes_on_while_peers_fail(cluster, clients, checked) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    checked(BadPeer(cluster, "n0", half_a_batch(cluster, "n0", 1)))
    there.fetch(TOKENS, deadline_ms=100)
    assert there.store(TOKENS, KV).refused == 0
    assert here.store(tokens_of((9,)), kv_of((9,))) == Stored(1, 0, 0)


def test_constants_keep_their_order() -> None:
    assert puller.PATIENCE_S_MIN < puller.PATIENCE_S_MAX <= streams.CONNECT_WITHIN_S < network.NO_STREAM_S
