"""The warm-up of an attached cache, the wrapper that switches it on and off, and quantized memory."""

import pytest
import torch
from library_config import BLOCK, CONFIG, GREEDY
from tiny_models import prompt_of, tiny

from tiered_kv import KVCacheConfig
from tiered_kv.errors import TieredKVError
from tiered_kv.library.model import ModelCacheWrapper


def test_a_warm_up_leaves_nothing_behind(attached):
    model = tiny()
    cache = attached(model, CONFIG.with_(enable_profiling=True))
    assert cache.warmup(num_samples=20, seq_len=4 * BLOCK) == 20
    stats = cache.get_cache_stats()
    assert (stats["num_entries"], stats["lookups"], stats["hits"], stats["stores"], stats["evictions"]) == (0, 0, 0, 0, 0)
    assert all(each.calls == 0 for each in cache.cache.profile.stages())
    model.generate(prompt_of(20), **GREEDY)
    model.generate(prompt_of(20), **GREEDY)
    assert cache.get_cache_stats()["hit_rate"] == 0.5
    for name, value in (("num_samples", 0), ("seq_len", 1.5)):
        with pytest.raises(TieredKVError, match=f"{name} must be"):
            cache.warmup(**{name: value})
    assert attached(tiny(seed=2), CONFIG.with_(enable_warmup=False)).warmup() == 0


def test_a_wrapper_switches_on_and_off():
    model = tiny()
    ids = prompt_of(20)
    with torch.no_grad():
        plain = model(ids).logits
        with ModelCacheWrapper(model, CONFIG) as wrapper:
            assert torch.equal(model(ids).logits, plain)
            assert wrapper.get_cache_stats()["stores"] == 0
            wrapper.enable_cache(), wrapper.enable_cache()
            assert torch.equal(model(ids).logits, plain)
            assert wrapper.get_cache_stats()["num_entries"] == 2
            wrapper.disable_cache()
            model(prompt_of(20, seed=4))
            assert wrapper.get_cache_stats()["num_entries"] == 2
            wrapper.clear_cache()
            assert wrapper.get_cache_stats()["num_entries"] == 0


def test_quantized_memory_changes_the_next_token_distribution_little(attached):
    """KL of the next token at most 1e-3 with 8 bits on random weights; docs/codecs.md has what trained models lose."""
    model = tiny(num_hidden_layers=2, hidden_size=128, head_dim=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4 if parameter.ndim > 1 else 1)  # attention to more than one token, as in trained models
    config = KVCacheConfig(max_tokens=4096, block_tokens=16, use_quantization=True, cache_strategy="lru")
    cache = attached(model, config)
    prompts = [prompt_of(200, seed=seed) for seed in range(20)]
    wanted = dict(do_sample=False, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    plain = [cache.attachment._hooks["generate"]._plain(ids, use_cache=False, **wanted).logits[0] for ids in prompts]
    for ids in prompts:
        model.generate(ids, **wanted)
    cache.cache.engine(cache.cache.layout).settle()
    assert cache.get_cache_stats()["codecs"]["host"]["int8"]["blocks"] > 0
    for ids, exact in zip(prompts, plain, strict=True):
        found = model.generate(ids, **wanted).logits[0]
        kl = torch.nn.functional.kl_div(found.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="sum")
        assert kl <= 1e-3
    assert cache.get_cache_stats()["hits"] > 0
