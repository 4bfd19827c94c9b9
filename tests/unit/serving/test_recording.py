"""Recording the requests of nodes: each node's recording, and the trace merged from them."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv import Config, Hint
from tiered_kv.clock import ManualClock
from tiered_kv.cluster.commands import record
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import as_token_ids, chain_keys
from tiered_kv.node.trace_recorder import PENDING_S
from tiered_kv.node.trace_recording import UNREAD_S
from tiered_kv.tools.simulate.replay import replay
from tiered_kv.tools.simulate.trace import read_trace
from tiered_kv.tools.simulate.write import TraceWriter

T = LAYOUT.block_tokens
SALT = b"salt"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def make_cluster(checked, clock):
    def make(nodes: int = 2, **settings: object) -> InProcessCluster:
        return checked(InProcessCluster(Config.of({"host": "1MiB", "heartbeat_s": 1000.0, "block_tokens": T, **settings}), nodes, clock))

    return make


def requester(cluster: InProcessCluster, node: str, checked: Callable) -> Callable:
    """Returns a function that makes a worker's request: a fetch, then a store of the missing blocks. It returns the number of hits."""
    client = checked(cluster.client(node, LAYOUT, NAMESPACE))

    def request(path: tuple[int, ...], answer_tokens: int = 5) -> int:
        hit = client.fetch(tokens_of(path)).tokens // T
        rest = torch.zeros(LAYOUT.kv_shape((len(path) - hit) * T))
        client.store(tokens_of(path), rest, start=hit * T, hint=Hint(answer_tokens=answer_tokens))
        return hit

    return request


def calls_to(cluster: InProcessCluster) -> record.Ask:
    def ask_one(node: str, method: str, arguments: tuple) -> object:
        if node not in cluster.nodes:
            return TieredKVError(Kind.TRANSPORT, "it is not there")
        try:
            return getattr(cluster.nodes[node], method)(*arguments)
        except TieredKVError as error:
            return error

    return lambda nodes, method, *arguments: {node: ask_one(node, method, arguments) for node in nodes}


def recording_of(cluster: InProcessCluster, clock: ManualClock) -> tuple[record.ClusterRecording, list[dict], list[str]]:
    lines, said = [], []
    return record.ClusterRecording(calls_to(cluster), ["n0", "n1"], lines.append, said.append, clock.now_s), lines, said


# One node


def test_a_node_records_whole_requests_while_recording_is_on(make_cluster, checked, clock) -> None:
    cluster = make_cluster(1)
    node, request = cluster.nodes["n0"], requester(cluster, "n0", checked)
    request((1, 2))
    node.record(True, SALT)
    assert node.stats()["recording"] is True
    clock.advance(0.25)
    assert request((1, 2, 3, 4), answer_tokens=77) == 2
    clock.advance(1.0)
    request((9,))
    assert node.recorded() == ([], 0), "they may go on"
    clock.advance(PENDING_S + 0.1)
    (first, second), lost = node.recorded()
    assert lost == 0
    assert (first["timestamp"], first["input_length"], first["output_length"]) == (250, 4 * T, 77)
    assert (second["timestamp"], second["input_length"], len(second["hash_ids"])) == (1250, T, 1)
    assert len(set(first["hash_ids"])) == 4
    request((5, 5))
    node.record(False)
    request((6, 6))
    assert node.stats()["recording"] is False
    with pytest.raises(TieredKVError, match="is not recording") as caught:
        node.recorded()
    assert caught.value.kind is Kind.CLOSED


def test_a_request_with_a_pull_is_recorded_once_at_its_node(make_cluster, checked, clock) -> None:
    cluster = make_cluster()
    here, there = requester(cluster, "n0", checked), requester(cluster, "n1", checked)
    here((1, 2, 3))
    cluster.report_all()
    for node in cluster.nodes.values():
        node.record(True, SALT)
    assert there((1, 2, 3, 4)) == 3
    assert cluster.nodes["n0"].recorded(everything=True).requests == [], "serving a peer is no request"
    [line] = cluster.nodes["n1"].recorded(everything=True).requests
    assert line["input_length"] == 4 * T


def test_only_one_recorder_can_record_a_node_at_a_time(make_cluster, clock) -> None:
    node = make_cluster(1).nodes["n0"]
    assert node.record(True, SALT) == 0.0
    clock.advance(2.0)
    assert node.record(True, SALT) == 2.0, "the same one goes on"
    with pytest.raises(TieredKVError, match="another recording"):
        node.record(True, b"other")
    clock.advance(UNREAD_S)
    node.recorded()
    clock.advance(UNREAD_S)
    node.beat()
    assert node.stats()["recording"] is True
    clock.advance(0.1)
    node.beat()
    assert node.stats()["recording"] is False
    node.record(True, b"other")


def test_a_chain_without_its_first_blocks_is_left_out_and_counted(make_cluster, checked, clock) -> None:
    cluster = make_cluster(1)
    node = cluster.nodes["n0"]
    node.record(True, SALT)
    client = checked(cluster.client("n0", LAYOUT, NAMESPACE))
    assert client.store(tokens_of((1, 2, 3)), kv_of((1, 2, 3), first=1), start=T).new == 2
    assert node.recorded(everything=True) == ([], 1)
    client.store(tokens_of((1,)), kv_of((1,)))
    client.fetch(tokens_of((1, 2, 3)))
    requests, lost = node.recorded(everything=True)
    assert ([request["input_length"] for request in requests], lost) == ([T, 3 * T], 1)


def test_recording_changes_no_decision(make_cluster, checked, clock) -> None:
    """The same requests with and without recording leave the same blocks cached."""
    left = []
    for on in (False, True):
        cluster = make_cluster(1, policy="adaptive", seed=1)
        request = requester(cluster, "n0", checked)
        if on:
            cluster.nodes["n0"].record(True, SALT)
        for number in range(150):
            request((number % 7, number % 31, number))
            cluster.nodes["n0"].stats()
        left.append(sorted(cluster.nodes["n0"].engine.machine.blocks))
    assert left[0] == left[1]
    assert 0 < len(left[0]) < 300


# A cluster


@pytest.mark.parametrize("name", ["trace-b16.jsonl", "trace-b16.jsonl.zst"])
def test_replaying_a_recorded_trace_gives_the_same_hits(make_cluster, checked, clock, tmp_path: Path, name: str) -> None:
    cluster = make_cluster()
    asked = [requester(cluster, node, checked) for node in ("n0", "n1")]
    hits = 0
    with TraceWriter(tmp_path / name) as trace:
        recording = record.ClusterRecording(calls_to(cluster), ["n0", "n1"], trace.write, lambda _: None, clock.now_s)
        recording.start()
        for number in range(40):
            clock.advance(0.4)
            cluster.report_all()
            hits += asked[number % 2]((number % 4, number % 8, number % 16))
            if number % 5 == 0:
                recording.poll()
                recording.check()
        recording.finish()
    found = read_trace(tmp_path / name)
    found.check()
    assert found.notes == (), "sorted by time"
    assert (len(found), found.block_tokens, found.unique_blocks) == (40, T, 4 + 8 + 16)
    assert recording.requests == 40
    assert recording.blocks == 120
    assert recording.lost == 0
    assert found.output_tokens.tolist() == [5] * 40
    assert found.times_s[0] == pytest.approx(0.4)
    assert replay(found, "lru", 1.0).hit_blocks == hits == 120 - 28
    assert all(node.stats()["recording"] is False for node in cluster.nodes.values())


def test_a_blocks_id_is_equal_on_all_nodes_and_is_not_its_key(make_cluster, checked, clock) -> None:
    cluster = make_cluster()
    recording, lines, _ = recording_of(cluster, clock)
    recording.start()
    for node in cluster.nodes:
        requester(cluster, node, checked)((1, 2))
    recording.finish()
    assert lines[0]["hash_ids"] == lines[1]["hash_ids"]
    keys = chain_keys(NAMESPACE.root(LAYOUT), as_token_ids(tokens_of((1, 2))), T)
    assert not {int.from_bytes(key[:8]) >> 11 for key in keys} & set(lines[0]["hash_ids"])


def test_requests_are_written_after_earlier_ones_of_slower_nodes(make_cluster, checked, clock) -> None:
    cluster = make_cluster()
    early, late = requester(cluster, "n0", checked), requester(cluster, "n1", checked)
    recording, lines, _ = recording_of(cluster, clock)
    recording.start()
    early((1,))
    clock.advance(1.0)
    late((2,))
    late((2,))  # ends the one before
    recording.poll()
    assert lines == []
    clock.advance(PENDING_S)
    recording.poll()
    assert [line["timestamp"] for line in lines] == [0]
    clock.advance(0.1)
    recording.poll()
    assert [line["timestamp"] for line in lines] == [0, 1000, 1000]
    recording.finish()
    assert recording.requests == 3


def test_recording_continues_without_a_dead_node_and_includes_it_when_it_returns(make_cluster, checked, clock) -> None:
    cluster = make_cluster()
    here, there = requester(cluster, "n0", checked), requester(cluster, "n1", checked)
    recording, lines, said = recording_of(cluster, clock)
    recording.start()
    clock.advance(1.0)
    there((1,))
    clock.advance(PENDING_S + 1)
    recording.poll()
    cluster.nodes["n1"].close(remove=False)
    here((2,))
    for _ in range(2):
        clock.advance(PENDING_S + 1)
        recording.poll()
    assert [line["timestamp"] for line in lines] == [1000, 7000]
    assert [line.split(":")[0] for line in said] == ["recording continues without n1"]
    assert recording.recording == ["n0"]
    cluster.start_node("n1")
    recording.poll()
    assert said[1:] == ["n1 answers again and records again"]
    clock.advance(1.0)
    requester(cluster, "n1", checked)((3,))
    recording.finish()
    assert [line["timestamp"] for line in lines] == [1000, 7000, 20_000]


def test_requests_of_a_node_that_was_silent_keep_their_times(make_cluster, checked, clock) -> None:
    cluster = make_cluster()
    request = requester(cluster, "n1", checked)
    recording, lines, said = recording_of(cluster, clock)
    recording.start()
    clock.advance(3.0)
    request((1,))
    node = cluster.nodes.pop("n1")
    clock.advance(10.0)
    recording.poll()
    cluster.nodes["n1"] = node
    clock.advance(10.0)
    recording.finish()
    assert [line["timestamp"] for line in lines] == [3000]
    assert len(said) == 2


def test_without_a_node_to_record_the_error_has_the_reason(make_cluster, clock) -> None:
    cluster = make_cluster()
    for node in cluster.nodes.values():
        node.record(True, b"other")
    recording, _, said = recording_of(cluster, clock)
    with pytest.raises(TieredKVError, match="another recording"):
        recording.start()
    assert len(said) == 2
    assert not recording.nobody_answers
    with pytest.raises(TieredKVError, match="no nodes"):
        record.ClusterRecording(calls_to(cluster), [], said.append, said.append, clock.now_s).start()
    clock.advance(record.NOBODY_S + 1)
    assert recording.nobody_answers


def test_a_failed_write_of_the_trace_stops_recording_on_the_nodes(make_cluster, checked, clock) -> None:
    cluster = make_cluster()

    def refuse(_: dict) -> None:
        raise TieredKVError(Kind.CONFIG, "--out: cannot write", setting="out")

    recording = record.ClusterRecording(calls_to(cluster), ["n0", "n1"], refuse, lambda _: None, clock.now_s)
    stopped = threading.Event()
    request = requester(cluster, "n0", checked)
    start = recording.start
    recording.start = lambda: (start(), request((1,)), stopped.set())
    with pytest.raises(TieredKVError, match="cannot write"):
        record.record(recording, None, Console(quiet=True), stopped)
    assert not any(node.stats()["recording"] for node in cluster.nodes.values())


@pytest.mark.parametrize(
    ("name", "says"), [("a-b16.jsonl.zst", True), ("dir-b16/a.jsonl", False), ("a-b160.jsonl", False), ("a-b8-b16.jsonl", False)]
)
def test_the_traces_name_has_the_block_size_that_simulate_reads(name: str, says: bool) -> None:
    assert record.names_blocks(name, 16) is says
