"""Clocks of different machines differ: no component compares its own clock with another's."""

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config
from tiered_kv.clock import ManualClock
from tiered_kv.embedded import InProcessCluster

PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)
HOUR_S = 3600.0
TIMEOUT_S = 4.0


@pytest.mark.parametrize("ahead_s", [HOUR_S, -HOUR_S])
def test_a_node_whose_clock_is_off_by_an_hour_is_neither_lost_nor_avoided(checked, ahead_s: float) -> None:
    config = Config.of({"host": "1MiB", "heartbeat_s": 1000.0, "node_timeout_s": TIMEOUT_S})
    clocks = [ManualClock(10 * HOUR_S), ManualClock(10 * HOUR_S + ahead_s)]
    cluster = checked(InProcessCluster(config, 1, clocks[0]))
    cluster._clock = clocks[1]
    second = cluster.start_node("n1")
    here, there = (checked(cluster.client(node, LAYOUT, NAMESPACE)) for node in ("n0", "n1"))
    cluster.report_all()
    here.store(TOKENS, KV)
    for _ in range(5):
        for clock in clocks:
            clock.advance(TIMEOUT_S / 2)
        cluster.report_all()
    assert [node["node"] for node in cluster.coordinator.nodes()] == ["n0", "n1"]
    assert all(node["silent_s"] == 0 for node in cluster.coordinator.nodes())
    assert cluster.coordinator.lost() == {}
    fetched = there.fetch(TOKENS)
    assert assert_is_prefix(fetched, PATH) == len(PATH)
    assert fetched.tokens_by_tier == {"peer": len(TOKENS)}
    clocks[0].advance(TIMEOUT_S + 1)
    second.report()
    assert list(cluster.coordinator.lost()) == ["n0"], "who is silent is judged by the coordinator's clock alone"
    cluster.report_all()
    assert cluster.coordinator.lost() == {}
