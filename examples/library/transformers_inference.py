"""A transformers model with an attached cache: `generate` is called as usual, and reuses the longest cached prefix."""

import torch
from tiny import prompt, tiny_model

from tiered_kv import KVCacheConfig, ModelCacheWrapper, TransformersKVCache

model = tiny_model()
document = prompt(400)
questions = [torch.cat([document, prompt(10, seed)], 1) for seed in (1, 2, 3)]
plain = [model.generate(ids, max_new_tokens=8, do_sample=False) for ids in questions]

with TransformersKVCache(KVCacheConfig(max_tokens=4096), model=model) as cache:
    cache.warmup(num_samples=10, seq_len=128)
    for ids, expected in zip(questions, plain, strict=True):
        output = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert torch.equal(output, expected)
        print(f"reused {cache.last_report.reused_tokens} of {ids.shape[1]} tokens")
    batch = torch.cat(questions)
    model.generate(batch, max_new_tokens=4, do_sample=False)
    print(f"a batch of three reused {cache.last_report.reused_tokens} of {batch.numel()}")
    print(f"hit rate {cache.get_cache_stats()['hit_rate']:.2f}")

wrapper = ModelCacheWrapper(model, KVCacheConfig(max_tokens=4096))  # the same, but it can be switched on and off
wrapper.enable_cache()
model(document)
print(wrapper.get_cache_stats()["num_entries"], "blocks stored by a forward pass")
wrapper.disable_cache()
wrapper.close()
