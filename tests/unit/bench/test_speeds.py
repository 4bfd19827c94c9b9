"""Speeds of codecs are measured for every codec and size, with one and two threads. No test asserts a speed."""

import pytest
import torch

from tests.unit.integrations.tiny_models import prompt_of, tiny
from tiered_kv.integrations.prefix import prefix_kv
from tiered_kv.tools.bench.speeds import prefill_us_per_token, speeds
from tiered_kv.tools.calibrate.engine import fitted

KV = torch.randn(2, 2, 1, 64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("threads", [1, 2])
def test_speeds_are_measured_for_every_codec_and_size(threads: int) -> None:
    before = torch.get_num_threads()
    found = speeds([KV], ("raw", "int4"), b"", (16, 64), threads=threads, working_set_bytes=1 << 18, turns=2)
    assert [(each["codec"], each["block_tokens"], each["threads"]) for each in found] == [
        (codec, tokens, threads) for tokens in (16, 64) for codec in ("raw", "int4")
    ]
    assert all(each["decode_vs_memcpy"] > 0 and each["encode_vs_memcpy"] > 0 and each["decode_us_per_token"] > 0 for each in found)
    assert found[-1]["ratio"] > found[0]["ratio"] == 1
    assert {each["repetitions"] for each in found} == {2 * 8 * threads}
    assert torch.get_num_threads() == before


def test_each_text_begins_at_position_0() -> None:
    """If two texts were concatenated, the second would be rotated back from wrong positions."""
    model = tiny()
    table = fitted(model, [prompt_of(60, seed) for seed in range(16)], 12)
    kvs = [prefix_kv(model, prompt_of(32, seed), torch.bfloat16) for seed in (101, 102)]
    options = dict(calibration=table, working_set_bytes=1 << 16, turns=1)
    (both,) = speeds(kvs, ["xlayer:1e-2"], table.rope, (16,), **options)
    alone = [speeds([kv], ["xlayer:1e-2"], table.rope, (16,), **options)[0] for kv in kvs]
    assert (both["blocks"], both["fell_back"]) == (4, 0)
    assert 2 / both["ratio"] == pytest.approx(sum(1 / each["ratio"] for each in alone))


def test_a_prefill_takes_time() -> None:
    assert prefill_us_per_token(tiny(), prompt_of(32)) > 0
