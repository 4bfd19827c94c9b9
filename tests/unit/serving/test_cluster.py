"""Several nodes and their coordinator in one process: blocks are pulled from peers, and every failure is a miss."""

import threading
from collections import Counter

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import Stored
from tiered_kv.clock import ManualClock
from tiered_kv.coordinator.coordinator import Answer, Coordinator, Report
from tiered_kv.embedded import InProcessCluster, InProcessLink
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node import puller, reporter
from tiered_kv.node.puller import AVOID_S
from tiered_kv.protocol.messages import BlockRun

T = LAYOUT.block_tokens
PATH = (1, 2, 0, 1, 2, 2, 1, 0)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)
PATIENCE_S = 30.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def make_cluster(checked, clock):
    def make(nodes: int = 2, **settings: object) -> InProcessCluster:
        config = Config.of({"host": "1MiB", "heartbeat_s": 1000.0, **settings})
        cluster = checked(InProcessCluster(config, nodes, clock))
        checked(cluster.coordinator)
        return cluster

    return make


@pytest.fixture
def cluster(make_cluster) -> InProcessCluster:
    return make_cluster()


@pytest.fixture
def clients(cluster, checked):
    return [checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes]


class Watch:
    """Wraps a node's link. Counts and records the requests, and can damage the frames received."""

    def __init__(self, link: InProcessLink) -> None:
        self._link = link
        self.requests: list[tuple[str, int]] = []
        self.spoil = lambda frames: frames
        self.before_request = lambda number: None

    def __getattr__(self, name: str):
        return getattr(self._link, name)

    def request(self, node: str, keys: list[bytes]):
        self.before_request(len(self.requests))
        self.requests.append((node, len(keys)))
        transfer = self._link.request(node, keys)
        transfer._frames = self.spoil(transfer._frames)
        return transfer


def watched(cluster: InProcessCluster, node: str) -> Watch:
    pulls = cluster.nodes[node]._puller
    pulls._link = Watch(pulls._link)
    return pulls._link


def check_nodes(cluster: InProcessCluster) -> None:
    for node in cluster.nodes.values():
        node.engine.drain_touches()
        node.engine.settle()
        node.check()
    cluster.coordinator.check()


# Blocks come over


def test_all_whole_blocks_of_a_shared_prefix_are_pulled_from_the_peer(cluster, clients) -> None:
    here, there = clients
    here.store([*TOKENS, 1, 2, 3], kv_of((*PATH, 7))[..., : len(TOKENS) + 3, :])
    cluster.report_all()
    longer = (*PATH, 9)
    assert there.match(tokens_of(longer)).tokens_by_tier == {"peer": 8 * T}
    first = there.fetch(tokens_of(longer))
    assert assert_is_prefix(first, longer) == 8
    assert first.tokens_by_tier == {"peer": 8 * T}
    calls = there.node_calls
    again = there.fetch(TOKENS)
    assert assert_is_prefix(again, PATH) == 8
    assert again.tokens_by_tier == {"host": 8 * T}
    assert there.node_calls == calls, "a second time nobody is asked"
    check_nodes(cluster)


def test_local_blocks_are_not_pulled_again(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    there.store(TOKENS[: 3 * T], kv_of(PATH[:3]))
    cluster.report_all()
    watch = watched(cluster, "n1")
    assert there.match(TOKENS).tokens_by_tier == {"host": 3 * T, "peer": 5 * T}
    assert there.fetch(TOKENS).tokens_by_tier == {"host": 3 * T, "peer": 5 * T}
    assert sum(count for _, count in watch.requests) == 5
    check_nodes(cluster)


def test_pulled_blocks_can_be_pulled_from_their_new_node(make_cluster, checked) -> None:
    cluster = make_cluster(nodes=3)
    clients = [checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes]
    clients[0].store(TOKENS, KV)
    cluster.report_all()
    clients[1].fetch(TOKENS)
    cluster.report_all()
    cluster.unreachable.add("n0")
    assert assert_is_prefix(clients[2].fetch(TOKENS), PATH) == 8
    check_nodes(cluster)


def test_a_prefix_is_assembled_from_several_nodes(make_cluster, checked) -> None:
    cluster = make_cluster(nodes=3)
    clients = [checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes]
    clients[0].store(TOKENS[: 4 * T], kv_of(PATH[:4]))
    clients[1].store(TOKENS, kv_of(PATH, first=4), start=4 * T)
    cluster.report_all()
    watch = watched(cluster, "n2")
    assert assert_is_prefix(clients[2].fetch(TOKENS), PATH) == 8
    assert Counter(node for node, _ in watch.requests).keys() == {"n0", "n1"}
    check_nodes(cluster)


def test_blocks_are_pulled_in_chunks_with_short_first_ones(make_cluster, checked, monkeypatch) -> None:
    monkeypatch.setattr(puller, "CHUNK_BYTES", 8 * LAYOUT.block_bytes)
    cluster = make_cluster()
    here, there = (checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes)
    path = tuple(range(30))
    here.store(tokens_of(path), kv_of(path))
    cluster.report_all()
    watch = watched(cluster, "n1")
    assert assert_is_prefix(there.fetch(tokens_of(path)), path) == 30
    assert [count for _, count in watch.requests] == [2, 4, 8, 8, 8]
    check_nodes(cluster)


def test_a_block_larger_than_a_chunk_is_pulled(make_cluster, checked, monkeypatch) -> None:
    monkeypatch.setattr(puller, "CHUNK_BYTES", 64 << 10)
    cluster = make_cluster()
    large = KVLayout(4, 2, 32, "float32", 64)
    here, there = (checked(cluster.client(node, large, NAMESPACE)) for node in cluster.nodes)
    here.store(tokens_of(PATH[:3], large), kv_of(PATH[:3], large))
    cluster.report_all()
    assert assert_is_prefix(there.fetch(tokens_of(PATH[:3], large)), PATH[:3], large) == 3


def test_two_workers_that_need_the_same_blocks_pull_them_once(cluster, clients, checked) -> None:
    here, there = clients
    other = checked(cluster.client("n1", LAYOUT, NAMESPACE))
    here.store(TOKENS, KV)
    cluster.report_all()
    watch, entered, gate = watched(cluster, "n1"), threading.Event(), threading.Event()

    def hold(number: int) -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    watch.before_request = hold
    fetched: list = []
    first = threading.Thread(target=lambda: fetched.append(there.fetch(TOKENS)))
    first.start()
    assert entered.wait(PATIENCE_S)
    waiting = threading.Event()
    pulls = cluster.nodes["n1"]._puller
    wait_for = pulls._done.wait_for

    def tell_and_wait(*arguments):
        waiting.set()
        return wait_for(*arguments)

    pulls._done.wait_for = tell_and_wait
    second = threading.Thread(target=lambda: fetched.append(other.fetch(TOKENS)))
    second.start()
    assert waiting.wait(PATIENCE_S)
    gate.set()
    first.join(PATIENCE_S)
    second.join(PATIENCE_S)
    assert [assert_is_prefix(each, PATH) for each in fetched] == [8, 8]
    assert sum(count for _, count in watch.requests) == 8
    assert not pulls._under_way
    check_nodes(cluster)


def test_pulled_blocks_evict_others_and_stay_within_the_caps(cluster, clients) -> None:
    here, there = clients
    path = tuple(range(100))
    here.store(tokens_of(path), kv_of(path))
    for turn in range(30):
        there.store(tokens_of((turn, 5, 5, 5)), kv_of((turn, 5, 5, 5)))
    cluster.report_all()
    assert assert_is_prefix(there.fetch(tokens_of(path)), path) > 50
    check_nodes(cluster)


def test_blocks_on_the_disk_of_a_peer_are_pulled(make_cluster, checked, tmp_path) -> None:
    cluster = make_cluster(disk="8MiB", disk_path=str(tmp_path / "disk"), store_wait_ms=10_000)
    here, there = (checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes)
    paths = [(turn, 1, 2, 0) for turn in range(60)]
    for path in paths:
        here.store(tokens_of(path), kv_of(path))
    cluster.nodes["n0"].engine.settle()
    assert here.match(tokens_of(paths[0])).tokens_by_tier == {"disk": 4 * T}
    cluster.report_all()
    assert assert_is_prefix(there.fetch(tokens_of(paths[0])), paths[0]) == 4
    check_nodes(cluster)


def test_without_time_left_no_peer_is_called(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    assert there.fetch(TOKENS, deadline_ms=0).tokens == 0
    assert there.node_calls == 0


# What fails


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pieces: [pieces[0], bytes([pieces[1][0] ^ 1]) + pieces[1][1:], pieces[2]],
        lambda pieces: [pieces[0], pieces[1], bytes(16)],
        lambda pieces: [pieces[0], pieces[1][:-1], pieces[2]],
        lambda pieces: pieces[:2],
        lambda pieces: [b"".join(pieces)],
        lambda pieces: [],
        lambda pieces: None,
        lambda pieces: [None, 7, "text"],
    ],
    ids=["flipped", "checksum", "short", "two pieces", "one piece", "empty", "none", "no buffers"],
)
def test_a_damaged_frame_is_a_miss_and_so_are_its_descendants(cluster, clients, caplog, spoil) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    watch = watched(cluster, "n1")
    taken: list = []

    def spoil_the_sixth(frames: list) -> list:
        spoiled = [spoil(pieces) if len(taken) + at == 5 else pieces for at, pieces in enumerate(frames)]
        taken.extend(frames)
        return spoiled

    watch.spoil = spoil_the_sixth
    fetched = there.fetch(TOKENS)
    assert assert_is_prefix(fetched, PATH) == 5
    assert "was refused" in caplog.text
    check_nodes(cluster)
    watch.spoil = lambda frames: frames
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8, "the next time it may be whole"


def test_a_valid_block_under_another_key_is_rejected(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    watched(cluster, "n1").spoil = lambda frames: frames[::-1]
    assert there.fetch(TOKENS).tokens == 0
    check_nodes(cluster)


def test_more_frames_than_requested_are_ignored(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    watched(cluster, "n1").spoil = lambda frames: frames + frames
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    check_nodes(cluster)


def test_a_block_of_another_size_under_the_right_key_is_rejected(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    session = cluster.nodes["n1"].open_session()
    keys = [bytes.fromhex(record.key) for record in here.explain(TOKENS)]
    assert session.pull(BlockRun(NAMESPACE.root(LAYOUT), 512, None, keys, 0), 5.0) == 0
    session.close()
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    check_nodes(cluster)


def test_blocks_pulled_before_a_peer_ends_are_kept(make_cluster, checked, clock, monkeypatch) -> None:
    monkeypatch.setattr(puller, "CHUNK_BYTES", 8 * LAYOUT.block_bytes)
    cluster = make_cluster()
    here, there = (checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in cluster.nodes)
    path = tuple(range(30))
    here.store(tokens_of(path), kv_of(path))
    cluster.report_all()

    def leave(number: int) -> None:
        if number == 4:
            cluster.unreachable.add("n0")

    watched(cluster, "n1").before_request = leave
    blocks = assert_is_prefix(there.fetch(tokens_of(path)), path)
    assert 2 <= blocks < 22
    cluster.unreachable.clear()
    assert assert_is_prefix(there.fetch(tokens_of(path)), path) == blocks, "not asked again at once"
    clock.advance(AVOID_S)
    assert assert_is_prefix(there.fetch(tokens_of(path)), path) == 30
    check_nodes(cluster)


@pytest.mark.parametrize("gone", ["unreachable", "closed", "unknown"])
def test_an_absent_peer_is_a_miss(cluster, clients, gone: str) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    if gone == "unreachable":
        cluster.unreachable.add("n0")
    elif gone == "closed":
        cluster.nodes["n0"].close()
    else:
        node = cluster.nodes.pop("n0")
    assert there.match(TOKENS).tokens_by_tier == {"peer": 8 * T}, "says the directory, which does not know yet"
    assert there.fetch(TOKENS).tokens == 0
    assert there.store(TOKENS, KV) == Stored(8, 0, 0)
    if gone == "unknown":
        cluster.nodes["n0"] = node


def test_without_the_coordinator_local_blocks_hit_and_others_miss(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.unreachable.add("coordinator")
    cluster.report_all()
    assert cluster.nodes["n0"].stats()["coordinator"] is False
    assert assert_is_prefix(here.fetch(TOKENS), PATH) == 8
    assert there.match(TOKENS).tokens == there.fetch(TOKENS).tokens == 0
    assert here.store(tokens_of((9,)), kv_of((9,))) == Stored(1, 0, 0)
    cluster.unreachable.clear()
    cluster.report_all()
    assert cluster.nodes["n0"].stats()["coordinator"] is True
    cluster.report_all()
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    assert assert_is_prefix(there.fetch(tokens_of((9,))), (9,)) == 1
    check_nodes(cluster)


def test_a_new_coordinator_gets_full_reports(cluster, clients, clock) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    cluster.coordinator = Coordinator(clock, cluster.config.node_timeout_s)
    assert there.fetch(TOKENS).tokens == 0
    cluster.report_all()
    cluster.report_all()
    assert [node["directory_blocks"] for node in cluster.coordinator.nodes()] == [8, 0]
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    check_nodes(cluster)


def test_a_silent_node_leaves_the_directory_until_it_reports_again(cluster, clients, clock) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    cluster.unreachable.add("n0")
    clock.advance(cluster.config.node_timeout_s - 1)
    cluster.nodes["n1"].report()
    clock.advance(2)
    assert [node["node"] for node in cluster.coordinator.nodes()] == ["n1"]
    assert there.match(TOKENS).tokens == 0
    assert len(cluster.coordinator._directory) == 0
    cluster.unreachable.clear()
    cluster.report_all()
    cluster.report_all()
    assert there.match(TOKENS).tokens_by_tier == {"peer": 8 * T}
    check_nodes(cluster)


def test_a_lost_report_is_detected(cluster, clients, monkeypatch) -> None:
    here, there = clients
    report = cluster.coordinator.report
    with monkeypatch.context() as patch:
        patch.setattr(cluster.coordinator, "report", lambda told: report(told._replace(node="nobody")) and Answer(1, resync=False))
        here.store(TOKENS, KV)
        cluster.nodes["n0"].report()
    cluster.coordinator.forget("nobody")
    cluster.report_all()
    assert there.match(TOKENS).tokens_by_tier == {"peer": 8 * T}


@pytest.mark.parametrize(
    "error", [TieredKVError(Kind.TRANSPORT, "no answer"), RuntimeError("something of Ray's")], ids=["expected", "not expected"]
)
def test_the_content_of_a_failed_report_is_sent_later(cluster, clients, monkeypatch, error) -> None:
    here, there = clients
    node = cluster.nodes["n0"]
    monkeypatch.setattr(reporter.log, "exception", lambda *_: None)

    def fail(_: Report):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(node._reporter._link, "report", fail, raising=False)
        here.store(TOKENS, KV)
        node._reporter._report_guarded()
    cluster.report_all()
    cluster.report_all()
    assert there.match(TOKENS).tokens_by_tier == {"peer": 8 * T}


def test_a_long_inventory_is_reported_in_parts(cluster, clients, monkeypatch, clock) -> None:
    here, _there = clients
    monkeypatch.setattr(reporter, "KEYS_PER_REPORT", 3)
    here.store(TOKENS, KV)
    cluster.coordinator = Coordinator(clock, cluster.config.node_timeout_s)
    cluster.report_all()
    cluster.report_all()
    assert cluster.coordinator.nodes()[0]["directory_blocks"] == 8
    here.store(tokens_of((9,)), kv_of((9,)))
    cluster.report_all()
    assert cluster.coordinator.nodes()[0]["directory_blocks"] == 9


def test_evicted_blocks_leave_the_directory(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    for turn in range(100, 140):
        here.store(tokens_of((turn, 1, 1, 1)), kv_of((turn, 1, 1, 1)))
    cluster.report_all()
    assert there.match(TOKENS).tokens == 0
    assert cluster.coordinator.nodes()[0]["directory_blocks"] == cluster.nodes["n0"].stats()["blocks"]
    assert not cluster.nodes["n0"].engine.journal
    check_nodes(cluster)


def test_a_stale_directory_entry_is_only_a_miss(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.report_all()
    with cluster.nodes["n0"]._reporter._turn:  # it sends no report meanwhile
        for turn in range(100, 140):
            here.store(tokens_of((turn, 1, 1, 1)), kv_of((turn, 1, 1, 1)))
        assert there.match(TOKENS).tokens == 8 * T
        assert there.fetch(TOKENS).tokens == 0
    check_nodes(cluster)


def test_blocks_are_pinned_only_while_they_are_served(cluster, clients) -> None:
    here, _ = clients
    here.store(TOKENS, KV)
    node = cluster.nodes["n0"]
    keys = [bytes.fromhex(record.key) for record in here.explain(TOKENS)]
    with node.serving(keys) as frames:
        assert len(frames) == 8
        before = [bytes(pieces[1]) for pieces in frames]
        for turn in range(100, 140):
            here.store(tokens_of((turn, 1, 1, 1)), kv_of((turn, 1, 1, 1)))
        assert [bytes(pieces[1]) for pieces in frames] == before
        assert assert_is_prefix(here.fetch(TOKENS), PATH) == 8
        del frames
    for turn in range(200, 240):
        here.store(tokens_of((turn, 1, 1, 1)), kv_of((turn, 1, 1, 1)))
    assert here.match(TOKENS).tokens == 0
    check_nodes(cluster)


def test_explain_names_the_nodes_that_have_a_block(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS[: 2 * T], kv_of(PATH[:2]))
    cluster.report_all()
    records = there.explain(TOKENS[: 3 * T])
    assert [(record.tier, record.why) for record in records] == [("peer", "peer"), ("peer", "peer"), (None, "never_stored")]
    assert records[0].reason == "held by n0"


def test_peers_find_a_restarted_node(cluster, clients) -> None:
    here, there = clients
    here.store(TOKENS, KV)
    cluster.nodes["n0"].close(remove=False)
    cluster.start_node("n0")
    cluster.report_all()
    assert assert_is_prefix(there.fetch(TOKENS), PATH) == 8
    assert here.store(tokens_of((9,)), kv_of((9,))).new == 1
    check_nodes(cluster)
