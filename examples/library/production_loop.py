"""A server's loop: requests of several sessions, a checkpoint every N requests, and a restart with a warm cache."""

import time

import torch
from tiny import prompt, tiny_model

from tiered_kv import CacheMonitor, KVCacheConfig, TieredKVError, TransformersKVCache, load_cache_checkpoint, save_cache_checkpoint

EVERY = 8
FOLDER = "./production_checkpoints"
model = tiny_model()
config = KVCacheConfig(max_tokens=8192)


def serve(requests: range) -> float:
    """Answer requests, each of them the next turn of one of four sessions. Returns the hit rate."""
    monitor = CacheMonitor(alert_thresholds={"recent_hit_rate": 0.2})
    with TransformersKVCache(config, model=model) as cache:
        try:
            print("starts with the checkpoint of request", load_cache_checkpoint(cache, FOLDER))
        except TieredKVError as error:
            print("starts cold:", error)
        for number in requests:
            session, turn = number % 4, number // 4
            ids = torch.cat([prompt(200), prompt(20 * (turn + 1), seed=session + 1)], 1)
            begun = time.perf_counter()
            model.generate(ids, max_new_tokens=4, do_sample=False)
            monitor.record_operation(time.perf_counter() - begun)
            metrics = monitor.update_metrics(cache.get_stats())
            if (number + 1) % EVERY == 0:
                save_cache_checkpoint(cache, FOLDER, step=number + 1)
        print(f"requests {requests.start} to {requests.stop - 1}: hit rate {metrics.hit_rate:.2f}, alerts {monitor.get_alerts()}")
        return metrics.hit_rate


cold, warm = serve(range(16)), serve(range(16, 24))
assert warm > cold
