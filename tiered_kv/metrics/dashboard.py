"""Makes Grafana's dashboard from the table of metrics."""

import json
from collections.abc import Iterator
from typing import Any

from tiered_kv.metrics.table import BY_NAME, METRICS, Metric, MetricKind, Scope

SOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "[$__rate_interval]"
WIDTH, HEIGHT, COLUMNS = 8, 7, 24
WHO = ("namespace", "tenant", "codec", "weights")
"""Labels that panels add up over, because a panel with one line for each of their values would be hard to read."""
RARE = {
    "declined_tokens_total",
    "ceiling_hit_ratio",
    "twice_room_hit_ratio",
    "peer_failures_total",
    "encoded_blocks_total",
    "error_budget_spent_ratio",
    "policy_age_seconds",
}
"""Metrics without any sample until something happens. Their panels show 0 until then."""
GRAFANA_UNITS = {"bytes": "bytes", "seconds": "s", "ratio": "percentunit"}

HITS, ASKED = (
    f'sum by (node) (rate({BY_NAME[name].full_name}{{node=~"$node"}}{RATE}))' for name in ("hit_tokens_total", "requested_tokens_total")
)
FIRST: tuple[tuple[str, str, str, list[tuple[str, str]]], ...] = (
    ("Hit ratio of tokens", "percentunit", "Share of the requested tokens that were served.", [(f"{HITS} / {ASKED}", "{{node}}")]),
    (
        "Tier fill",
        "percentunit",
        "Used bytes of each tier as a share of its cap.",
        [('tiered_kv_tier_used_bytes{node=~"$node"} / tiered_kv_tier_capacity_bytes', "{{node}} {{tier}}")],
    ),
)
"""Panels that combine several metrics: title, unit, description, and queries with their legends."""


def dashboard() -> dict[str, Any]:
    """Returns the dashboard, as Grafana imports it."""
    panels = [_panel(number, *each) for number, each in enumerate([*FIRST, *_of_table()])]
    query = {"query": "label_values(tiered_kv_uptime_seconds, node)", "refId": "nodes"}
    variables = [
        {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"},
        {"name": "node", "type": "query", "datasource": SOURCE, "query": query, "refresh": 2}
        | {"includeAll": True, "allValue": ".*", "multi": True, "label": "Node", "current": {"text": "All", "value": "$__all"}},
    ]
    return {
        **{"title": "tiered_kv", "uid": "tiered-kv", "schemaVersion": 39, "version": 1, "tags": ["tiered_kv"], "editable": True},
        **{"refresh": "10s", "time": {"from": "now-1h", "to": "now"}, "templating": {"list": variables}, "panels": panels},
    }


def as_text() -> str:
    """Returns the dashboard's file."""
    return json.dumps(dashboard(), indent=1) + "\n"


def _of_table() -> Iterator[tuple[str, str, str, list[tuple[str, str]]]]:
    for metric in METRICS:
        if metric.panel is not None:
            rate = metric.kind is MetricKind.COUNTER
            unit = GRAFANA_UNITS.get(metric.unit, "short")
            if rate:
                unit = "Bps" if unit == "bytes" else unit
            yield metric.panel, unit, metric.meaning + (" Per second." if rate else ""), list(_queries(metric))


def _queries(metric: Metric) -> Iterator[tuple[str, str]]:
    shown = [label for label in metric.all_labels if label not in WHO]
    legend = " ".join(f"{{{{{label}}}}}" for label in shown) or metric.panel or ""
    by = f"sum by ({', '.join(shown)}) " if shown else "sum "
    matcher = '{node=~"$node"}' if metric.scope is Scope.NODE else ""
    rare = " or vector(0)" if metric.name in RARE else ""
    if metric.kind is MetricKind.GAUGE:
        what = f"max by ({', '.join(shown)}) " if metric.unit == "ratio" else by
        yield f"{what}({metric.full_name}{matcher}){rare}", legend
    elif metric.kind is MetricKind.COUNTER:
        yield f"{by}(rate({metric.full_name}{matcher}{RATE})){rare}", legend
    else:
        for percent in (50, 99):
            buckets = f"sum by (le, node) (rate({metric.full_name}_bucket{matcher}{RATE}))"
            yield f"histogram_quantile({percent / 100}, {buckets})", f"{{{{node}}}} p{percent}"


def _panel(number: int, title: str, unit: str, description: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    per_row = COLUMNS // WIDTH
    place = {"x": number % per_row * WIDTH, "y": number // per_row * HEIGHT, "w": WIDTH, "h": HEIGHT}
    targets = [
        {"refId": chr(ord("A") + at), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for at, (expression, legend) in enumerate(queries)
    ]
    return {
        **{"id": number + 1, "type": "timeseries", "title": title, "description": description, "datasource": SOURCE},
        **{"gridPos": place, "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []}, "targets": targets},
    }
