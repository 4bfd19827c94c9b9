"""`bench held`: the demo's workload in host memory of several sizes, on a tiny model."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.unit.integrations.tiny_models import tiny
from tiered_kv.cluster.commands.cli import main
from tiered_kv.tools.bench import held, subject


class Letters:
    """A tokenizer that makes one token of 40 letters, so that a document has a few hundred tokens."""

    chat_template = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1 + sum(text[at : at + 40].encode()) % 90 for at in range(0, len(text), 40)]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def loaded(name: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns a tiny model with blocks of 96 KiB, and a tokenizer."""
    return tiny("llama", dtype, num_hidden_layers=6, hidden_size=256, num_key_value_heads=4), Letters()


def test_the_kv_of_a_request_equals_that_of_one_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "load_model", loaded)
    measured = subject.Subject.load("default")
    requests = held.requests_of(measured, 2, lambda line: None)
    assert [request.title for request in requests[:4]] == [request.title for request in requests[4:]]
    for first, request in zip(requests[:4], requests[4:], strict=True):
        alone = held.prefix_kv(measured.model, torch.tensor([request.ids]), torch.bfloat16)
        assert request.kv.shape == alone.shape
        assert torch.equal(request.kv[..., :64, :], first.kv[..., :64, :]), "the document's KV is shared with the first question"
        assert (request.kv.float() - alone.float()).norm() < 0.02 * alone.float().norm()


def test_every_order_quality_and_size_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "load_model", loaded)
    monkeypatch.setattr(held, "AMPLE_BYTES", 64 << 20)
    report = held.run_held_bench(quick=True, log=lambda line: None)
    ratios = {(each["order"], each["quality"], each["share"]): each["hit_ratio"] for each in report["results"]}
    assert len(ratios) == 2 * 2 * 3
    assert ratios["turn", "exact", 1.0] == ratios["turn", "near_exact", 1.0] == ratios["demo", "exact", 1.0] > 0.2
    assert ratios["turn", "exact", 0.25] < ratios["turn", "exact", 1.0]
    said = io.StringIO()
    held.show(report, Console(width=200, file=said))
    assert f"{ratios['turn', 'exact', 1.0]:.4f}" in said.getvalue()
    assert "near_exact compared with exact in twice the memory" in said.getvalue()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fetch", "--codec", "int8"], "--codec: only allowed with bench codec, got bench fetch"),
        (["held", "--folder", "here"], "--folder: only allowed with bench disk and checkpoint, got bench held"),
        (["disk", "--model", "default"], "--model: only allowed with bench codec and held, got bench disk"),
    ],
)
def test_options_of_another_bench_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().out
