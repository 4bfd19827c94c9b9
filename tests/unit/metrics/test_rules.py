"""The alerts: promtool shows that each fires when its condition holds, and clears when it no longer does."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tiered_kv.metrics.alerts import ALERTS
from tiered_kv.metrics.document import RULES

ROOT = Path(__file__).parents[3]
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool, of Debian's package prometheus")

NODE = '{node="n0"}'


def counter(steps: str, name: str, labels: str) -> dict[str, str]:
    return {"series": f'tiered_kv_{name}{{node="n0"{"," * bool(labels)}{labels}}}', "values": steps}


# For each alert: its series, minute by minute; then when it fires, and when it does not any more.
CASES: dict[str, tuple[list[dict[str, str]], str, str]] = {
    "TieredKVTargetDown": ([{"series": 'up{job="tiered_kv",instance="a:1"}', "values": "1 0x5 1x5"}], "4m", "8m"),
    "TieredKVNodeLost": ([{"series": 'tiered_kv_nodes{state="lost"}', "values": "0 1x5 0x5"}], "4m", "8m"),
    "TieredKVCoordinatorUnreachable": ([{"series": f"tiered_kv_coordinator_up{NODE}", "values": "1 0x5 1x5"}], "4m", "8m"),
    "TieredKVNoCoordinator": ([{"series": 'tiered_kv_nodes{state="live"}', "values": "_x5 2x10"}], "4m", "8m"),
    "TieredKVNodeRestarted": ([{"series": f"tiered_kv_restarts_total{NODE}", "values": "0x2 1x40"}], "5m", "30m"),
    "TieredKVCallsWithoutNode": ([counter("0+60x15 900x20", "degraded_calls_total", 'tenant="t"')], "12m", "30m"),
    "TieredKVHitRatioDropped": (
        [
            counter("0+60000x500", "requested_tokens_total", 'tenant="t"'),
            counter("0+48000x300 14400000+6000x60 14760000+48000x140", "hit_tokens_total", 'tenant="t"'),
        ],
        "340m",
        "430m",
    ),
    "TieredKVStoresRefused": ([counter("0+6x20 120x20", "refused_blocks_total", 'reason="no room",codec="raw"')], "15m", "35m"),
    "TieredKVLowerTierTooSlow": ([counter("0+6x25 150x20", "evicted_blocks_total", 'reason="dropped_under_pressure"')], "20m", "42m"),
    "TieredKVWritesFail": ([counter("0+6x20 120x20", "refused_blocks_total", 'reason="no space",codec="lossless"')], "15m", "38m"),
    "TieredKVDamagedBlocks": ([counter("0x2 1x90", "checksum_failures_total", 'tier="host"')], "5m", "80m"),
    "TieredKVPeersFail": ([counter("0+60x15 900x20", "peer_failures_total", 'peer="n1",reason="timeout"')], "12m", "30m"),
    "TieredKVSlowFetches": (
        [
            counter("0x20 0+60x20", "fetch_seconds_bucket", 'le="1.0"'),
            counter("0+60x40", "fetch_seconds_bucket", 'le="2.5"'),
            counter("0+60x40", "fetch_seconds_bucket", 'le="+Inf"'),
        ],
        "15m",
        "35m",
    ),
    "TieredKVErrorBudgetSpent": ([counter("0.95x15 0.5x20", "error_budget_spent_ratio", 'tier="disk",codec="int4"')], "12m", "20m"),
    "TieredKVPolicyStale": ([counter("700x10 5x10", "policy_age_seconds", "")], "8m", "15m"),
    "TieredKVWorkerHangs": ([counter("1x15 0x10", "quarantined_extents", "")], "12m", "20m"),
    "TieredKVKeeperStands": ([{"series": "tiered_kv_keeper_round_age_seconds", "values": "100x5 1x10"}], "3m", "8m"),
}


def test_each_alert_has_a_case():
    assert CASES.keys() == {rule.name for rule in ALERTS}
    assert len({rule.name for rule in ALERTS}) == len(ALERTS)


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.name)
def test_each_alert_says_what_to_do(rule):
    assert rule.action.endswith(".") and len(rule.action) > 40
    assert rule.summary.endswith(".")


@needs_promtool
@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.name)
def test_each_alert_fires_and_clears(rule, tmp_path):
    series, fires_at, clears_at = CASES[rule.name]
    count = f'count(ALERTS{{alertname="{rule.name}",alertstate="firing"}}) or vector(0)'
    expected = [
        {"eval_time": at, "expr": count, "exp_samples": [{"labels": "{}", "value": value}]} for at, value in ((fires_at, 1), (clears_at, 0))
    ]
    suite = {
        "rule_files": [str(ROOT / RULES)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": expected}],
    }
    path = tmp_path / "suite.yml"
    path.write_text(json.dumps(suite))
    done = subprocess.run([PROMTOOL, "test", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_rules_are_valid():
    done = subprocess.run([PROMTOOL, "check", "rules", str(ROOT / RULES)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout
