"""The output of `tiered-kv status` for a cluster with missing parts. The nodes are real; Ray is a stand-in."""

import json
import threading
import time
from collections.abc import Iterator

import pytest

from tests.unit.serving.test_failures import served
from tiered_kv.cluster import attach, start, state, survey
from tiered_kv.cluster.commands import cli
from tiered_kv.cluster.state import ClusterState
from tiered_kv.errors import Kind, TieredKVError

IN_TIME_S = 5.0
GONE = TieredKVError(Kind.CLUSTER, "this Ray has no tiered_kv cluster that answers")


class World:
    """The answers of a cluster's parts: each a value, or an error to raise."""

    def __init__(self, coordinator: object, actors: object) -> None:
        self.coordinator = coordinator
        self.actors = actors
        self.elsewhere: dict[str, object] = {}
        self.join = lambda: None

    @staticmethod
    def answer(value: object) -> object:
        if isinstance(value, TieredKVError):
            raise value
        return value


@pytest.fixture
def world(node_factory, monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[World]:
    """A cluster "main" of "node-0" and "node-1", both on this machine and without problems."""
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path))
    nodes = [node_factory(node_id=f"node-{number}", cluster_id="surveyed") for number in range(2)]
    ClusterState(cluster_id="surveyed", address="127.0.0.1:6379", created_s=0.0, name="main").save()
    records = [{**node.info(), "address": "10.0.0.1", "silent_s": 0.4, "stats": node.stats()} for node in nodes]
    coordinator = {"cluster_id": "surveyed", "config": nodes[0].config, "nodes": records, "lost": {}}
    made = World(coordinator, ["node-0", "node-1"])
    monkeypatch.setattr(attach, "join", lambda *_: made.join())
    monkeypatch.setattr(start, "describe", lambda *_: made.answer(made.coordinator))
    monkeypatch.setattr(start, "nodes_of", lambda *_: made.answer(made.actors))
    monkeypatch.setattr(survey, "calls_to", lambda *_: lambda nodes, method: {node: made.elsewhere[node] for node in nodes})
    with served(nodes[0]), served(nodes[1]):
        yield made


def status(capsys: pytest.CaptureFixture) -> tuple[int, dict]:
    """Returns the exit status and the JSON of the command. Asserts that its table has a line for each expected node."""
    begun_s = time.monotonic()
    code = cli.main(["status", "--name", "main", "--json"])
    assert time.monotonic() - begun_s < survey.WITHIN_S + IN_TIME_S
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["status", "--name", "main"]) == code
    table = capsys.readouterr().out
    assert all(node in table for node in found["expected_nodes"])
    assert all(text in table for text in found["degraded"])
    return code, found


def names(found: dict) -> list[str]:
    return [node["node"] for node in found["nodes"]]


def test_a_healthy_cluster(world: World, capsys) -> None:
    code, found = status(capsys)
    assert (code, found["degraded"]) == (0, [])
    assert names(found) == found["expected_nodes"] == ["node-0", "node-1"]
    assert found["nodes"][0]["address"] == "10.0.0.1"


def test_a_silent_coordinator_is_reported_and_the_nodes_are_shown(world: World, capsys) -> None:
    world.coordinator = GONE
    code, found = status(capsys)
    assert code == 1
    assert found["degraded"] == [f"the coordinator does not answer: {GONE}"]
    assert names(found) == ["node-0", "node-1"]
    assert found["nodes"][0]["tiers"]["host"]["capacity_bytes"] > 60 << 20


def test_nodes_are_shown_right_after_a_restart_of_the_coordinator(world: World, capsys) -> None:
    world.coordinator["nodes"] = []
    code, found = status(capsys)
    assert code == 1
    assert found["degraded"] == [f"{node} runs, but has not reported to the coordinator yet" for node in ("node-0", "node-1")]
    assert names(found) == ["node-0", "node-1"]


def test_lost_nodes_are_reported(world: World, capsys) -> None:
    """The lost nodes are on another machine. Only the coordinator knows of one, and only Ray of the other."""
    silent = TieredKVError(Kind.TRANSPORT, "it does not answer (ActorUnavailableError)")
    world.coordinator["lost"] = {"node-2": 12.3}
    world.actors = ["node-0", "node-1", "node-3"]
    world.elsewhere = {"node-2": silent, "node-3": silent}
    code, found = status(capsys)
    assert code == 1
    assert found["degraded"] == ["node-2 does not answer (last report 12 s ago)", f"node-3 does not answer ({silent})"]
    assert found["expected_nodes"] == ["node-0", "node-1", "node-2", "node-3"]
    assert names(found) == ["node-0", "node-1"]


def test_a_hanging_local_node_is_reported_with_its_last_statistics(world: World, capsys, node_factory) -> None:
    """The node has a directory, but its socket does not answer."""
    node = node_factory(node_id="node-9", cluster_id="surveyed")
    world.coordinator["nodes"].append({**node.info(), "silent_s": 4.2, "stats": node.stats()})
    code, found = status(capsys)
    assert (code, found["degraded"]) == (1, ["node-9 does not answer (last report 4 s ago)"])
    assert names(found) == ["node-0", "node-1", "node-9"]


def test_local_nodes_are_shown_within_seconds_while_ray_hangs(world: World, capsys, monkeypatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(survey, "JOIN_WITHIN_S", 0.1)
    world.join = lambda: gate.wait(30.0)
    code, found = status(capsys)
    gate.set()
    assert code == 1
    assert found["degraded"] == ["the coordinator does not answer: no answer in time"]
    assert names(found) == ["node-0", "node-1"]


def test_a_cluster_without_nodes_gives_exit_status_1(world: World, capsys, monkeypatch) -> None:
    world.coordinator |= {"nodes": [], "cluster_id": "another"}
    world.actors = []
    code, found = status(capsys)
    assert (code, found["degraded"]) == (1, ["no cache node of this cluster is known"])


def test_a_ray_that_does_not_list_its_actors_is_reported(world: World, capsys) -> None:
    world.actors = TieredKVError(Kind.CLUSTER, "too slow")
    code, found = status(capsys)
    assert (code, found["degraded"]) == (1, ["Ray does not list its node actors: too slow"])


def test_an_unknown_cluster_gives_exit_status_1(world: World, capsys) -> None:
    state.remove("main")
    world.coordinator = GONE
    assert cli.main(["status", "--name", "main"]) == 1


def test_pairs_of_nodes_that_cannot_talk_are_named() -> None:
    failed = {"blocks": 0, "bytes": 0, "seconds": 0.0, "failures": {"connect": 3}, "last_failure": "nobody answers at 10.0.0.2:7400"}
    nodes = [
        {
            "node": "n0",
            "stats": {"peers": {"peers": {"n1": failed | {"last_failure_age_s": 3.0}, "n2": failed | {"last_failure_age_s": 600.0}}}},
        },
        {"node": "n1", "stats": {"peers": {"peers": {"n0": {"blocks": 7, "failures": {"timeout": 1}}}}}},
        {"node": "n2", "stats": {}},
        {"node": "n3"},
    ]
    assert survey.failing_pairs(nodes) == ["n0 cannot reach n1 over a stream: nobody answers at 10.0.0.2:7400"]
    assert survey.failing_pairs(nodes, {"n0", "n2"}) == [], "n1 was drained, or is lost and named as that"
    nodes[0]["stats"]["peers"]["peers"] = {"coordinator": nodes[0]["stats"]["peers"]["peers"]["n1"]}
    assert len(survey.failing_pairs(nodes, {"n0", "n2"})) == 1, "the coordinator is no node, and look-ups of n0 fail"
