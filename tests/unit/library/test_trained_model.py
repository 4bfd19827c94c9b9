"""A trained model with a reused prefix that is compressed in memory: its error is at most that in docs/library.md."""

from pathlib import Path

import pytest
import torch

from tiered_kv.library.config import KVCacheConfig
from tiered_kv.tools import demo
from tiered_kv.tools.demo.model import load_model

PREFIX, CONTINUED, BLOCK = 640, 60, 64
QUANTIZED, COMPRESSED = dict(use_quantization=True), dict(use_compression=True)
MODES = {  # settings, codec, KL in nats per token (int8 and int4: that of the worst of 32 texts in benchmarks/results)
    "int8": (QUANTIZED, "int8", 4.7e-5),
    "int4": (QUANTIZED | dict(quantization_bits=4), "int4", 8.9e-3),
    "svd": (COMPRESSED, "lowrank", 2e-2),
    "sparse": (COMPRESSED | dict(compression_method="sparse"), "sparse", 5e-5),
    "both": (QUANTIZED | COMPRESSED, "lowrank", 2e-2),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained():
    """Returns the default model in float32, the demo's documents as ids (1, PREFIX + CONTINUED), and `continued` of the first."""
    model, tokenizer = load_model(dtype="float32")
    documents = sorted((Path(demo.__file__).parent / "documents").glob("*.md"))
    texts = [tokenizer(each.read_text(), return_tensors="pt")["input_ids"][:, : PREFIX + CONTINUED] for each in documents]
    return model, texts, continued(model, texts[0])


def continued(model, ids):
    """Returns the log-probabilities (CONTINUED, V) of the next token after each of the last tokens, in float64."""
    with torch.no_grad():
        return torch.log_softmax(model(ids, logits_to_keep=CONTINUED).logits[0].double(), -1)


@pytest.mark.parametrize("mode", MODES)
def test_lossy_modes_are_as_exact_as_documented(mode, trained, attached):
    model, texts, plain = trained
    settings, codec, kl_max = MODES[mode]
    ids, *others = texts
    # not all texts fit in three quarters of memory, so the first text is compressed completely
    cache = attached(model, KVCacheConfig(max_tokens=1024, block_tokens=BLOCK, cache_strategy="lru", **settings))
    with torch.no_grad():
        model(ids[:, :PREFIX], logits_to_keep=1)
        raw = cache.cache.fetch(ids[0, :PREFIX]).kv.clone()
        for other in others:
            model(other[:, : PREFIX // 2], logits_to_keep=1)
            cache.cache.engine(cache.cache.layout).settle()
    assert set(cache.get_cache_stats()["codecs"]["host"]) == {codec}, "no block fell back"
    kept = cache.cache.fetch(ids[0, :PREFIX])
    assert kept.tokens == PREFIX
    differs = (kept.kv != raw).unflatten(3, (-1, BLOCK)).amax((0, 1, 2, 4, 5))
    assert differs.shape == (PREFIX // BLOCK,)
    assert bool(differs.all()), "each block is compressed"
    hits = cache.get_cache_stats()["hits"]
    decoded = continued(model, ids)
    assert cache.get_cache_stats()["hits"] - hits == PREFIX // BLOCK
    kl = float((plain.exp() * (plain - decoded)).sum(-1).mean())
    assert 0 < kl <= kl_max
    greedy = dict(do_sample=False, max_new_tokens=4)
    assert model.generate(ids, **greedy).shape == (1, PREFIX + CONTINUED + 4)
    assert cache.last_report.reused_tokens == PREFIX


def test_exact_mode_equals_the_plain_model(trained, attached):
    model, texts, plain = trained
    ids, greedy = texts[0], dict(do_sample=False, max_new_tokens=16, return_dict_in_generate=True, output_logits=True)
    text = model.generate(ids, **greedy)
    cache = attached(model, KVCacheConfig(max_tokens=1024, block_tokens=BLOCK))
    with torch.no_grad():
        model(ids[:, :PREFIX], logits_to_keep=1)
    torch.testing.assert_close(continued(model, ids), plain, rtol=1e-4, atol=1e-4)
    assert cache.get_cache_stats()["hits"] == PREFIX // BLOCK
    reused = model.generate(ids, **greedy)
    assert cache.last_report.reused_tokens == PREFIX
    assert torch.equal(reused.sequences, text.sequences)
    torch.testing.assert_close(torch.stack(reused.logits), torch.stack(text.logits), rtol=1e-4, atol=1e-4)
