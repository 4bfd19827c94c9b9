"""Tests of `tiered-kv simulate`: settings, the printed table, JSON, the plot, processes, and errors."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from tests.unit.simulate.test_golden import GOLDEN
from tests.unit.simulate.traces import DATA, line, write
from tiered_kv.cluster.commands.cli import main
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.simulate.cells import ALL_NAMES, capacities_of, policies_of
from tiered_kv.tools.simulate.command import SimulateOptions, run_simulate
from tiered_kv.tools.simulate.report import memory_ratio, sizing

CHAT, DOCUMENTS = str(DATA / "chat-b64.jsonl.zst"), str(DATA / "documents-b64.jsonl.zst")


def printed(**settings) -> tuple[str, list[dict]]:
    """Runs the command in this process. Returns the text printed for people, and the results."""
    said = io.StringIO()
    found = run_simulate(SimulateOptions(**{"jobs": 1, **settings}), Console(width=200, file=said))
    return said.getvalue(), found["results"]


def test_tables_show_each_trace_the_mean_and_the_memory_lru_needs():
    text, results = printed(traces=[CHAT, DOCUMENTS], policy="lru,arc,belady", capacity="0.1,0.02")
    hits = {(each["trace"], each["policy"], each["capacity"]): f"{100 * each['token_hit_ratio']:.1f}" for each in results}
    assert len(hits) == 12
    for ratio in hits.values():
        assert ratio in text
    assert "mean of 2 traces" in text
    assert text.count("the memory for the same hits as arc at 2 %") == 2
    assert text.index("2 %") < text.index("10 %")


def test_metric_flops_prints_another_table():
    text, results = printed(traces=[DOCUMENTS], policy="lru", capacity="0.1", metric="flops")
    assert f"{100 * results[0]['flops_saved_ratio']:.1f}" in text
    assert results[0]["flops_saved_ratio"] < results[0]["token_hit_ratio"], "hits are at the beginning of prompts, where tokens cost less"


def test_the_cost_weight_changes_the_policy_and_the_metric_only_the_table():
    def hits(**settings):
        return printed(traces=[CHAT], policy="adaptive", capacity="0.02", **settings)[1][0]["hit_blocks"]

    assert hits(metric="flops") == hits()
    assert hits(cost_weight=1.0) != hits()


def test_tiers_print_another_table():
    text, results = printed(traces=[DOCUMENTS], policy="lru,belady", tiers="disk=0.5,hot=0.02,warm=0.1")
    (result,) = results
    assert result["tiers"] == {"device": 0.02, "host": 0.1, "disk": 0.5}
    assert sum(result["hit_ratio_by_tier"].values()) == pytest.approx(result["token_hit_ratio"])
    for ratio in (result["token_hit_ratio"], *result["hit_ratio_by_tier"].values()):
        assert f"{100 * ratio:.1f}" in text
    assert f"{result['write_amplification']['disk']:.2f}" in text


def test_json_is_one_object_on_standard_output_and_the_same_for_any_jobs():
    command = [sys.executable, "-m", "tiered_kv.cluster.commands.cli", "simulate", CHAT, DOCUMENTS]
    done = subprocess.run(
        [*command, "--capacity", "0.1,0.3", "--policy", "lru,arc", "--jobs", "2", "--json"], capture_output=True, text=True, check=True
    )
    results = json.loads(done.stdout)["results"]
    golden = json.loads(GOLDEN.read_text())
    assert [(each["trace"], each["policy"], each["capacity"]) for each in results] == [
        (f"{trace}-b64.jsonl.zst", policy, capacity)
        for trace in ("chat", "documents")
        for policy in ("lru", "arc")
        for capacity in (0.1, 0.3)
    ]
    for each in results:
        assert [each["hit_blocks"], each["evictions"]] == golden[each["trace"]][each["policy"]][str(each["capacity"])]
    assert "policy" in done.stderr, "the table must be on standard error"


def test_the_plot_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    text, _ = printed(traces=[CHAT, DOCUMENTS], policy="lru,belady", capacity="0.1,0.3", plot=str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "curve.png" in text


@pytest.mark.parametrize("name", ["curve.doc", "none/curve.png"])
def test_a_plot_that_cannot_be_written_is_refused_before_any_work(tmp_path, name):
    pytest.importorskip("matplotlib")
    with pytest.raises(TieredKVError, match="--plot"):
        printed(traces=["no such trace"], plot=str(tmp_path / name))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(TieredKVError, match=r"tiered-kv\[plot\]"):
        printed(traces=[CHAT], plot="curve.png")


def test_notes_about_reading_the_trace_are_printed(tmp_path):
    path = write(tmp_path / "a-b10.jsonl", [line(5, [1], 10), line(3, [1], 10)])
    text, results = printed(traces=[path], policy="lru")
    assert "sorted by time" in text
    assert results[0]["hit_blocks"] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([CHAT, "--policy", "lru,acr"], "did you mean 'arc'?"),
        ([CHAT, "--policy", "zzz"], "unknown policy 'zzz'; known are all, lru"),
        ([CHAT, "--capacity", "0"], "--capacity: '0'"),
        ([CHAT, "--capacity", "0.1,1.5"], "--capacity: '1.5'"),
        ([CHAT, "--capacity", "nan"], "--capacity: 'nan'"),
        ([CHAT, "--capacity", "0.1,,0.2"], "--capacity: ''"),
        ([CHAT, "--tiers", "warm=0.1,tape=1"], "--tiers: 'tape=1'"),
        ([CHAT, "--tiers", "warm=0.1,host=0.2"], "--tiers: 'host=0.2'"),
        ([CHAT, "--tiers", "warm=0"], "--tiers: 'warm=0'"),
        ([CHAT, "--tiers", "warm"], "--tiers: 'warm'"),
        ([CHAT, "--tiers", "hot=0.1"], "warm=SHARE must be given"),
        ([CHAT, "--tiers", "warm=0.1", "--plot", "a.png"], "--plot: draws hits by --capacity"),
        ([CHAT, "--tiers", "warm=0.1", "--policy", "belady"], "belady supports one tier only"),
        ([CHAT, "--cost-weight", "nan"], "--cost-weight: must be from 0 to 1, got nan"),
        ([CHAT, "--jobs", "0"], "--jobs: must be at least 1, got 0"),
        ([CHAT, "--block-tokens", "0"], "--block-tokens: must be at least 1, got 0"),
        ([CHAT, CHAT], "two files are named chat-b64.jsonl.zst"),
        (["/no/such-b1.jsonl"], "such-b1.jsonl: cannot be read"),
    ],
)
def test_an_invalid_argument_is_refused_by_name(capsys, arguments, said):
    assert main(["simulate", *arguments]) == 2
    assert said in " ".join(capsys.readouterr().out.split())


def test_with_json_an_invalid_trace_is_reported_on_standard_error(tmp_path, capsys):
    path = write(tmp_path / "a-b10.jsonl", ["nonsense"])
    assert main(["simulate", str(path), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a-b10.jsonl, line 1" in captured.err


def test_all_stands_for_every_policy_and_the_optimum():
    assert policies_of("all") == list(ALL_NAMES) == policies_of("lru,all")
    assert ALL_NAMES[-1] == "belady"
    assert policies_of("belady, lru,belady") == ["belady", "lru"]


def test_capacities_are_sorted():
    assert capacities_of("0.2,1,0.05,0.2") == [0.05, 0.2, 1.0]


@pytest.mark.parametrize(
    ("ratio", "capacity", "said"),
    [(0.1, 0.1, "≤ 0.1 ×"), (0.2, 0.01, "1.0 ×"), (0.3, 0.01, "3.2 ×"), (0.4, 0.05, "2.0 ×"), (0.5, 0.1, "> 1.0 ×")],
)
def test_memory_is_interpolated_on_the_lru_curve_in_log_capacity(ratio, capacity, said):
    assert memory_ratio({0.01: 0.2, 0.1: 0.4}, capacity, ratio) == said


def test_sizing_compares_with_adaptive_or_else_the_best_policy():
    curves = {"lru": {0.1: 0.2, 0.4: 0.4}, "arc": {0.1: 0.3, 0.4: 0.45}, "lfu": {0.1: 0.1, 0.4: 0.1}, "belady": {0.1: 0.6, 0.4: 0.6}}
    assert sizing(curves) == "LRU needs 2.0 × the memory for the same hits as arc at 10 %, > 1.0 × at 40 %"
    curves["adaptive"] = {0.1: 0.2, 0.4: 0.2}
    assert sizing(curves).startswith("LRU needs 1.0 × the memory for the same hits as adaptive at 10 %")
    assert sizing({"lru": {0.1: 0.2}, "belady": {0.1: 0.3}}) == ""
    assert sizing({"lru": {0.1: 0.0}, "adaptive": {0.1: 0.0}}) == "", "without hits there is nothing to compare"


def test_equal_curves_need_equal_memory():
    """Small traces have them: the smallest capacity holds all that is ever used again."""
    flat = {0.01: 0.3, 0.1: 0.3, 0.4: 0.3}
    assert sizing({"lru": flat, "adaptive": dict(flat)}) == "LRU needs 1.0 × the memory for the same hits as adaptive at 1 %"
    rising = {0.01: 0.1, 0.1: 0.3, 0.4: 0.3}
    assert sizing({"lru": rising, "adaptive": dict(rising)}).endswith("as adaptive at 1 %, 1.0 × at 10 %")


def test_a_small_factor_is_never_shown_as_zero():
    assert memory_ratio({0.01: 0.5, 0.5: 0.6}, 0.5, 0.3) == "≤ 0.02 ×"
    assert "0.0 ×" not in sizing({"lru": {0.01: 0.5, 0.4: 0.5}, "adaptive": {0.01: 0.2, 0.4: 0.5}})


def test_the_report_of_a_tiny_trace_has_no_zero_memory(tmp_path):
    trace = write(tmp_path / "tiny-b10.jsonl", [line(at, [1, 2, 3], 30) for at in range(20)])
    text, _ = printed(traces=[str(trace)], policy="lru,adaptive", capacity="0.01,0.1,0.4,1")
    assert "0.0 ×" not in text
    assert "LRU needs 1.0 × the memory for the same hits as adaptive" in text


def test_an_invalid_capacity_is_a_config_error_that_names_the_setting():
    with pytest.raises(TieredKVError) as caught:
        capacities_of("much")
    assert (caught.value.kind, caught.value.context) == (Kind.CONFIG, {"setting": "capacity"})
