"""`tiered-kv codec-eval`: its table, JSON and plot, and invalid options."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.unit.integrations.tiny_models import prompt_of, tiny
from tiered_kv.cluster.commands.cli import main
from tiered_kv.errors import TieredKVError
from tiered_kv.tools.bench import evaluation, speeds, subject
from tiered_kv.tools.bench.evaluation import EvalOptions, run_codec_eval
from tiered_kv.tools.bench.report import counting, duration
from tiered_kv.tools.bench.subject import codecs_of

SMALL = dict(prefix_tokens=40, continue_tokens=8, block_tokens=16)


def words(text: str, return_tensors: str = "pt") -> dict:
    """A tokenizer for tiny models: each word becomes one token, the word's length."""
    return {"input_ids": torch.tensor([[1 + len(word) % 90 for word in text.split()]])}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file with three prompts. The second is too short."""
    path = tmp_path / "prompts.jsonl"
    texts = [" ".join("x" * int(each) for each in prompt_of(count, seed)[0]) for seed, count in enumerate((50, 20, 60))]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


@pytest.fixture(autouse=True)
def _tiny_subject(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Models are tiny, speeds are measured on few bytes, and no other calibration file is found."""
    monkeypatch.setattr(subject, "load_model", lambda name, dtype: (tiny(name or "llama", dtype), words))
    monkeypatch.setattr(evaluation, "speeds", lambda *given, **named: speeds.speeds(*given, working_set_bytes=1 << 16, turns=1, **named))
    monkeypatch.setenv("TIERED_KV_CACHE", str(tmp_path / "cache"))


def printed(**settings: Any) -> tuple[str, dict]:
    """Run `codec-eval`. Returns the printed text, and the results."""
    said = io.StringIO()
    found = run_codec_eval(EvalOptions(**{"model": "default", **SMALL, **settings}), Console(width=200, file=said))
    return said.getvalue(), found


def test_the_table_shows_the_figures_of_the_records(prompts: str) -> None:
    text, found = printed(prompts=prompts, codec="lossless,int8,int4")
    assert (found["prompts"], found["skipped_prompts"]) == (2, 1)
    assert "1 texts are too short" in text
    needed = {"codec", "ratio", "kl", "kl_p99", "top1", "bytes_per_token", "encode_vs_memcpy", "decode_vs_memcpy", "decode_vs_prefill"}
    lossless, int8, int4 = found["results"]
    for each in (lossless, int8, int4):
        assert needed < set(each)
        assert f"{each['ratio']:.2f}" in text and each["codec"] in text
    assert lossless["kl"] == 0 < int8["kl"] < int4["kl"]
    assert f"{int4['kl']:.1e}" in text


def test_the_limit_and_the_dtype_of_the_kv_are_used(prompts: str) -> None:
    _, found = printed(prompts=prompts, codec="raw", limit=1, dtype="float32")
    layout = subject.check_supported(tiny()).layout(16)
    assert found["prompts"] == 1
    assert found["results"][0]["bytes_per_token"] * found["results"][0]["ratio"] == pytest.approx(layout.token_bytes)


def test_all_leaves_out_codecs_that_need_a_calibration_and_says_so(prompts: str) -> None:
    text, found = printed(prompts=prompts)
    assert [each["codec"] for each in found["results"]] == ["lossless", "int8", "int6", "int4", "fp8"]
    assert "tiered-kv calibrate default" in text


def test_json_is_one_object_on_standard_output(prompts: str, capsys: pytest.CaptureFixture) -> None:
    numbers = ["--prefix-tokens", "40", "--continue-tokens", "8", "--block-tokens", "16"]
    assert main(["codec-eval", "gpt2", "--prompts", prompts, "--codec", "int8, raw", *numbers, "--json"]) == 0
    captured = capsys.readouterr()
    assert [each["codec"] for each in json.loads(captured.out)["results"]] == ["int8", "raw"]
    assert "bytes" in captured.err, "the table is printed to standard error"


def test_the_plot_is_written(prompts: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text, _ = printed(prompts=prompts, codec="lossless,int8,int4", plot=str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "curve.png" in text


def test_without_matplotlib_the_extra_is_named_before_any_work(prompts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(subject, "load_model", None)
    with pytest.raises(TieredKVError, match=r"--plot.*tiered-kv\[plot\]"):
        printed(prompts=prompts, codec="raw", plot="curve.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--codec", "int9"], "--codec: unknown codec 'int9'"),
        (["--codec", "int8,int8"], "--codec: each codec must be named only once, got int8 twice"),
        (["--codec", ""], "--codec: unknown codec ''"),
        (["--codec", "int8:3"], "--codec: codec 'int8' takes no parameters"),
        (["--codec", "xlayer:fast"], "--codec: codec must be xlayer, xlayer:STEP or"),
        (["--codec", "xlayer:1e-4"], "--codec: xlayer:1e-4 needs a calibration file for the model; run: tiered-kv calibrate default"),
        (["--codec", "raw,ecuq"], "--codec: ecuq needs a calibration file for the model"),
        (["--calibration", "none.tkvcal"], "--calibration: none.tkvcal"),
        (["--prompts", "none.jsonl"], "--prompts: cannot read none.jsonl"),
        (["--prefix-tokens", "32"], "--prefix-tokens: must be at least 64"),
        (["--continue-tokens", "1"], "--continue-tokens: must be at least 2"),
        (["--block-tokens", "0"], "--block-tokens: must be at least 1"),
        (["--limit", "0"], "--limit: must be at least 1"),
        (["--prefix-tokens", "500"], "--prefix-tokens: the sum with --continue-tokens must be at most 512 for default, got 628"),
        (["--plot", "curve.doc"], "--plot: curve.doc has none of the endings"),
    ],
)
def test_invalid_options_are_refused_by_name(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["codec-eval", "default", "--prefix-tokens", "128", *arguments]) == 2
    assert said in capsys.readouterr().out


def test_the_error_for_an_unsupported_model_has_the_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(subject, "load_model", lambda name, dtype: (tiny("mistral", sliding_window=16), words))
    for command in (["codec-eval", "default", "--prefix-tokens", "128"], ["calibrate", "default"]):
        assert main(command) == 1
        assert "sliding window" in capsys.readouterr().out.replace("\n", " ")


def test_codec_names_are_split_at_commas() -> None:
    assert codecs_of("int8, xlayer:2e-4:3e-5") == ["int8", "xlayer:2e-4:3e-5"]
    assert codecs_of("all", ("int4",)) == ["int4"]


def test_progress_is_printed_in_lines_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    with counting("prompt", 2, Console(file=io.StringIO())) as advance:
        for _ in range(6):
            advance(1 / 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["prompt 1 of 2", "prompt 2 of 2"]
    assert duration(40) == "40 s" and duration(180) == "3 min"
