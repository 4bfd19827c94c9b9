"""The check of histories finds what a cache must never do, and only that."""

from pathlib import Path

import pytest
import torch

import tiered_kv
from tests.history.history import FETCH, LOSSY, STORE, HistoryFiles, HistoryWriter, Operation, wrong_blocks
from tests.history.recorded import RecordedClient


def store(at_s: float, key: str, digest: str, scope: str = "a") -> Operation:
    return Operation("w0", STORE, at_s, scope, {key: digest})


def fetch(at_s: float, key: str, digest: str, scope: str = "a") -> Operation:
    return Operation("w1", FETCH, at_s, scope, {key: digest})


@pytest.mark.parametrize(
    "history",
    [
        [store(1.0, "k", "x"), fetch(2.0, "k", "x")],
        [fetch(2.0, "k", "x"), store(1.0, "k", "x")],  # histories of several workers are read one after the other
        [store(1.0, "k", "x"), store(1.5, "k", "y"), fetch(2.0, "k", "x"), fetch(2.0, "k", "y")],
        [store(2.0, "k", "x"), store(1.0, "k", "x"), fetch(1.5, "k", "x")],
        [store(1.0, "k", "x"), fetch(2.0, "k", LOSSY)],
        [Operation("w1", FETCH, 1.0, "a", {})],
    ],
)
def test_a_history_without_wrong_blocks_is_accepted(history: list[Operation]) -> None:
    assert list(wrong_blocks(history)) == []


@pytest.mark.parametrize(
    ("history", "why"),
    [
        ([store(1.0, "k", "x"), fetch(2.0, "k", "y")], "bytes were never stored"),
        ([store(1.0, "j", "x"), fetch(2.0, "k", "x")], "no block was ever stored"),
        ([store(2.0, "k", "x"), fetch(1.0, "k", "x")], "began later, at 2.0"),
        ([store(1.0, "k", "x"), fetch(2.0, "k", "x", scope="b")], "in the scopes a, and fetched in b"),
        ([store(2.0, "k", "x"), fetch(1.0, "k", LOSSY)], "began later"),
        ([fetch(1.0, "k", LOSSY)], "no block was ever stored"),
    ],
)
def test_a_block_that_no_store_explains_is_found(history: list[Operation], why: str) -> None:
    (wrong,) = wrong_blocks(history)
    assert why in wrong.why
    assert str(wrong).startswith("w1 fetched block k at ")


def test_files_of_killed_processes_are_read_up_to_their_last_whole_line(tmp_path: Path) -> None:
    with HistoryWriter(tmp_path / "0.jsonl") as history:
        history.append(store(1.0, "k", "x"))
    (tmp_path / "1.jsonl").write_text('["w1","fetch",2.0,"a",{"k":"y"}]\n["w1","fetch",2.0,"a",{"k":')
    history = HistoryFiles(tmp_path)
    assert [each.kind for each in history] == [STORE, FETCH]
    assert len(list(wrong_blocks(history))) == 1


def test_a_recorded_client_writes_what_it_stores_and_fetches(tmp_path: Path) -> None:
    layout = tiered_kv.KVLayout(1, 1, 8, "float32", 4)
    namespace = tiered_kv.Namespace(weights="made up")
    tokens, kv = list(range(12)), torch.rand(layout.kv_shape(12))
    with (
        tiered_kv.open({"host": "4MiB", "block_tokens": 4}, layout=layout, namespace=namespace) as client,
        HistoryWriter(tmp_path / "0.jsonl") as history,
    ):
        recorded = RecordedClient(client, history, "w0")
        recorded.store(tokens[:10], kv[..., :10, :])
        recorded.store(tokens, kv[..., 6:, :], start=6)
        assert recorded.fetch(tokens).tokens == 12
        assert recorded.match(tokens).tokens == 12
    written = list(HistoryFiles(tmp_path))
    assert [(each.kind, len(each.blocks)) for each in written] == [(STORE, 2), (STORE, 1), (FETCH, 3)]
    assert list(wrong_blocks(written)) == []
    forged = written[2]._replace(blocks=dict(zip(written[2].blocks, reversed(written[2].blocks.values()), strict=True)))
    assert len(list(wrong_blocks([*written[:2], forged]))) == 2
