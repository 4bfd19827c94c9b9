"""The policies of two nodes exchange statistics through the coordinator."""

import numpy as np
import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv import Config
from tiered_kv.clock import ManualClock
from tiered_kv.coordinator.coordinator import STATISTICS_BYTES_MAX, Coordinator
from tiered_kv.embedded import InProcessCluster
from tiered_kv.node.reporter import STATISTICS_EVERY_S
from tiered_kv.policy import create_history
from tiered_kv.policy.reuse import merge_statistics


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def cluster(checked, clock):
    """Two nodes that report only on request. The first one has seen prompts that are used again."""
    config = Config(host=1 << 20, heartbeat_s=1000.0, node_timeout_s=10_000.0, policy="adaptive")
    cluster = checked(InProcessCluster(config, 2, clock))
    cluster.nodes["n0"]._reporter.wake = lambda: None
    client = checked(cluster.client("n0", LAYOUT, NAMESPACE))
    for turn in range(30):
        path = (turn, 1, 2, turn % 3)
        client.store(tokens_of(path), kv_of(path))
        clock.advance(0.5)
        client.fetch(tokens_of(path))
        cluster.nodes["n0"].stats()
    return cluster


def history(cluster: InProcessCluster, node: str):
    return cluster.nodes[node]._learning._history


def others_of(cluster: InProcessCluster, node: str) -> bytes:
    """Returns the statistics of other nodes that this node has."""
    counts = history(cluster, node).model._others
    return b"" if not counts.any() else counts.sum().tobytes()


def age_s(cluster: InProcessCluster, node: str) -> float | None:
    return cluster.nodes[node].stats()["policy"]["adopted_age_s"]


def test_nodes_get_each_others_statistics_but_not_their_own(cluster, clock) -> None:
    cluster.report_all()
    cluster.report_all()
    taught, teacher = history(cluster, "n1"), history(cluster, "n0")
    teacher.learn(clock.now_s())
    assert not np.array_equal(taught.table, create_history().table), "at once, for the others know more than a new node"
    assert np.corrcoef(taught.table, teacher.table)[0, 1] > 0.99
    assert not others_of(cluster, "n0"), "n1 has seen nothing"
    clock.advance(3.0)
    assert age_s(cluster, "n1") == 3.0
    assert cluster.nodes["n1"].stats()["policy"] == {"name": "adaptive", "known_blocks": 0, "adopted_age_s": 3.0}
    assert cluster.nodes["n0"].stats()["policy"]["known_blocks"] > 60


def test_statistics_are_sent_at_intervals(cluster, clock, monkeypatch) -> None:
    told: list[bool] = []
    report = cluster.coordinator.report
    monkeypatch.setattr(cluster.coordinator, "report", lambda each: told.append(each.statistics is not None) or report(each))
    for _ in range(3):
        cluster.nodes["n0"].report()
    clock.advance(STATISTICS_EVERY_S)
    cluster.nodes["n0"].report()
    assert told == [True, False, False, True]
    assert cluster.coordinator._members["n0"].statistics == history(cluster, "n0").statistics()


def test_statistics_survive_a_restart_of_the_coordinator(cluster, clock) -> None:
    cluster.report_all()
    cluster.report_all()
    known = others_of(cluster, "n1")
    assert known
    cluster.unreachable.add("coordinator")
    clock.advance(100.0)
    cluster.report_all()
    assert others_of(cluster, "n1") == known
    assert age_s(cluster, "n1") == 100.0
    cluster.unreachable.clear()
    cluster.coordinator = Coordinator(clock, cluster.config.node_timeout_s)
    cluster.nodes["n1"].report()
    cluster.nodes["n1"].report()
    assert others_of(cluster, "n1") == known, "a coordinator that knows nothing yet takes nothing away"
    cluster.report_all()
    cluster.report_all()
    clock.advance(STATISTICS_EVERY_S)
    cluster.report_all()
    assert age_s(cluster, "n1") == 0.0
    assert others_of(cluster, "n1") == known


@pytest.mark.parametrize("garbage", [b"", b"\xff\xff\xff\xff", bytes(7), b"x" * (STATISTICS_BYTES_MAX + 4), "text", 7])
def test_invalid_statistics_of_a_node_are_logged_and_ignored(cluster, clock, caplog, monkeypatch, garbage) -> None:
    cluster.report_all()
    cluster.report_all()
    known = others_of(cluster, "n1")
    monkeypatch.setattr(history(cluster, "n0"), "statistics", lambda: garbage)
    for _ in range(2):
        clock.advance(STATISTICS_EVERY_S)
        cluster.report_all()
    assert "statistics of node n0 are ignored" in caplog.text
    assert others_of(cluster, "n1") == known, "what it said before still counts"
    assert cluster.nodes["n0"].stats()["coordinator"] is True


def test_invalid_statistics_of_the_coordinator_are_logged_and_ignored(cluster, clock, caplog) -> None:
    cluster.report_all()
    cluster.report_all()
    known = others_of(cluster, "n1")
    for garbage in (b"\x01", None, 5):
        cluster.nodes["n1"]._learning.adopt(garbage)
    assert others_of(cluster, "n1") == known
    assert len([record for record in caplog.records if "are ignored" in record.message]) == 3


def test_the_statistics_of_a_node_end_with_it(cluster, clock) -> None:
    cluster.report_all()
    cluster.start_node("n2")
    cluster.report_all()
    cluster.report_all()
    assert others_of(cluster, "n2")
    cluster.coordinator.forget("n0")
    clock.advance(STATISTICS_EVERY_S)
    cluster.nodes["n1"].report()
    cluster.nodes["n2"].report()
    assert not others_of(cluster, "n2"), "n1 has told that it knows nothing"
    cluster.nodes["n0"].report()
    cluster.nodes["n0"].report()
    clock.advance(STATISTICS_EVERY_S)
    cluster.report_all()
    assert others_of(cluster, "n2"), "it is back"


def test_a_policy_without_learning_sends_no_statistics(checked) -> None:
    cluster = checked(InProcessCluster(Config(host=1 << 20, heartbeat_s=1000.0, policy="lru"), 2, ManualClock()))
    cluster.report_all()
    cluster.nodes["n0"]._learning.adopt(merge_statistics([]))
    assert cluster.nodes["n0"]._learning.statistics() is None
    assert cluster.coordinator._members["n0"].statistics is None
    assert cluster.nodes["n0"].stats()["policy"] == {"name": "lru", "known_blocks": None, "adopted_age_s": None}
