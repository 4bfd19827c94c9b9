"""Metrics and alerts of a cache that is too small for its traffic."""

import json
import time

import torch

from tiered_kv import BaseKVCache, CacheMonitor, KVCacheConfig, MetricsExporter

monitor = CacheMonitor(window_size=1000, alert_thresholds={"hit_rate": 0.3, "memory_share": (0.05, 0.9)})
with BaseKVCache(KVCacheConfig(max_tokens=512)) as cache:
    for request in range(100):
        prompt = range(1000 * (request % 40), 1000 * (request % 40) + 64)
        begun = time.perf_counter()
        if cache.layout:
            cache.fetch(prompt)
        cache.store(prompt, torch.zeros(2, 2, 1, 64, 32))
        monitor.record_operation(time.perf_counter() - begun)
        metrics = monitor.update_metrics(cache.get_stats())
print(f"hit rate {metrics.hit_rate:.2f}, {metrics.evictions} evictions")
for alert in monitor.get_alerts():
    print("alert:", alert.message)
print(json.dumps(MetricsExporter.export_to_dict(monitor)["metrics"], indent=2))
print(MetricsExporter.export_to_prometheus_format(monitor).splitlines()[2])
