"""Speeds of codecs: of every codec and size, by one thread and by two. How fast is nobody's test."""

import pytest
import torch

from tests.unit.integrations.tiny_models import prompt_of, tiny
from tiered_kv.bench.speeds import prefill_us_per_token, speeds

KV = torch.randn(2, 2, 1, 64, 8, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("threads", [1, 2])
def test_speeds_are_of_every_codec_and_size(threads: int) -> None:
    before = torch.get_num_threads()
    found = speeds(KV, ("raw", "int4"), b"", (16, 64), threads=threads, working_set_bytes=1 << 18, turns=2)
    assert [(each["codec"], each["block_tokens"], each["threads"]) for each in found] == [
        (codec, tokens, threads) for tokens in (16, 64) for codec in ("raw", "int4")
    ]
    assert all(each["decode_vs_memcpy"] > 0 and each["encode_vs_memcpy"] > 0 and each["decode_us_per_token"] > 0 for each in found)
    assert found[-1]["ratio"] > found[0]["ratio"] == 1
    assert {each["repetitions"] for each in found} == {2 * 8 * threads}
    assert torch.get_num_threads() == before


def test_a_prefill_takes_time() -> None:
    assert prefill_us_per_token(tiny(), prompt_of(32)) > 0
