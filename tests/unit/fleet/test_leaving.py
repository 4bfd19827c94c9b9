"""The end of a node: blocks are handed to peers with room, the hottest first, and those only in memory are written to disk."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv.blocks import Tier
from tiered_kv.cluster.draining import Drained, hand_over, peers_with_room
from tiered_kv.cluster.stop import outcome
from tiered_kv.config import POLICIES, Config
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.lifetime.leaving import end, flush, inventory, take_over
from tiered_kv.node.node import Node

PATHS = [(prompt, 1, 2, 3) for prompt in range(6)]
BLOCK_BYTES = LAYOUT.block_bytes


class Calls:
    """Calls methods of nodes in this process, as `calls_to` does through Ray. `fails`: by node, the error of each call."""

    def __init__(self, cluster: InProcessCluster) -> None:
        self._cluster = cluster
        self.fails: dict[str, TieredKVError] = {}
        self.made: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda node, method: None

    def __call__(self, nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
        return {node: self._call(node, method, arguments) for node in nodes}

    def _call(self, node: str, method: str, arguments: tuple) -> Any:
        self.made.append((node, method))
        self.before(node, method)
        if node in self.fails:
            return self.fails[node]
        return {"inventory": inventory, "take_over": take_over, "close": end}[method](self._cluster.nodes[node], *arguments)


@pytest.fixture
def make(checked: Callable) -> Callable[..., InProcessCluster]:
    def cluster(nodes: int = 3, **settings: Any) -> InProcessCluster:
        return checked(InProcessCluster(Config.of({"host": "4MiB", "heartbeat_s": 0.1, **settings}), nodes))

    return cluster


def store(cluster: InProcessCluster, node: str, paths: list[tuple[int, ...]] = PATHS) -> None:
    with cluster.client(node, LAYOUT, NAMESPACE) as client:
        for path in paths:
            assert client.store(tokens_of(path), kv_of(path)).refused == 0
    cluster.report_all()


def hits(cluster: InProcessCluster, node: str, paths: list[tuple[int, ...]] = PATHS) -> list[int]:
    """Returns how many blocks of each path are hits on a node by itself. Verifies their content."""
    cluster.unreachable = {other for other in cluster.nodes if other != node}
    try:
        with cluster.client(node, LAYOUT, NAMESPACE) as client:
            return [assert_is_prefix(client.fetch(tokens_of(path)), path) for path in paths]
    finally:
        cluster.unreachable = set()


def test_all_blocks_are_handed_to_peers_with_room_and_are_hits_there(make) -> None:
    cluster = make()
    store(cluster, "n0")
    drained, told = Drained("n0"), []
    hand_over(Calls(cluster), drained, {"n1": 1 << 20, "n2": 1 << 20}, 30.0, advance=lambda *progress: told.append(progress))
    assert (sum(drained.taken.values()), drained.left, drained.why) == (24, 0, "")
    assert [max(pair) for pair in zip(hits(cluster, "n1"), hits(cluster, "n2"), strict=True)] == [4] * 6
    assert told[-1][0] == told[-1][1] == 24 * BLOCK_BYTES
    assert told[-1][2] == "24 blocks"


def test_the_hottest_chains_go_first_when_room_is_short(make) -> None:
    cluster = make(2, policy="lru")
    store(cluster, "n0")
    with cluster.client("n0", LAYOUT, NAMESPACE) as client:
        for path in (PATHS[4], PATHS[1]):
            client.fetch(tokens_of(path))
    drained = Drained("n0")
    hand_over(Calls(cluster), drained, {"n1": 8 * BLOCK_BYTES}, 30.0)
    assert hits(cluster, "n1") == [0, 4, 0, 0, 4, 0]
    assert (drained.taken, drained.left, drained.left_bytes) == ({"n1": 8}, 16, 16 * BLOCK_BYTES)
    assert drained.why == "no other node has room for them"


def test_a_chain_is_cut_where_room_ends_and_keeps_its_beginning(make) -> None:
    cluster = make(2)
    store(cluster, "n0", PATHS[:1])
    drained = Drained("n0")
    hand_over(Calls(cluster), drained, {"n1": 3 * BLOCK_BYTES}, 30.0)
    assert hits(cluster, "n1", PATHS[:1]) == [3]
    assert drained.left == 1


def test_a_chain_goes_to_one_peer_with_its_later_part(make) -> None:
    """The second half is stored while the first is handed over, and another peer has more room by then."""
    cluster = make()
    store(cluster, "n0", [(1, 2)])
    calls = Calls(cluster)
    stored = threading.Event()

    def store_more(node: str, method: str) -> None:
        if method == "take_over" and not stored.is_set():
            stored.set()
            store(cluster, "n0", [(1, 2, 3, 4)])

    calls.before = store_more
    drained = Drained("n0")
    hand_over(calls, drained, {"n1": 100 * BLOCK_BYTES, "n2": 99 * BLOCK_BYTES}, 30.0)
    assert drained.taken == {"n1": 4}
    assert hits(cluster, "n1", [(1, 2, 3, 4)]) == [4]


def test_a_peer_that_fails_gets_no_more_and_the_others_take_its_part(make) -> None:
    cluster = make()
    store(cluster, "n0", PATHS[:2])
    calls = Calls(cluster)
    calls.fails["n1"] = TieredKVError(Kind.TRANSPORT, "no answer")
    drained = Drained("n0")
    hand_over(calls, drained, {"n1": 8 * BLOCK_BYTES, "n2": 7 * BLOCK_BYTES}, 30.0)
    assert drained.why == "n1: no answer"
    assert (drained.taken, drained.left) == ({"n2": 7}, 1)
    assert calls.made.count(("n1", "take_over")) == 1


def test_nothing_is_handed_over_when_time_is_up(make) -> None:
    cluster = make(2)
    store(cluster, "n0")
    drained = Drained("n0")
    hand_over(Calls(cluster), drained, {"n1": 1 << 20}, 0.0)
    assert (drained.taken, drained.left, drained.why) == ({}, 24, "time is up")


def test_a_node_that_does_not_list_its_blocks_is_named(make) -> None:
    cluster = make(2)
    calls = Calls(cluster)
    calls.fails["n0"] = TieredKVError(Kind.TRANSPORT, "no answer in time")
    drained = Drained("n0")
    hand_over(calls, drained, {"n1": 1 << 20}, 30.0)
    assert drained.why == "n0 does not list its blocks: no answer in time"


def test_blocks_on_disk_are_handed_over_after_those_in_memory(make, tmp_path: Path) -> None:
    """The peer has a full memory and a disk with room: it takes blocks as fast as its disk does."""
    cluster = make(2, host="1MiB", disk="8MiB", disk_path=str(tmp_path), disk_segment="64KiB", policy="lru")
    paths = [(prompt, 1, 2, 3) for prompt in range(50)]
    store(cluster, "n0", paths)
    store(cluster, "n1", [(prompt, 9, 9, 9) for prompt in range(100, 125)])
    assert cluster.nodes["n0"].engine.machine.blocks_by_tier[Tier.DISK] > 0
    drained = Drained("n0")
    hand_over(Calls(cluster), drained, {"n1": 7 << 20}, 60.0)
    assert drained.left <= 4, drained
    assert sum(hits(cluster, "n1", paths)) >= 196


def test_lossy_blocks_are_handed_over_with_their_model(make) -> None:
    cluster = make(2, quality="near_exact")
    store(cluster, "n0", PATHS[:2])
    assert not cluster.nodes["n1"].storage.encoder.models()
    drained = Drained("n0")
    hand_over(Calls(cluster), drained, {"n1": 1 << 20}, 30.0)
    assert drained.taken == {"n1": 8}
    assert cluster.nodes["n1"].storage.encoder.models()


def test_a_model_that_a_peer_cannot_use_does_not_stop_the_handover(make) -> None:
    cluster = make(2)
    store(cluster, "n0", PATHS[:1])
    taken = take_over(cluster.nodes["n1"], inventory(cluster.nodes["n0"]).runs, {NAMESPACE.root(LAYOUT): {"layout": "strange"}}, 10.0)
    assert taken == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_ranks_all_blocks_with_ancestors_first(make, policy: str) -> None:
    cluster = make(1, policy=policy)
    store(cluster, "n0")
    with cluster.client("n0", LAYOUT, NAMESPACE) as client:
        for _ in range(3):
            client.fetch(tokens_of(PATHS[2]))
    for asked in range(2):
        runs = inventory(cluster.nodes["n0"]).runs
        keys = [key for run in runs for key in run.keys]
        assert len(set(keys)) == len(keys) == 24
        blocks = cluster.nodes["n0"].engine.machine.blocks
        assert all(block.parent is None or keys.index(block.parent) < keys.index(key) for key, block in blocks.items())
        assert [(run.depth, len(run.keys)) for run in runs] == [(0, 4)] * 6
        if not asked and policy not in ("fifo", "s3fifo"):  # these two do not rank by a few uses
            assert {blocks[key].uses for key in runs[0].keys} == {max(block.uses for block in blocks.values())}


def test_room_is_counted_in_host_and_disk_of_nodes_that_stay() -> None:
    def node(name: str, used: int) -> dict:
        tiers = {"host": {"used_bytes": used, "capacity_bytes": 10}, "disk": {"used_bytes": 1, "capacity_bytes": 5}, "objects": {}}
        return {"node": name, "stats": {"tiers": tiers}}

    members = [{"node": f"n{number}", "state": "serving"} for number in range(3)] + [{"node": "n3", "state": "draining"}]
    about = {"nodes": [node("n0", 0), node("n1", 4), node("n2", 12), node("n3", 0)], "fleet": {"members": members}}
    assert peers_with_room(about, "n0") == {"n1": 10, "n2": 4}


# The flush


@pytest.fixture
def lasting(node_factory, client_factory, tmp_path: Path) -> Callable[..., Node]:
    """Returns a function that makes a node with a disk folder, whose blocks are only in memory."""

    def made(**settings: Any) -> Node:
        node = node_factory(disk="8MiB", disk_path=str(tmp_path), policy="lru", **settings)
        client = client_factory(node, LAYOUT, NAMESPACE)
        for path in PATHS:
            client.store(tokens_of(path), kv_of(path))
        return node

    return made


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The disk takes one batch of one block, and hangs until the event is set."""
    gate, taken = threading.Event(), []
    from tiered_kv.node.storage import NodeStorage

    append = NodeStorage.append

    def hanging(self: Any, tier: Tier, copies: Any, coded: Any) -> Any:
        taken.append(1)
        if len(taken) > 1:
            gate.wait(30.0)
        return append(self, tier, copies, coded)

    monkeypatch.setattr(NodeStorage, "append", hanging)
    monkeypatch.setattr("tiered_kv.node.lifetime.leaving.FLUSH_BLOCKS", 4)
    yield gate
    gate.set()


def test_blocks_only_in_memory_are_written_to_disk_and_found_by_the_next_node(
    lasting, node_factory, client_factory, tmp_path: Path
) -> None:
    node = lasting()
    assert flush(node, 30.0)[0] == 24
    assert flush(node, 30.0) == (0, 0), "they are on disk now"
    report = end(node, 30.0)
    assert (report.kept, report.flushed, report.lost, report.lost_bytes) == (24, 0, 0, 0)
    following = node_factory(disk="8MiB", disk_path=str(tmp_path), policy="lru")
    client = client_factory(following, LAYOUT, NAMESPACE)
    assert [assert_is_prefix(client.fetch(tokens_of(path)), path) for path in PATHS] == [4] * 6


def test_a_hanging_disk_ends_the_flush_in_time_and_the_report_counts_what_is_lost(lasting, slow_disk) -> None:
    node = lasting()
    node.engine.drain_touches()
    begun_s = time.monotonic()
    assert flush(node, 0.3)[0] == 4
    assert time.monotonic() - begun_s < 3.0
    with node.engine.lock:
        saved = [key for key, block in node.engine.machine.blocks.items() if Tier.DISK in block.copies]
    assert len(saved) == 4
    slow_disk.set()
    report = end(node, 0.0)
    assert report.kept + report.lost == 24


def test_the_most_valuable_blocks_are_written_first(lasting, client_factory, slow_disk) -> None:
    node = lasting()
    client_factory(node, LAYOUT, NAMESPACE).fetch(tokens_of(PATHS[3]))
    flush(node, 0.3)
    with node.engine.lock:
        saved = {key for key, block in node.engine.machine.blocks.items() if Tier.DISK in block.copies}
        hottest = {key for key, block in node.engine.machine.blocks.items() if block.uses == 2}
    assert saved == hottest


@pytest.mark.parametrize("settings", [{}, {"disk": "8MiB"}], ids=["without a disk", "with a disk that ends with the cluster"])
def test_without_a_lasting_folder_nothing_is_written_and_all_is_counted_as_lost(node_factory, client_factory, settings: dict) -> None:
    node = node_factory(**settings)
    client_factory(node, LAYOUT, NAMESPACE).store(tokens_of(PATHS[0]), kv_of(PATHS[0]))
    assert flush(node, 30.0) == (0, 0)
    report = end(node, 30.0)
    assert (report.kept, report.lost, report.lost_bytes) == (0, 4, 4 * BLOCK_BYTES)
    assert outcome(report) == "4 blocks (32.0 KiB) that nothing outlasting the cluster had are lost"


def test_the_words_for_the_end_of_a_node(lasting) -> None:
    report = end(lasting(), 30.0)
    assert outcome(report).startswith("24 blocks (")
    assert " stay on disk, 24 blocks (" in outcome(report)
    assert outcome(report).endswith(" of them written now")
    error = TieredKVError(Kind.TRANSPORT, "no answer")
    assert outcome(error) == "did not close in order (no answer); blocks that only its memory had are lost"
