"""`bench checkpoint` with little data: it reports every figure, and leaves nothing behind."""

import io
import os
from importlib.util import find_spec

import pytest
from rich.console import Console

from tiered_kv.tools.bench import checkpoint, remote, serving
from tiered_kv.tools.bench.fetch import LAYOUTS
from tiered_kv.tools.bench.filled import BenchChains

SMALL = 64 << 10
TINY = checkpoint.CheckpointWork(
    (SMALL,), 32 << 20, 24 << 20, 1, 4 << 20, 1, serving.ServingWork(32 << 20, 4 << 20, 1 << 20, 1, 0.05), 32 << 20
)


@pytest.fixture(scope="module", autouse=True)
def runtime() -> None:
    """Makes a first request, because obstore keeps files open from then on."""
    if find_spec("obstore"):
        import obstore
        import obstore.store

        obstore.put(obstore.store.MemoryStore(), "name", b"content")


@pytest.mark.skipif(not (find_spec("moto") and find_spec("obstore")), reason="an S3 server and its client are needed")
def test_every_figure_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(checkpoint, "QUICK", TINY)
    monkeypatch.setattr(checkpoint, "SETTLE_S", 0.0)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    report = checkpoint.run_checkpoint_bench(quick=True, log=lambda line: None, folder=tmp_path)
    assert [(each["op"], each["beside"], each["block_bytes"]) for each in report["results"]] == [
        ("take", "write", SMALL),
        ("restore", "read", SMALL),
        ("take", "put", SMALL),
        ("restore", "get", SMALL),
    ]
    assert all(each["vs_plain"] > 0 and each["repetitions"] == 1 for each in report["results"])
    assert 0 < report["second"][0]["new_share"] < report["second"][0]["share"] < 0.5, "the new blocks and their manifest rows"
    hit = report["first_hit"]
    assert hit["blocks"] == hit["mounted"] >= hit["filled_blocks"] > 0
    assert 0 < hit["mounted_s"] < hit["hit_s"]
    assert [each["while"] for each in report["serving"]] == ["taking", "restoring"]
    assert all(each["rounds"] >= 1 and each["slower"] > 0 for each in report["serving"])
    assert list(tmp_path.iterdir()) == []
    assert not [name for name in os.environ if name.startswith("AWS_")]
    said = io.StringIO()
    checkpoint.show(report, Console(width=200, file=said))
    assert "first hit after" in said.getvalue()
    assert f"{report['results'][0]['vs_plain']:.2f}" in said.getvalue()


def test_without_a_server_object_storage_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "find_spec", lambda name: None)
    lines: list[str] = []
    with remote.bucket(None, lines.append) as url:
        assert url is None
    assert "object storage is not measured" in lines[0]


def test_chains_are_distinct_and_the_baselines_bodies_have_the_given_sizes() -> None:
    blocks = BenchChains(LAYOUTS[SMALL])
    assert not set(blocks.keys(0)) & set(blocks.keys(1))
    assert blocks.raw(0, 1).numel() == SMALL
    assert [len(body) for body in blocks.bodies([5, 3 << 20, 70 << 20])] == [5, 3 << 20, 70 << 20]
