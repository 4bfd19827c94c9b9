"""A training loop that also generates: training steps bypass the cache, and KV of old weights is never reused."""

import time

import torch
from tiny import prompt, tiny_model

from tiered_kv import CacheMode, CacheMonitor, KVCacheConfig, TransformersKVCache

model = tiny_model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
texts = [prompt(64, seed) for seed in range(4)]
monitor = CacheMonitor(alert_thresholds={"operation_time_s": 60})
config = KVCacheConfig(max_tokens=2048, cache_mode=CacheMode.TRAINING)

with TransformersKVCache(config, model=model) as cache:
    for step in range(6):
        model.train()
        loss = model(texts[step % 4], labels=texts[step % 4]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            model.eval()
            for _ in range(2):  # the second call reuses the prefix of the first
                begun = time.perf_counter()
                model.generate(texts[0], max_new_tokens=4, do_sample=False)
                monitor.record_operation(time.perf_counter() - begun)
                print(f"step {step}: loss {loss.item():.3f}, reused {cache.last_report.reused_tokens} of 64 tokens")
            metrics = monitor.update_metrics(cache.get_stats())
    print(f"hit rate {metrics.hit_rate:.2f}, mean time {metrics.operation_time_s * 1000:.1f} ms")
