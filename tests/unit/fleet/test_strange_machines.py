"""Machines that differ: clocks that are off by an hour, less shared memory, another version, and two clusters on one machine."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.sources import ROOT
from tests.unit.fleet.ground import Clock
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv.cluster import survey
from tiered_kv.cluster.localnodes import LocalNodes
from tiered_kv.cluster.state import ClusterState
from tiered_kv.cluster.status import summarize
from tiered_kv.config import Config
from tiered_kv.embedded import InProcessCluster, InProcessLink
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.lifetime.leaving import inventory, take_over
from tiered_kv.node.node import Node
from tiered_kv.protocol.fleet import FleetMember, FleetRecord, FleetStatus
from tiered_kv.protocol.node_record import FILE_NAME, NodeRecord, read_record, write_record

PATH = (1, 2, 3, 4)
HOUR_S = 3600.0
WALL_CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "time.localtime", "time.gmtime"}
MAY_READ_THE_TIME_OF_DAY = {
    "tiered_kv/memory/shared.py": "the age of a folder in which no heartbeat can be read, beside its file's time on the same machine",
    "tiered_kv/file_sums.py": "the times of files on the same machine",
    "tiered_kv/checkpoint/repository.py": "names and leases of checkpoints",
    "cluster/start.py": "shown to people",
    "actors/coordinator.py": "the number of a new weight epoch, which is larger than the former one whatever the clock says",
    "tiered_kv/embedded.py": "the same, in one process",
    "tiered_kv/node/admission/epochs.py": "the same, without a cluster; and the bound of a day for numbers that workers tell",
    "cluster/status.py": "shown to people",
    "cluster/commands/checkpoints.py": "shown to people, and the time of the last checkpoint",
}


@pytest.mark.parametrize("offset_s", [HOUR_S, -HOUR_S])
def test_a_node_whose_clock_is_off_by_an_hour_serves_and_is_served(checked: Callable, offset_s: float) -> None:
    """Every part has a clock of its own: coordinator and "n0" one, "n1" another."""
    right, wrong = Clock(), Clock()
    wrong.now += offset_s
    config = Config.of({"host": "4MiB", "policy": "adaptive", "heartbeat_s": 1000.0, "node_timeout_s": 1e5})
    cluster = checked(InProcessCluster(config, 1, clock=right))
    cluster.nodes["n1"] = Node(config, cluster.cluster_id, "n1", InProcessLink(cluster, "n1"), clock=wrong)
    for first, second in (("n0", "n1"), ("n1", "n0")):
        path = (*PATH, int(first[1]))
        with cluster.client(first, LAYOUT, NAMESPACE) as client:
            client.store(tokens_of(path), kv_of(path))
        cluster.report_all()
        with cluster.client(second, LAYOUT, NAMESPACE) as client:
            assert assert_is_prefix(client.fetch(tokens_of(path)), path) == 5
    for _ in range(3):  # with the policies' statistics
        right.now, wrong.now = right.now + 11, wrong.now + 11
        cluster.report_all()
    nodes = {node["node"]: node for node in cluster.coordinator.nodes()}
    assert [node["silent_s"] for node in nodes.values()] == [0, 0]
    assert cluster.coordinator.lost() == {}
    ages = [cluster.nodes[node].stats()["policy"]["adopted_age_s"] for node in ("n0", "n1")]
    assert all(age is not None and 0 <= age <= 11 for age in ages), ages
    handed = inventory(cluster.nodes["n1"])
    assert take_over(cluster.nodes["n0"], handed.runs, handed.models, 5.0) == sum(len(run.keys) for run in handed.runs)


def test_nothing_that_serves_reads_the_time_of_day() -> None:
    found = {
        str(path.relative_to(ROOT))
        for folder in ("tiered_kv", "actors", "cluster")
        for path in (ROOT / folder).rglob("*.py")
        if "tools" not in path.parts and not path.is_symlink() and "integrations" not in path.parts and reads_the_time_of_day(path)
    }
    assert found == set(MAY_READ_THE_TIME_OF_DAY)


def reads_the_time_of_day(path: Path) -> bool:
    tree = ast.parse(path.read_text())
    return any(ast.unparse(node) in WALL_CLOCKS for node in ast.walk(tree) if isinstance(node, ast.Attribute))


def described(nodes: list[Node], members: dict[str, tuple[str, str]], **more: Any) -> survey.Answers:
    """Returns the answers of a cluster's coordinator and of Ray. `members`: by node its address and state."""
    fleet: FleetStatus = {
        "selector": None,
        "members": [{"node": node, "address": place, "state": state, "since_s": 12.0} | more for node, (place, state) in members.items()],
        "ray_nodes": len(members),
        "rounds": 5,
        "round_age_s": 0.5,
        "problem": "",
        "restarts": 0,
        "uptime_s": 60.0,
    }
    listed = [{**node.info(), "silent_s": 0.1, "stats": node.stats()} for node in nodes]
    about = {"cluster_id": "c1", "config": nodes[0].config if nodes else Config(), "nodes": listed, "lost": {}, "fleet": fleet}
    return survey.Answers(about, [node.node_id for node in nodes])


def merged(answers: survey.Answers, nodes: list[Node]) -> dict:
    stats = {node.node_id: node.stats() for node in nodes}
    return summarize(survey.merged(answers, None, {}, stats))


@pytest.mark.parametrize(
    ("state", "more", "text"),
    [
        ("refused", {"error": "host: too small", "kind": "memory"}, "node-1 at 10.0.0.2 cannot start: host: too small"),
        ("refused", {}, "node-1 at 10.0.0.2 cannot start: it is tried again now"),
        (
            "lost",
            {},
            "node-1 at 10.0.0.2 is lost: its Ray node left 12 s ago; if it will not come back: tiered-kv drain node-1",
        ),
        ("starting", {}, "node-1 at 10.0.0.2 has been starting for 12 s"),
        ("silent", {}, "node-1 does not answer (not called, because Ray does not answer)"),
    ],
)
def test_a_node_that_does_not_serve_is_named_while_others_serve(node_factory, state: str, more: dict, text: str) -> None:
    """A machine that joined with a smaller /dev/shm is among them."""
    node = node_factory(node_id="node-0")
    answers = described([node], {"node-0": ("10.0.0.1", "serving")})
    answers.coordinator["fleet"]["members"].append({"node": "node-1", "address": "10.0.0.2", "state": state, "since_s": 12.0} | more)
    found = merged(answers, [node])
    assert found["degraded"] == [text]
    assert (found["answering_nodes"], found["expected_nodes"]) == (1, ["node-0", "node-1"])
    assert found["lost_nodes"] == (["node-1"] if state == "lost" else [])


def test_a_drained_node_is_no_problem_and_not_expected(node_factory) -> None:
    node = node_factory(node_id="node-0")
    found = merged(described([node], {"node-0": ("10.0.0.1", "serving"), "node-1": ("10.0.0.2", "drained")}), [node])
    assert (found["degraded"], found["expected_nodes"], found["drained_nodes"]) == ([], ["node-0"], ["node-1"])


def test_a_keeper_that_cannot_work_is_a_problem(node_factory) -> None:
    node = node_factory(node_id="node-0")
    for change, text in {
        ("problem", "Ray is away"): "nodes that join or leave are not followed: Ray is away",
        ("round_age_s", 99.0): "nodes that join or leave have not been followed for 99 s: Ray does not answer the coordinator",
    }.items():
        answers = described([node], {"node-0": ("10.0.0.1", "serving")})
        answers.coordinator["fleet"][change[0]] = change[1]
        assert merged(answers, [node])["degraded"] == [text]


def test_nodes_are_listed_by_number(node_factory) -> None:
    members = {f"node-{number}": ("10.0.0.1", "silent") for number in (10, 2, 9)}
    assert survey.expected_nodes(described([], members), ["x", "n1"]) == ["n1", "node-2", "node-9", "node-10", "x"]


# Without Ray and without a state file


@pytest.fixture
def own_shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for shared memory, and an empty folder for state files."""
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return tmp_path


def recorded(node: Node, cluster: str, cluster_id: str, **more: Any) -> NodeRecord:
    info = {**node.info(), "settings": {"host": node.config.host, "policy": "lru", "quality": "compact"}}
    record = NodeRecord(cluster, cluster_id, node.node_id, info, ray_address="10.0.0.5:6379", ray_node_id="r", **more)
    write_record(record)
    return record


def test_the_nodes_own_record_tells_the_cluster_when_nothing_else_does(node_factory, own_shm: Path) -> None:
    node = node_factory(node_id="node-0", cluster_id="c77")
    recorded(node, "only-here", "c77")
    known = survey.on_this_machine("only-here")
    assert known is not None
    assert (known.cluster_id, known.address, known.config["policy"]) == ("c77", "10.0.0.5:6379", "lru")
    answers = survey.Answers(TieredKVError(Kind.CLUSTER, "gone"), TieredKVError(Kind.CLUSTER, "gone"))
    found = summarize(survey.merged(answers, known, {"node-0": str(node.directory)}, {"node-0": node.stats()}))
    assert (found["source"], found["policy"], found["quality"]) == ("machine", "lru", "compact")
    assert (found["coordinator"], found["answering_nodes"]) == (None, 1)
    assert found == json.loads(json.dumps(found))
    assert survey.on_this_machine("other") is None


def test_a_record_without_settings_is_that_of_an_older_version(node_factory, own_shm: Path) -> None:
    node = node_factory(node_id="node-0", cluster_id="c78")
    write_record(NodeRecord("older", "c78", "node-0", node.info(), ray_address=None))
    known = survey.on_this_machine("older")
    assert known is not None
    assert known.config == {"block_tokens": node.config.block_tokens}


def test_statistics_of_an_older_version_are_shown_without_what_they_lack(node_factory) -> None:
    node = node_factory(node_id="node-0")
    stats = {name: value for name, value in node.stats().items() if name not in ("uptime_s", "restarts", "refused_blocks", "rates")}
    answers = described([node], {"node-0": ("10.0.0.1", "serving")})
    found = summarize(survey.merged(answers, None, {}, {"node-0": stats}))
    assert (found["nodes"][0]["uptime_s"], found["degraded"]) == (None, [])


# Two clusters on one machine


def test_two_clusters_of_one_name_and_disk_folder_keep_apart(node_factory, client_factory, tmp_path: Path) -> None:
    first = node_factory(node_id="node-0", cluster_id="aaa", disk="8MiB", disk_path=str(tmp_path))
    second = node_factory(node_id="node-0", cluster_id="bbb", disk="8MiB", disk_path=str(tmp_path))
    assert first.directory != second.directory
    assert first.storage.disk.folder != second.storage.disk.folder
    client_factory(first, LAYOUT, NAMESPACE).store(tokens_of(PATH), kv_of(PATH))
    assert client_factory(second, LAYOUT, NAMESPACE).fetch(tokens_of(PATH)).tokens == 0


def test_a_node_of_another_version_is_an_error_in_words(node_factory, own_shm: Path) -> None:
    node = node_factory(node_id="node-0", cluster_id="c79")
    recorded(node, "mixed", "c79", protocol=999, package="9.9.9")
    ClusterState("c79", "10.0.0.5:6379", 0.0, "mixed").save()
    with pytest.raises(
        TieredKVError, match=r"node-0 of cluster 'mixed' must use version \d+ of the session protocol.* runs tiered_kv 9\.9\.9"
    ):
        LocalNodes("mixed").find()


def test_a_state_file_of_another_version_is_an_error_in_words(own_shm: Path) -> None:
    path = ClusterState("c80", "10.0.0.5:6379", 0.0, "newer").save()
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    from tiered_kv.cluster import state

    with pytest.raises(TieredKVError, match=r"version must be 1, got 7. Delete it if the cluster no longer runs"):
        state.find("newer")


def test_a_record_of_another_version_in_ray_is_an_error_in_words() -> None:
    data = FleetRecord("c1", {}, members={"node-0": FleetMember("a")}).as_bytes().replace(b'"version": 1', b'"version": 9')
    with pytest.raises(TieredKVError, match="version must be 1, got 9; stop the cluster with `tiered-kv down`"):
        FleetRecord.of_bytes(data)


def test_a_damaged_record_of_a_node_is_passed_over(node_factory, own_shm: Path) -> None:
    node = node_factory(node_id="node-0", cluster_id="c81")
    recorded(node, "damaged", "c81")
    (node.directory / FILE_NAME).write_text("{")
    assert read_record(node.directory) is None
    assert survey.on_this_machine("damaged") is None
