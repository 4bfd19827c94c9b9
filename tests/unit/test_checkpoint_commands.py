"""Checkpoint commands that need no cluster: checks of the options, and what they print about a folder."""

import json
from pathlib import Path

import pytest
import torch

from tiered_kv import BaseKVCache, CachePersistence, KVCacheConfig, KVLayout
from tiered_kv.cluster.commands import cli, restoring
from tiered_kv.config import Config
from tiered_kv.errors import TieredKVError

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32", block_tokens=8)
STATE = "cache_state.pkl"


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two checkpoints by one process; the second contains all blocks of the first."""
    folder = tmp_path / "place"
    with BaseKVCache(KVCacheConfig(max_tokens=256, block_tokens=8, cache_strategy="lru")) as cache:
        cache.store(range(40), torch.randn(LAYOUT.kv_shape(40)))
        CachePersistence(folder).save_cache(cache, STATE)
        cache.store(range(100, 124), torch.randn(LAYOUT.kv_shape(24)))
        CachePersistence(folder).save_cache(cache, "step-000000000001.tkv")
    return folder


def run(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(each) for each in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--every", "0"], "--every: must be a positive time such as 30s, 10m or 1h, got '0'"),
        (["--every", "soon"], "--every: must be a positive time such as 30s, 10m or 1h, got 'soon'"),
        (["--every", "-3s"], None),
        (["--every", "0.0m"], "--every: must be a positive time such as 30s, 10m or 1h, got '0.0m'"),
        (["--max-rate", "x"], "--max-rate"),
        (["--max-rate", "0"], "--max-rate: must be at least 1 byte per second"),
        (["--tiers", "bad"], "--tiers: must be one or more of device, host, disk, objects, checkpoint, got 'bad'"),
        (["--tiers", "host,"], "--tiers: must be one or more of device, host, disk, objects, checkpoint, got ''"),
        (["--keep", "0"], "--keep: must be at least 1, got 0"),
        (["--keep", "few"], None),
        (["--min-hits", "-1"], "--min-hits: must be at least 0, got -1"),
    ],
)
def test_an_invalid_option_is_bad_usage_and_is_named(arguments: list[str], words: str | None, tmp_path: Path, capsys) -> None:
    given = ["checkpoint", *arguments, str(tmp_path / "place")]
    if words is None:  # argparse itself rejects the option
        with pytest.raises(SystemExit) as ended:
            cli.main(given)
        assert ended.value.code == 2
        assert arguments[0] in capsys.readouterr().err
    else:
        status, out, _ = run(capsys, *given)
        assert status == 2
        assert words in out
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("arguments", [["--every", "1.5h"], ["--every", "90"], ["--tiers", "host, disk"], ["--max-rate", "2MiB"]])
def test_without_a_cluster_nothing_is_created_at_the_url(arguments: list[str], tmp_path: Path, capsys) -> None:
    status, out, _ = run(capsys, "checkpoint", *arguments, tmp_path / "place")
    assert status == 1
    assert "no cluster 'default' on this machine" in out
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize(
    "command", [["checkpoints"], ["verify"], ["restore", "--nodes", "1"], ["up", "--restore"]], ids=lambda words: words[0]
)
def test_a_missing_url_is_an_error_and_is_not_created(command: list[str], tmp_path: Path, capsys) -> None:
    for url, words, expected in (
        (str(tmp_path / "nowhere"), f"checkpoint: file://{tmp_path}/nowhere cannot be used: there is no such folder", 1),
        (f"file://{tmp_path}/no%20where", f"checkpoint: file://{tmp_path}/no where cannot be used: there is no such folder", 1),
        ("s4://bucket/kv", "checkpoint: 's4://bucket/kv' is not the URL of an object store", 2),
        ("s3://", "checkpoint: 's3://' is not the URL of an object store", 2),
    ):
        status, out, _ = run(capsys, *command, url)
        assert (status, words in out) == (expected, True), out
    assert {path.name for path in tmp_path.iterdir()} <= {"state"}


def test_restore_without_a_cluster_asks_for_one_or_for_nodes(place: Path, capsys) -> None:
    status, out, _ = run(capsys, "restore", place)
    assert status == 1
    assert f"no cluster 'default' is up; start one with `tiered-kv up --restore {place}`, or pass --nodes here" in out


def test_checkpoints_at_a_url_are_listed_with_their_shared_bytes(place: Path, capsys) -> None:
    status, out, _ = run(capsys, "checkpoints", place)
    assert status == 0
    assert STATE in out
    assert "step-000000000001.tkv" in out
    assert "100%" in out, "the second checkpoint uses all packs of the first"
    status, out, said = run(capsys, "checkpoints", "--json", place)
    first, second = json.loads(out)
    assert (status, said) == (0, "")
    assert (first["name"], first["blocks"], second["blocks"]) == (STATE, 5, 8)
    assert first["shared_bytes"] == first["pack_bytes"] == second["shared_bytes"] < second["pack_bytes"]
    assert first["models"][0]["layout"]["block_tokens"] == 8
    assert first["models"][0]["namespace"]["tenant"] == "default"
    assert first["error"] is None


def test_an_empty_folder_has_no_checkpoints(tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    assert run(capsys, "checkpoints", tmp_path / "empty")[:2] == (0, f"there are no checkpoints at {tmp_path}/empty\n")
    assert run(capsys, "verify", tmp_path / "empty")[:2] == (0, f"no checkpoints at {tmp_path}/empty: no problems\n")
    status, out, _ = run(capsys, "restore", tmp_path / "empty", "--nodes", "1")
    assert (status, "there is no checkpoint in" in out) == (1, True)


def test_verify_reports_damage_and_the_damaged_object(place: Path, capsys) -> None:
    assert run(capsys, "verify", place)[:2] == (0, f"2 checkpoints at {place}: no problems\n")
    status, out, said = run(capsys, "verify", "--json", "--checkpoint", STATE, place)
    assert (status, json.loads(out)) == (0, {"checkpoints": 1, "problems": []})
    assert "1 checkpoint at" in said
    [pack] = [path for path in place.glob("*.pack") if path.name in CachePersistence(place)._store.sizes()][:1]
    content = bytearray(pack.read_bytes())
    content[300] ^= 1
    pack.write_bytes(content)
    status, out, said = run(capsys, "verify", "--json", place)
    [problem] = json.loads(out)["problems"]
    assert (status, problem["object"]) == (1, pack.name)
    assert "1 problem\n" in said
    assert f"damaged: {problem['message']}" in said
    manifest = place / STATE
    manifest.write_bytes(manifest.read_bytes()[:-1])
    status, out, _ = run(capsys, "checkpoints", place)
    assert status == 0
    assert "cannot be used" in out


def test_the_error_for_a_missing_checkpoint_lists_the_existing_ones(place: Path, capsys) -> None:
    for command in (["verify"], ["restore", "--nodes", "1"]):
        for name in ("nope", "../nope"):
            status, out, _ = run(capsys, *command, "--checkpoint", name, place)
            assert status == 1
            assert f"--checkpoint: there is no {name!r} at file://{place}; there are: {STATE}, step-000000000001.tkv" in out


def test_a_checkpoint_with_another_block_size_starts_no_cluster(place: Path, capsys) -> None:
    for command in (["up", "--restore"], ["restore", "--nodes", "1", "--checkpoint", STATE]):
        status, out, _ = run(capsys, *command, place)
        assert status == 1
        assert "none of its blocks can be restored" in out
        assert "its blocks have 8 tokens, but this cluster's have 64" in out
        assert "; --block-tokens 8 would fit" in out
        assert "starting" not in out


def test_a_checkpoint_store_is_given_as_a_path_or_a_url(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for url in (str(place), "place", "./place/", "~/place", f"file://{place}"):
        with restoring.opened(url, must_exist=True) as repository:
            assert len(repository.names()) == 2
    with pytest.raises(TieredKVError, match="checkpoint: file:///proc/nope cannot be used"), restoring.opened("/proc/nope"):
        pass


def test_a_cluster_without_a_checkpoint_gets_no_extra_index_slots() -> None:
    with restoring.warm(None, "default", 1, Config(), None) as mounted_bytes:
        assert mounted_bytes == 0
