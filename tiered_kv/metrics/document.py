"""Writes the documents that are made from the table of metrics: `python -m tiered_kv.metrics.document`, in a checkout of the project."""

from pathlib import Path

from tiered_kv.metrics import alerts, dashboard
from tiered_kv.metrics.table import EVICTION_REASONS, METRICS, Scope, of_scope

PAGE = "docs/monitoring.md"
DASHBOARD = "cluster/deploy/grafana-dashboard.json"
RULES = "cluster/deploy/prometheus-rules.yml"


def metrics_table() -> str:
    """Returns the tables of all metrics, as Markdown."""
    lines: list[str] = []
    for scope in Scope:
        labels = " All have the label `node`." if scope is Scope.NODE else ""
        lines += [f"### {scope.value}", f"{len(of_scope(scope))} metrics.{labels}", ""]
        lines += ["| metric | type | unit | labels | meaning | from |", "|---|---|---|---|---|---|"]
        for metric in METRICS:
            if metric.scope is scope:
                shown = ", ".join(f"`{label}`" for label in metric.labels)
                lines.append(f"| `{metric.full_name}` | {metric.kind} | {metric.unit} | {shown} | {metric.meaning} | {metric.source} |")
        lines.append("")
    lines += ["The values of `reason` of `tiered_kv_evicted_blocks_total`:", ""]
    lines += [f"* `{reason}`: {meaning}." for reason, meaning in EVICTION_REASONS.items()]
    return "\n".join(lines)


def with_tables(page: str) -> str:
    """Returns the page with the present tables between their marks."""
    for name, table in (("alerts", alerts.table()), ("metrics", metrics_table())):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def write(root: Path) -> None:
    """Write the tables into the page, the dashboard's file and the file of alerts."""
    page = root / PAGE
    page.write_text(with_tables(page.read_text()))
    (root / DASHBOARD).write_text(dashboard.as_text())
    (root / RULES).write_text(alerts.rules_text())


if __name__ == "__main__":
    write(Path.cwd())
