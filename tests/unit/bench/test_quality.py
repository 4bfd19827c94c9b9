"""The quality of codecs on a model: exact codecs have no error, and fewer bits have more."""

import pytest

from tests.unit.integrations.tiny_models import prompt_of, tiny
from tiered_kv.tools.bench.quality import as_records, evaluate


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_lossless_has_no_error_and_fewer_bits_have_more(family: str) -> None:
    model = tiny(family)
    prompts = [prompt_of(60, seed) for seed in (1, 2)]
    results = evaluate(model, prompts, ("raw", "lossless", "int8", "int4"), prefix_tokens=40, block_tokens=16)
    exact, lossless, int8, int4 = results
    for each in (exact, lossless):
        assert (each.kl, each.kl_p99, each.top1, each.ppl_ratio, each.error, each.prompts, each.blocks) == (0, 0, 1, 1, 0, 2, 4)
    assert 0 < int8.kl < int4.kl < 1 and int8.kl <= int8.kl_worst <= int8.kl_p99
    assert exact.ratio < 1 < int8.ratio < int4.ratio  # frames have headers
    assert int8.bytes_per_token * int8.ratio == pytest.approx(exact.bytes_per_token * exact.ratio)
    assert [record["codec"] for record in as_records(results)] == ["raw", "lossless", "int8", "int4"]


def test_progress_is_reported_in_parts_of_prompts() -> None:
    told: list[float] = []
    evaluate(tiny(), [prompt_of(40), prompt_of(40, 2)], ("raw", "int8"), prefix_tokens=32, block_tokens=16, advance=told.append)
    assert len(told) == 6
    assert sum(told) == pytest.approx(2)
