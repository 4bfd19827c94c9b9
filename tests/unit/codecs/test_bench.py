"""The evaluation of codecs on a model: exact ones cost nothing, and worse ones more."""

import pytest
import torch

from tests.unit.integrations.tiny_models import prompt_of, tiny
from tiered_kv.bench.codec import as_records, evaluate, own_texts, prompts_of, speeds
from tiered_kv.codecs.rotation import rope_of_theta
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.rope import rope_of_model


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_lossless_costs_nothing_and_fewer_bits_cost_more(family: str) -> None:
    model = tiny(family)
    prompts = [prompt_of(60, seed) for seed in (1, 2)]
    results = evaluate(model, prompts, ("raw", "lossless", "int8", "int4"), prefix_tokens=40, block_tokens=16)
    exact, lossless, int8, int4 = results
    for each in (exact, lossless):
        assert (each.kl, each.kl_p99, each.top1, each.ppl_ratio, each.error, each.prompts, each.blocks) == (0, 0, 1, 1, 0, 2, 4)
    assert 0 < int8.kl < int4.kl < 1 and int8.kl <= int8.kl_worst <= int8.kl_p99
    assert exact.ratio < 1 < int8.ratio < int4.ratio  # frames have headers
    assert [record["codec"] for record in as_records(results)] == ["raw", "lossless", "int8", "int4"]


def test_the_rotation_of_a_model_is_found() -> None:
    assert rope_of_model(tiny("gpt2")) == b""
    assert rope_of_model(tiny("llama")) == rope_of_theta(10_000.0, 8)
    assert rope_of_model(torch.nn.Linear(1, 1)) is None
    scaled = dict(rope_type="dynamic", factor=2.0, rope_theta=10_000.0)
    assert rope_of_model(tiny("llama", rope_parameters=scaled)) is None


def test_prompts_are_cut_to_size_and_too_few_are_refused() -> None:
    def tokenizer(text: str, return_tensors: str) -> dict:
        return {"input_ids": torch.arange(len(text))[None]}

    [prompt] = prompts_of(tokenizer, iter(["short", "long enough"]), 1, 8)
    assert torch.equal(prompt, torch.arange(8)[None])
    with pytest.raises(TieredKVError, match="--prompts: 1 texts of 8 tokens where 2") as caught:
        prompts_of(tokenizer, iter(["short", "long enough"]), 2, 8)
    assert caught.value.kind is Kind.CONFIG


def test_there_are_texts_on_every_machine() -> None:
    texts = own_texts()
    assert "longitude" in "".join(next(texts).lower() for _ in range(4))
    assert "import" in next(texts)


def test_speeds_are_of_every_codec_and_size() -> None:
    kv = torch.randn(2, 2, 1, 64, 8).bfloat16()
    found = speeds(kv, ("raw", "int4"), b"", (16, 64), working_set_bytes=1 << 20)
    assert [(each["codec"], each["block_tokens"]) for each in found] == [("raw", 16), ("int4", 16), ("raw", 64), ("int4", 64)]
    assert all(each["decode_vs_memcpy"] > 0 and each["encode_vs_memcpy"] > 0 for each in found)
    assert found[-1]["ratio"] > found[0]["ratio"] == 1
