"""Calibration of tiny random models: invalid input, the quality of the tables, and the model that they belong to."""

from pathlib import Path

import pytest
import torch

from tests.unit.integrations.tiny_models import VOCAB, prompt_of, tiny
from tiered_kv.codecs import Calibration
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.tools.bench.quality import evaluate
from tiered_kv.tools.calibrate import calibrate
from tiered_kv.tools.calibrate.corpus import KEPT_FOR_MEASUREMENTS, own_texts, prompts_of
from tiered_kv.tools.calibrate.engine import COST_PART, fitted, groups_of
from tiered_kv.tools.calibrate.unit import FACTOR_MAX, PROMISED, ecuq_times, with_units, xlayer_times


class Characters:
    """A tokenizer that makes one token of each character, and one start token."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [1] * add_special_tokens + [ord(character) % VOCAB for character in text]}


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "gpt2"])
def fit(request: pytest.FixtureRequest):
    model = tiny(request.param)
    return model, fitted(model, [prompt_of(60, seed) for seed in range(16)], 12)


def test_tables_of_a_model_are_for_its_shape_and_weights(fit) -> None:
    model, made = fit
    assert (made.layers, made.tokens) == (3, 16 * 44)
    assert made.weights[0] == Namespace.of(model).weights
    assert len(set(made.weights)) == 3
    assert (made.rope == b"") is hasattr(model.base_model, "wpe")


def test_a_calibration_is_valid_for_the_model_in_other_dtypes() -> None:
    weights = fitted(tiny("llama"), [prompt_of(60, seed) for seed in range(3)], 12).weights
    assert [Namespace.of(tiny("llama", dtype)).weights for dtype in (torch.bfloat16, torch.float16)] == list(weights[1:])
    assert Namespace.of(tiny("llama", seed=1)).weights not in weights


def test_codecs_fitted_to_a_model_encode_its_kv_with_small_error(fit, tmp_path: Path) -> None:
    model, made = fit
    made.save(tmp_path / "a")
    again = Calibration.load(tmp_path / "a")
    prompts = [prompt_of(60, seed) for seed in (101, 102)]
    steps = ["ecuq:0.01", "ecuq:0.03", "xlayer:0.007", "xlayer:0.015"]
    fine, coarse, fine_x, coarse_x = evaluate(model, prompts, steps, prefix_tokens=48, block_tokens=16, calibration=again)
    assert [each.fell_back for each in (fine, coarse, fine_x, coarse_x)] == [0, 0, 0, 0]
    assert 0 < fine.kl < coarse.kl < 0.3 and 0 < fine_x.kl < coarse_x.kl < 0.6
    assert coarse.error <= made.bound("ecuq", 3e-2) and coarse_x.error <= made.bound("xlayer", 0.015)


def test_steps_are_scaled_to_the_promised_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fitted(tiny("llama"), [prompt_of(60, seed) for seed in range(3)], 12)
    for kl, factor in ((4 * PROMISED["ecuq:1e-4"], 0.5), (0.0, 1.0), (1e9, 1 / FACTOR_MAX), (1e-12, FACTOR_MAX)):
        monkeypatch.setattr("tiered_kv.tools.calibrate.unit.measured", lambda *given, kl=kl: {"ecuq:1e-4": kl})
        scaled = with_units(made, None, [prompt_of(60)], 12, lambda line: None)
        torch.testing.assert_close(scaled.ecuq.width, factor * made.ecuq.width)
        assert torch.equal(scaled.xlayer.matrix, made.xlayer.matrix)


def test_steps_are_scaled_in_every_table() -> None:
    made = fitted(tiny("llama"), [prompt_of(60, seed) for seed in range(3)], 12)
    cut = 2 * made.xlayer.matrix.shape[2]
    double, ecuq = xlayer_times(made.xlayer, 2.0), ecuq_times(made.ecuq, 2.0)
    assert torch.equal(double.matrix[..., :cut], made.xlayer.matrix[..., :cut])
    assert torch.equal(double.matrix[..., cut:], 2 * made.xlayer.matrix[..., cut:])
    assert torch.equal(double.spread, made.xlayer.spread / 2)
    assert torch.equal(ecuq.width, 2 * made.ecuq.width) and torch.equal(ecuq.spread, made.ecuq.spread / 2)


def test_the_same_texts_give_the_same_tables() -> None:
    made = [fitted(tiny("llama"), [prompt_of(60, seed) for seed in range(3)], 12) for _ in range(2)]
    assert made[0].fingerprint == made[1].fingerprint


def test_fitting_does_not_change_the_model() -> None:
    model = tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    before = Namespace.of(model).weights
    needs = [each.requires_grad for each in model.parameters()]
    fitted(model, [prompt_of(60)], 12)
    assert Namespace.of(model).weights == before
    assert [each.requires_grad for each in model.parameters()] == needs
    assert all(each.grad is None for each in model.parameters())


def test_a_wide_model_is_fitted_by_groups_of_heads() -> None:
    model = tiny("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=40)
    made = fitted(model, [prompt_of(60, seed) for seed in range(4)], 12)
    assert made.xlayer.groups == 8 == groups_of(10**5, 3, 8, 40)
    [result] = evaluate(model, [prompt_of(60, 77)], ["xlayer:0.005"], prefix_tokens=48, block_tokens=16, calibration=made)
    assert result.fell_back == 0 and 0 < result.kl < 0.3


@pytest.mark.parametrize(
    ("parameters", "layers", "heads", "dim", "groups"),
    [(134_515_008, 30, 3, 64, 1), (8_030_261_248, 32, 8, 128, 2), (70_553_706_496, 80, 8, 128, 1), (6_738_415_616, 32, 32, 128, 32)],
    ids=["SmolLM2-135M", "Llama-3-8B", "Llama-3-70B", "Llama-2-7B"],
)
def test_decoding_costs_at_most_a_twentieth_of_a_prefill(parameters: int, layers: int, heads: int, dim: int, groups: int) -> None:
    assert groups_of(parameters, layers, heads, dim) == groups
    if 2 * heads * dim > 512:
        assert 3 * (2 * heads * dim) ** 2 * layers / groups <= COST_PART * parameters


def test_too_little_text_is_refused_with_the_needed_amount() -> None:
    with pytest.raises(TieredKVError, match=r"--text: must have at least 10000 tokens.*got 5\d*") as caught:
        calibrate(tiny("llama"), Characters(), ["hello " * 900])
    assert caught.value.kind is Kind.CONFIG
    with pytest.raises(TieredKVError, match="--tokens: must be at least 10000, got 9999"):
        calibrate(tiny("llama"), Characters(), tokens=9_999)


def test_a_model_with_an_unsupported_rope_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiered_kv.tools.calibrate.engine.rope_of_model", lambda model: None)
    with pytest.raises(TieredKVError, match=r"its rotary embedding \(RoPE\) is not supported") as caught:
        fitted(tiny("llama"), [prompt_of(60)], 12)
    assert caught.value.kind is Kind.MODEL


def test_prompts_alternate_between_texts_and_have_start_tokens() -> None:
    texts = [character * 500 for character in "abc"]
    prompts = prompts_of(Characters(), texts, 700, 101, least=0)
    assert [ids.shape for ids in prompts] == [(1, 101)] * 7
    assert [int(ids[0, 1]) for ids in prompts] == [ord(character) % VOCAB for character in "abcabca"]
    assert all(int(ids[0, 0]) == 1 for ids in prompts)


def test_built_in_texts_are_many_and_exclude_those_of_measurements() -> None:
    import sysconfig

    texts = own_texts()
    assert texts == own_texts()
    assert sum(map(len, texts)) > 500_000 and len(texts) > 100
    by_size = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    kept = {path.read_text("utf-8")[:1000] for path in by_size[:KEPT_FOR_MEASUREMENTS]}
    assert not kept & {text[:1000] for text in texts}
    assert not any("longitude" in text.lower() and "harrison" in text.lower() for text in texts)
