"""`tiered-kv calibrate`: the place of its file, the measured figures in it, and invalid options."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.unit.bench.test_codec_eval import words
from tests.unit.codecs import calibrations
from tests.unit.integrations.tiny_models import prompt_of, tiny
from tiered_kv.cluster.commands.cli import main
from tiered_kv.codecs import Calibration
from tiered_kv.codecs.calibrated.tables import calibration_file
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.tools import calibrate
from tiered_kv.tools.bench import calibration, evaluation, quality, speeds, subject
from tiered_kv.tools.bench.calibration import CalibrateOptions, run_calibrate, texts_of, written
from tiered_kv.tools.calibrate.engine import fitted, weights_digests

CODECS = ["lossless", "int8", "ecuq:1e-4", "xlayer:1e-4", "xlayer:2e-4"]


def made(model: Any, *_: Any, tokens: int, log: Callable[[str], None]) -> Calibration:
    """Returns a calibration for the shape and weights of a tiny model, without fitting."""
    log("fitted")
    return replace(calibrations.calibration(), weights=weights_digests(model), tokens=tokens)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of calibration files. Models are tiny, and few codecs are measured on few bytes."""
    monkeypatch.setattr(subject, "load_model", lambda name, dtype: (tiny("llama", dtype), words))
    monkeypatch.setattr(calibrate, "calibrate", made)
    monkeypatch.setattr(calibration, "CODECS", CODECS[:2])
    monkeypatch.setattr(calibration, "CALIBRATED", CODECS[2:])
    monkeypatch.setattr(calibration, "MEASURED_ON", 1)
    monkeypatch.setattr(evaluation, "speeds", lambda *given, **named: speeds.speeds(*given, working_set_bytes=1 << 16, turns=1, **named))
    monkeypatch.setenv("TIERED_KV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def test_nodes_find_the_file_by_the_weights_in_each_dtype(cache: Path) -> None:
    said = io.StringIO()
    found = run_calibrate(CalibrateOptions("default", tokens=20_000), Console(width=200, file=said))
    kept = Calibration.load(calibration_file(cache, Namespace.of(tiny()).weights))
    assert [row["codec"] for row in kept.measured] == CODECS
    assert (kept.tokens, kept.fingerprint) == (20_000, found["fingerprint"])
    assert sorted(found["files"]) == sorted(str(calibration_file(cache, weights)) for weights in kept.weights)
    assert {path.stat().st_ino for path in cache.iterdir()} == {next(cache.iterdir()).stat().st_ino}, "one file, three names"
    assert [(each["quality"], each["host"], each["disk"]) for each in found["qualities"]] == [
        ("exact", "raw", "lossless"),
        ("near_exact", "int8", "int8"),
        ("balanced", "ecuq:1e-4", "ecuq:1e-4"),
        ("compact", "int8", "xlayer:1e-4"),
        ("archive", "int8", "xlayer:2e-4"),
    ]
    assert "near_exact" in said.getvalue() and str(cache) in said.getvalue()


def test_codec_eval_uses_a_calibration_and_refuses_one_of_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    path = str(tmp_path / "own.tkvcal")
    assert main(["calibrate", "default", "--out", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [path]
    evaluated = ["codec-eval", "default", "--codec", "xlayer:1e-3:1e-4", "--prefix-tokens", "64", "--limit", "1", "--calibration", path]
    assert main([*evaluated, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["codec"] == "xlayer:1e-3:1e-4"
    monkeypatch.setattr(subject, "load_model", lambda name, dtype: (tiny("llama", dtype, seed=1), words))
    assert main(evaluated) == 2
    assert "was fitted to other weights" in capsys.readouterr().out


def test_the_last_block_of_the_prefix_uses_the_second_step() -> None:
    model = tiny()
    table = fitted(model, [prompt_of(60, seed) for seed in range(16)], 12)
    steps = ("xlayer:1e-2", "xlayer:1e-2:1e-3", "xlayer:1e-3")
    coarse, tail, fine = quality.evaluate(model, [prompt_of(60, 101)], steps, prefix_tokens=48, block_tokens=16, calibration=table)
    assert coarse.fell_back == 0
    assert fine.ratio < tail.ratio < coarse.ratio


def test_an_existing_file_is_replaced(cache: Path) -> None:
    first = calibrations.calibration()
    for each in (first, replace(first, tokens=60_000)):
        written(each, None)
    assert {Calibration.load(path).tokens for path in cache.iterdir()} == {60_000}
    assert len(list(cache.iterdir())) == len(first.weights)


def test_a_file_system_without_links_gets_copies(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", link)
    paths = written(calibrations.calibration(), None)
    assert len({path.stat().st_ino for path in paths}) == len(paths)
    assert len({path.read_bytes() for path in paths}) == 1


def test_texts_are_whole_files_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"text": "as it is"}')
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert texts_of(str(tmp_path / "a.txt")) == ['{"text": "as it is"}']
    assert texts_of(str(tmp_path / "b.jsonl")) == ["one", "two"]
    with pytest.raises(TieredKVError, match="--text: cannot read"):
        texts_of(str(tmp_path / "c.txt"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "none.txt"], "--text: cannot read none.txt"),
        (["--out", "none/a.tkvcal"], "--out: the folder of none/a.tkvcal does not exist"),
        (["--tokens", "9999"], "--tokens: must be at least 10000, got 9999"),
    ],
)
def test_invalid_options_are_refused_by_name(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(subject, "load_model", lambda name, dtype: (tiny("llama", dtype), words))
    assert main(["calibrate", "default", *arguments]) == 2
    assert said in capsys.readouterr().out
