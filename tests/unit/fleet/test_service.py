"""A node's counts of its own service: uptime, restarts, refusals, and rates of hits."""

import pytest

from tests.unit.fleet.ground import Clock
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv.node.lifetime.counters import WINDOW_S, ServiceCounters


def test_rates_are_means_over_the_last_seconds() -> None:
    clock = Clock()
    counters = ServiceCounters(clock, generation=1)
    assert counters.stats(5, 500)["rates"] == {"over_s": 0.0, "hit_blocks_per_s": 0.0, "hit_bytes_per_s": 0.0}
    for second in range(1, 31):
        clock.now += 1
        rates = counters.stats(5 + 10 * second, 500 + 1000 * second)["rates"]
        assert rates["hit_blocks_per_s"] == 10
        assert rates["hit_bytes_per_s"] == 1000
        assert rates["over_s"] == min(second, WINDOW_S)
    for _ in range(2 * int(WINDOW_S)):
        clock.now += 1
        rates = counters.stats(305, 30_500)["rates"]
    assert (rates["hit_blocks_per_s"], rates["over_s"]) == (0, WINDOW_S)


def test_frequent_questions_do_not_shorten_the_window() -> None:
    clock = Clock()
    counters = ServiceCounters(clock, generation=1)
    for step in range(1000):
        clock.now += 0.05
        rates = counters.stats(step, 0)["rates"]
    assert rates["over_s"] == pytest.approx(WINDOW_S, abs=1.1)
    assert rates["hit_blocks_per_s"] == pytest.approx(20, rel=0.01)
    assert len(counters._samples) <= WINDOW_S + 2


def test_a_node_reports_its_service(node_factory, client_factory) -> None:
    clock = Clock()
    node = node_factory(host="1MiB", store_wait_ms=0, clock=clock)
    client = client_factory(node, LAYOUT, NAMESPACE)
    path = (1, 2, 3)
    client.store(tokens_of(path), kv_of(path))
    node.stats()
    for _ in range(4):
        client.fetch(tokens_of(path))
        node.engine.drain_touches()
    clock.now += 2
    stats = node.stats()
    assert (stats["uptime_s"], stats["restarts"], stats["refused_blocks"]) == (2, 0, 0)
    assert stats["rates"]["hit_blocks_per_s"] == 4 * 3 / 2
    assert stats["rates"]["hit_bytes_per_s"] == 4 * 3 * LAYOUT.block_bytes / 2
    session = node.open_session()
    assert session.reserve(2 << 20, [b"k" * 32] * 3, None) == []
    session.close()
    assert node.stats()["refused_blocks"] == 3


def test_a_restart_of_a_node_with_its_files_is_counted(node_factory) -> None:
    node = node_factory(cluster_id="again")
    assert node.stats()["restarts"] == 0
    node.close(remove=False)
    following = node_factory(cluster_id="again")
    assert following.stats()["restarts"] == 1
    assert following.stats()["uptime_s"] < 60
