"""The table of metrics: what is exported, what is documented and what Grafana shows are one set, and each metric of it moves."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tests.unit.metrics.scraping import Scrape, scrape_node
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv import metrics
from tiered_kv.clock import ManualClock
from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.metrics import alerts
from tiered_kv.metrics.coordinator_samples import CoordinatorSamples
from tiered_kv.metrics.dashboard import as_text, dashboard
from tiered_kv.metrics.document import DASHBOARD, PAGE, RULES, with_tables
from tiered_kv.metrics.exporter import TableCollector, exposition
from tiered_kv.metrics.table import METRICS, MetricKind, Scope, of_scope

ROOT = Path(__file__).parents[3]


def names(scope: Scope) -> set[str]:
    return {metric.full_name for metric in of_scope(scope)}


def test_a_node_exports_exactly_its_part_of_the_table(node_factory):
    found = scrape_node(node_factory(host="1MiB"))
    assert found.families == names(Scope.NODE)
    assert all(found.kinds[metric.full_name] == metric.kind for metric in of_scope(Scope.NODE))


def test_the_coordinator_exports_exactly_its_part():
    fleet = {"members": [], "restarts": 0, "uptime_s": 5.0, "round_age_s": 0.5}
    samples = CoordinatorSamples(Coordinator(ManualClock(), 5.0), lambda: fleet)
    _, body = exposition(TableCollector(Scope.COORDINATOR, samples))("")
    assert Scrape(body.decode()).families == names(Scope.COORDINATOR)


def test_a_client_exports_its_part_in_an_engines_registry(node_factory, client_factory):
    node, registry = node_factory(host="1MiB"), CollectorRegistry()
    client = client_factory(node, LAYOUT, NAMESPACE)
    collector = metrics.register(client, registry)
    path = (1, 2, 3)
    client.fetch(tokens_of(path))
    client.store(tokens_of(path), kv_of(path))
    client.note_prefill(1000, 10.0)
    client.fetch(tokens_of((1, 2, 9)))
    found = Scrape(generate_latest(registry).decode())
    assert found.families == names(Scope.CLIENT)
    assert found.sum("client_requested_blocks_total") == 6
    assert found.sum("client_hit_blocks_total", tier="host") == found.sum("client_hit_blocks_total") == 2
    assert found.sum("client_missed_blocks_total") == 4
    assert found.sum("client_stored_blocks_total", result="new") == 3
    assert found.sum("client_prefill_saved_seconds_total") == pytest.approx(2 * LAYOUT.block_tokens * 0.01, rel=0.5)
    assert found.sum("client_prefill_tokens_per_second") == pytest.approx(100)
    with pytest.raises(ValueError, match="Duplicated"):
        metrics.register(client, registry)
    registry.unregister(collector)
    assert not generate_latest(registry)


def test_documents_are_made_from_the_table():
    page = (ROOT / PAGE).read_text()
    assert page == with_tables(page), "run: python -m tiered_kv.metrics.document"
    assert (ROOT / DASHBOARD).read_text() == as_text(), "run: python -m tiered_kv.metrics.document"
    assert (ROOT / RULES).read_text() == alerts.rules_text(), "run: python -m tiered_kv.metrics.document"
    assert all(f"| `{metric.full_name}` |" in page for metric in METRICS)


def test_names_follow_the_habits_of_prometheus():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.endswith("_total") == (metric.kind is MetricKind.COUNTER), metric.name
        assert metric.unit != "bytes" or "_bytes" in metric.name, metric.name
        assert metric.unit != "seconds" or "_seconds" in metric.name, metric.name
        assert metric.meaning.endswith("."), metric.name
        assert "le" not in metric.all_labels


def test_alerts_and_panels_use_existing_metrics_only():
    histograms = [metric for metric in METRICS if metric.kind is MetricKind.HISTOGRAM]
    known = {metric.full_name for metric in METRICS} | {f"{metric.full_name}_bucket" for metric in histograms}
    texts = [rule.condition for rule in alerts.ALERTS]
    texts += [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    for text in texts:
        words = set(re.findall(r"tiered_kv_\w+", text))
        assert words <= known, text


def test_grafana_can_read_the_dashboard():
    found = json.loads((ROOT / DASHBOARD).read_text())
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"]) > 20
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found["panels"]}
    assert len(places) == len(found["panels"])
