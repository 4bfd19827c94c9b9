"""The alerts. `cluster/deploy/prometheus-rules.yml` and the table in docs/monitoring.md are made from them."""

import json
from typing import NamedTuple


class AlertRule(NamedTuple):
    """An alert: its condition in PromQL, for how long it must hold, and what to do about it."""

    name: str
    condition: str
    for_: str
    severity: str
    summary: str
    action: str


WARNING, CRITICAL = "warning", "critical"
_HIT_RATIO = "(sum by (node) (rate(tiered_kv_hit_tokens_total[{0}])) / sum by (node) (rate(tiered_kv_requested_tokens_total[{0}])))"
ALERTS = (
    AlertRule(
        "TieredKVTargetDown",
        'up{job="tiered_kv"} == 0',
        *("1m", CRITICAL, "{{ $labels.instance }} does not answer Prometheus."),
        "Run `tiered-kv status`. If the node answers there, check metrics_port and firewalls; else start what is missing: `tiered-kv up`.",
    ),
    AlertRule(
        "TieredKVNodeLost",
        'tiered_kv_nodes{state="lost"} > 0',
        *("1m", CRITICAL, "{{ $value }} cache nodes have stopped to report."),
        "Run `tiered-kv status`, which names them. If a machine is gone for good, drain its node: `tiered-kv drain NODE`.",
    ),
    AlertRule(
        "TieredKVCoordinatorUnreachable",
        "tiered_kv_coordinator_up == 0",
        *("1m", CRITICAL, "{{ $labels.node }} does not reach the coordinator. Blocks of other nodes are misses there."),
        "Run `tiered-kv up`, which starts a missing coordinator. If it runs, check the network between this node and Ray's head.",
    ),
    AlertRule(
        "TieredKVNoCoordinator",
        "absent(tiered_kv_nodes)",
        *("2m", CRITICAL, "No coordinator is scraped. Service discovery stands still."),
        "Run `tiered-kv up`. If `tiered-kv status` shows a coordinator, scrape the address that it prints.",
    ),
    AlertRule(
        "TieredKVNodeRestarted",
        "increase(tiered_kv_restarts_total[15m]) > 0",
        *("0m", WARNING, "{{ $labels.node }} was restarted in the last 15 minutes."),
        "Look for its end in Ray's logs of the actor (`ray logs actor`) and in the kernel's log (out of memory).",
    ),
    AlertRule(
        "TieredKVCallsWithoutNode",
        "sum by (node) (rate(tiered_kv_degraded_calls_total[5m])) > 0.1",
        *("5m", WARNING, "Workers of {{ $labels.node }} get no answers: their calls are misses and refusals."),
        "Check whether the node's process gets processor time, and whether its disk hangs: `tiered-kv status`, `top`, `dmesg`.",
    ),
    AlertRule(
        "TieredKVHitRatioDropped",
        f"{_HIT_RATIO.format('15m')} < 0.5 * {_HIT_RATIO.format('6h')} "
        "and on (node) sum by (node) (rate(tiered_kv_requested_tokens_total[15m])) > 100",
        *("15m", WARNING, "The hit ratio of {{ $labels.node }} is less than half of that of the last 6 hours."),
        "Was a model or a weight epoch changed (tiered_kv_weight_epoch)? Else look at evictions: more memory, or `tiered-kv simulate`.",
    ),
    AlertRule(
        "TieredKVStoresRefused",
        'sum by (node) (rate(tiered_kv_refused_blocks_total{reason="no room"}[5m])) > 0',
        *("10m", WARNING, "{{ $labels.node }} refuses blocks because no room appears in time."),
        "The lower tier is too slow, or there is none: check the disk, raise host, or add a disk tier. See tiered_kv_leaving_bytes.",
    ),
    AlertRule(
        "TieredKVLowerTierTooSlow",
        'rate(tiered_kv_evicted_blocks_total{reason="dropped_under_pressure"}[10m]) > 0',
        *("10m", WARNING, "{{ $labels.node }} drops blocks because the tier below takes them too slowly."),
        "Use a faster disk, a codec that writes less (quality), or more host memory.",
    ),
    AlertRule(
        "TieredKVWritesFail",
        'sum by (node, reason) (rate(tiered_kv_refused_blocks_total{reason=~"no space|i/o error"}[10m])) > 0',
        *("5m", WARNING, "{{ $labels.node }} cannot write blocks to its lower tier: {{ $labels.reason }}."),
        "Free space in the disk tier's folder, lower its cap, or replace the disk. Hits from other tiers continue.",
    ),
    AlertRule(
        "TieredKVDamagedBlocks",
        "increase(tiered_kv_checksum_failures_total[1h]) > 0",
        *("0m", WARNING, "{{ $labels.node }} found damaged blocks in {{ $labels.tier }} and dropped them."),
        "No wrong block was returned. For host: test the memory (ECC counters in `dmesg`); for disk: the disk; for peer: the network.",
    ),
    AlertRule(
        "TieredKVPeersFail",
        "sum by (node, peer, reason) (rate(tiered_kv_peer_failures_total[5m])) > 0.05",
        *("5m", WARNING, "Requests from {{ $labels.node }} to {{ $labels.peer }} fail: {{ $labels.reason }}."),
        "`connect`: a firewall or a wrong peer_address. `timeout`: an overloaded machine or network. `secret`, `version`: another cluster.",
    ),
    AlertRule(
        "TieredKVSlowFetches",
        "histogram_quantile(0.99, sum by (node, le) (rate(tiered_kv_fetch_seconds_bucket[5m]))) > 1",
        *("10m", WARNING, "One of a hundred fetches at {{ $labels.node }} takes more than a second."),
        "See which tier serves them (tiered_kv_hit_tokens_total). fetch_deadline_ms bounds the wait; more host memory avoids it.",
    ),
    AlertRule(
        "TieredKVErrorBudgetSpent",
        "tiered_kv_error_budget_spent_ratio > 0.9",
        *("10m", WARNING, "Blocks as {{ $labels.codec }} in {{ $labels.tier }} of {{ $labels.node }} use 90 % of the allowed error."),
        "Calibrate the model again (`tiered-kv calibrate`), or choose a better quality.",
    ),
    AlertRule(
        "TieredKVPolicyStale",
        "tiered_kv_policy_age_seconds > 600",
        *("5m", WARNING, "{{ $labels.node }} has not adopted other nodes' counts for ten minutes."),
        "Check that the coordinator answers this node and that other nodes report: `tiered-kv status`.",
    ),
    AlertRule(
        "TieredKVWorkerHangs",
        "tiered_kv_quarantined_extents > 0",
        *("10m", WARNING, "{{ $labels.node }} keeps room for a worker that has ended its session and still holds locks."),
        "Find the worker that hangs on this machine and end it; its room is freed at once.",
    ),
    AlertRule(
        "TieredKVKeeperStands",
        "tiered_kv_keeper_round_age_seconds > 60",
        *("1m", WARNING, "The coordinator has not looked after the fleet for a minute: missing nodes are not started."),
        "Ray's control store may hang: `ray status` on the head.",
    ),
)


def rules_text() -> str:
    """Returns the file of rules. Texts in double quotes are the same in JSON and YAML."""
    lines = [
        "# Alerts for Prometheus. Made by `python -m tiered_kv.metrics.document` from tiered_kv/metrics/alerts.py; see docs/monitoring.md.",
        "groups:",
        "  - name: tiered_kv",
        "    rules:",
    ]
    for rule in ALERTS:
        lines += [
            f"      - alert: {rule.name}",
            f"        expr: {json.dumps(rule.condition)}",
            f"        for: {rule.for_}",
            "        labels:",
            f"          severity: {rule.severity}",
            "        annotations:",
            f"          summary: {json.dumps(rule.summary, ensure_ascii=False)}",
            f"          action: {json.dumps(rule.action, ensure_ascii=False)}",
        ]
    return "\n".join(lines) + "\n"


def table() -> str:
    """Returns the alerts as a table in Markdown."""
    lines = ["| alert | fires when | what to do |", "|---|---|---|"]
    for rule in ALERTS:
        condition = rule.condition.replace("|", "\\|")
        held = f", for {rule.for_}" if rule.for_ != "0m" else ""
        lines.append(f"| `{rule.name}` ({rule.severity}) | `{condition}`{held} | {rule.action} |")
    return "\n".join(lines)
