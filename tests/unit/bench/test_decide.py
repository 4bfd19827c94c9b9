"""The benchmark of choices between loading and computing: its records, and a small run."""

import io

from rich.console import Console

from tiered_kv.client.prefill_cost import PrefillCost
from tiered_kv.tools.bench.choices import decide
from tiered_kv.tools.bench.choices.decide import LAYOUT, DecideWork, record_of

T = LAYOUT.block_tokens


def test_regret_is_the_time_beyond_the_better_fixed_choice() -> None:
    cost = PrefillCost(1 / T)  # a second for each block
    rows = [(1, 1.05, T), (4, 0.5, 0), (1, 1.5, 0)]
    record = record_of("a link", T, cost, rows, {1: 2.0, 4: 0.4})
    assert (record["always_load_s"], record["always_compute_s"], record["best_s"]) == (4.4, 6.0, 2.4)
    assert (record["regret_ms_mean"], record["regret_ms_max"]) == (216.67, 500.0)
    assert (record["slowest_vs_compute"], record["first_vs_compute"]) == (1.5, 1.05)
    assert (record["declined_tokens"], record["tokens"]) == (T, 6 * T)


def test_a_small_run_loads_where_loading_pays(monkeypatch) -> None:
    work = DecideWork((("loopback", 0.0, float("inf")),), (200.0, 1e6), (1,), 2)
    monkeypatch.setattr(decide, "QUICK", work)
    lines: list[str] = []
    report = decide.run_decide_bench(quick=True, log=lines.append)
    slow, fast = report["results"]
    assert len(lines) == 2
    assert (slow["requests"], slow["tokens"]) == (2, 2 * T)
    assert slow["declined_tokens"] < 2 * T  # at 200 tokens a second the block of a known peer is loaded
    assert fast["seconds"] > 0
    shown = io.StringIO()
    decide.show(report, Console(file=shown, width=200))
    assert "loopback" in shown.getvalue()
