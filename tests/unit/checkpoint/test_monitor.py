"""Metrics, alerts that are raised once, and their export."""

import json
import subprocess
import sys

import pytest

from tests.sources import ROOT
from tiered_kv.clock import ManualClock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.monitoring import CacheMonitor, MetricsExporter, TensorBoardWriter, WandbWriter


def stats(lookups: int, hits: int, **more: float) -> dict:
    return {"lookups": lookups, "hits": hits, "hit_rate": hits / lookups if lookups else 0.0, **more}


def test_metrics_are_computed_over_the_window() -> None:
    clock = ManualClock()
    monitor = CacheMonitor(window_size=3, clock=clock)
    for seconds in (9.0, 0.1, 0.2, 0.3):
        clock.advance(0.5)
        monitor.record_operation(seconds)
    clock.advance(1.0)
    for lookups, hits in [(100, 0), (110, 5), (120, 10), (130, 20)]:
        metrics = monitor.update_metrics(stats(lookups, hits, evictions=4, memory_usage_bytes=1 << 19, capacity_bytes=1 << 20))
    assert metrics.hit_rate == 20 / 130
    assert metrics.recent_hit_rate == 20 / 30
    assert metrics.misses == 110
    assert metrics.memory_share == 0.5
    assert metrics.operations == 4
    assert metrics.operation_time_s == pytest.approx(0.2)
    assert metrics.operation_time_p99_s == 0.3
    assert metrics.operations_per_s == 3 / 2
    assert monitor.update_metrics(stats(4, 4)).recent_hit_rate == 1.0, "a cache that was cleared begins anew"


def test_an_alert_is_raised_once_and_ends_with_hysteresis() -> None:
    said = []
    monitor = CacheMonitor(alert_thresholds={"hit_rate": 0.5, "memory_usage_mb": 100}, on_alert=said.append)
    monitor.update_metrics(stats(0, 0))
    assert not said, "nothing was looked for yet"
    course = [(0.6, 0, 0), (0.49, 1, 1), (0.4, 1, 1), (0.51, 1, 1), (0.49, 1, 1), (0.53, 0, 1), (0.49, 1, 2)]
    for rate, going_on, begun in course:
        monitor.update_metrics({"lookups": 100, "hits": 100 * rate, "hit_rate": rate, "memory_usage_mb": 5})
        assert (len(monitor.get_alerts()), len(said)) == (going_on, begun)
    alert = said[0]
    assert (alert.metric, alert.bound, alert.threshold, alert.value) == ("hit_rate", "lower", 0.5, 0.49)
    assert "hit rate is 0.49, below 0.5" in alert.message
    assert "max_tokens" in alert.message
    for used, going_on in [(100, 0), (101, 1), (99, 1), (95, 0)]:
        monitor.update_metrics(stats(10, 9, memory_usage_mb=used))
        assert len(monitor.get_alerts()) == going_on
    assert said[-1].bound == "upper"
    assert "above 100" in said[-1].message


def test_a_metric_can_have_two_bounds() -> None:
    monitor = CacheMonitor(alert_thresholds={"memory_share": (0.1, 0.9), "recent_hit_rate": (None, 0.8)})
    for used, bounds in [(50, []), (95, ["upper"]), (88, ["upper"]), (50, []), (5, ["lower"]), (50, [])]:
        monitor.update_metrics(stats(10, 2, memory_usage_bytes=used, capacity_bytes=100))
        assert [alert.bound for alert in monitor.get_alerts()] == bounds


@pytest.mark.parametrize("threshold", [0.97, 1.0])
def test_an_alert_of_a_rate_ends_at_a_rate_of_one(threshold: float) -> None:
    monitor = CacheMonitor(alert_thresholds={"hit_rate": threshold})
    for hits, going_on in [(90, 1), (99, 1), (100, 0)]:
        monitor.update_metrics(stats(100, hits))
        assert len(monitor.get_alerts()) == going_on


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        {"hitrate": 0.3},
        {"hit_rate": "0.3"},
        {"hit_rate": (0.9, 0.1)},
        {"hit_rate": (None, None)},
        {"hit_rate": (1, 2, 3)},
        {"evictions": float("nan")},
        {"evictions": True},
    ],
)
def test_invalid_thresholds_are_refused(wrong: object) -> None:
    with pytest.raises(TieredKVError, match="alert_thresholds") as caught:
        CacheMonitor(alert_thresholds=wrong)
    assert caught.value.kind is Kind.CONFIG
    if isinstance(wrong, dict) and "hitrate" in wrong:
        assert "recent_hit_rate, memory_usage_mb" in str(caught.value)


def test_invalid_windows_and_times_are_refused() -> None:
    for window in (0, 1.5, True):
        with pytest.raises(TieredKVError, match="window_size: must be a whole number of at least 1"):
            CacheMonitor(window_size=window)
    for seconds in (-1, float("nan"), float("inf"), "1", None):
        with pytest.raises(TieredKVError, match="operation_time: must be a number of seconds"):
            CacheMonitor().record_operation(seconds)


@pytest.fixture
def watched() -> CacheMonitor:
    monitor = CacheMonitor(alert_thresholds={"hit_rate": 0.9})
    monitor.record_operation(0.25)
    monitor.update_metrics(stats(10, 5, memory_usage_mb=3.5))
    return monitor


def test_export_to_a_dictionary(watched) -> None:
    exported = json.loads(json.dumps(MetricsExporter.export_to_dict(watched)))
    assert exported["metrics"]["hit_rate"] == 0.5
    assert exported["alerts_fired"] == 1
    assert exported == watched.get_summary()


def test_export_to_prometheus_is_in_its_text_format(watched) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    families = {
        family.name: family for family in parser.text_string_to_metric_families(MetricsExporter.export_to_prometheus_format(watched))
    }
    assert families["tiered_kv_cache_hit_rate"].samples[0].value == 0.5
    assert families["tiered_kv_cache_lookups"].type == "counter"
    assert families["tiered_kv_cache_lookups"].samples[0].value == 10
    alert = families["tiered_kv_cache_alert"].samples[0]
    assert (alert.labels, alert.value) == ({"metric": "hit_rate", "bound": "lower"}, 1.0)
    assert len(families) == len(watched.get_summary()["metrics"]) + 1
    assert all(family.documentation for family in families.values())


def test_tensorboard(watched, tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with TensorBoardWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(watched, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("cache/hit_rate")] == [(1, 0.5), (2, 0.5)]


def test_wandb_with_the_callers_run(watched) -> None:
    class Run:
        logged = []

        def log(self, values, step):
            self.logged.append((step, values["cache/hit_rate"]))

    with WandbWriter(Run()) as writer:
        writer.write(watched, 3)
    assert Run.logged == [(3, 0.5)]


WANDB = """
import sys
from tiered_kv.monitoring import CacheMonitor, WandbWriter
monitor = CacheMonitor()
monitor.update_metrics({"lookups": 10, "hits": 5})
with WandbWriter(mode="offline", dir=sys.argv[1], project="tiered-kv-test") as writer:
    writer.write(monitor, 1)
"""


def test_wandb_offline(tmp_path) -> None:
    """Runs in its own process, because wandb keeps threads and files until the interpreter ends."""
    pytest.importorskip("wandb")
    subprocess.run([sys.executable, "-c", WANDB, str(tmp_path)], cwd=ROOT, capture_output=True, check=True)
    assert list(tmp_path.rglob("*.wandb"))
