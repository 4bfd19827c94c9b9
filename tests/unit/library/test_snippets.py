"""The lines of code with which users call the library, run as documented, one after the other."""

import time

import pytest
import torch
from tiny_models import prompt_of, tiny


@pytest.fixture
def model():
    model = tiny()
    model.generation_config.max_new_tokens = 8  # the documented lines name no file
    return model


def test_the_documented_lines_of_a_cache(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from tiered_kv import CacheMode, CacheStrategy, KVCacheConfig

    config = KVCacheConfig(
        max_tokens=4096,
        cache_strategy=CacheStrategy.ADAPTIVE,
        cache_mode=CacheMode.INFERENCE,
        use_quantization=True,
        use_compression=True,
        enable_profiling=True,
    )
    assert {"LRU", "LFU", "ADAPTIVE"} <= set(CacheStrategy.__members__)
    assert {"TRAINING", "INFERENCE"} <= set(CacheMode.__members__)

    from tiered_kv import AdaptiveKVCache, BaseKVCache, PagedKVCache, TransformersKVCache

    for cls in (BaseKVCache, AdaptiveKVCache, PagedKVCache):
        with cls(config) as each:
            assert each.get_stats()["hit_rate"] == 0.0

    tokenizer = None
    input_ids = prompt_of(40)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    plain = model.generate(**inputs, use_cache=True, do_sample=False)
    cache = TransformersKVCache(config, model=model, tokenizer=tokenizer)
    cache.warmup(num_samples=100, seq_len=128)
    stats = cache.get_cache_stats()
    assert stats["hit_rate"] == 0.0
    for _ in range(2):
        outputs = model.generate(**inputs, use_cache=True, do_sample=False)
        assert torch.equal(outputs, plain)
    assert cache.get_cache_stats()["hit_rate"] == 0.5

    from tiered_kv import CacheMonitor
    from tiered_kv.monitoring import MetricsExporter

    operation_time = time.perf_counter() - time.perf_counter() + 1.0
    monitor = CacheMonitor(window_size=1000, alert_thresholds={"hit_rate": 0.3, "memory_usage_mb": 8000})
    monitor.record_operation(operation_time)
    metrics = monitor.update_metrics(cache.get_stats())
    assert metrics.hit_rate == 0.5
    assert monitor.get_alerts() == []
    assert MetricsExporter.export_to_dict(monitor) == monitor.get_summary()
    assert "tiered_kv_cache_hit_rate 0.5" in MetricsExporter.export_to_prometheus_format(monitor)

    from tiered_kv import CachePersistence
    from tiered_kv.persistence import load_cache_checkpoint, save_cache_checkpoint

    persistence = CachePersistence("./cache_checkpoints")
    persistence.save_cache(cache, "cache_state.pkl")
    with TransformersKVCache(config, model=tiny()) as new_cache:
        persistence.load_cache(new_cache, "cache_state.pkl")
        assert new_cache.cache.match(input_ids).tokens == 32
    save_cache_checkpoint(cache, "./checkpoints", step=1000)
    assert load_cache_checkpoint(cache, "./checkpoints", step=None) == 1000
    assert "look-up" in cache.profile_table()
    cache.close()


def test_the_documented_lines_of_the_wrapper(model):
    from tiered_kv import KVCacheConfig, ModelCacheWrapper

    input_ids, cache_config = prompt_of(40), KVCacheConfig(max_tokens=4096)
    plain = model(input_ids).logits
    wrapper = ModelCacheWrapper(model, cache_config)
    wrapper.enable_cache()
    outputs = model(input_ids)
    stats = wrapper.get_cache_stats()
    wrapper.disable_cache()
    assert torch.equal(outputs.logits, plain)
    assert stats["num_entries"] == 2
    wrapper.close()


def test_the_documented_lines_of_the_parts():
    from tiered_kv import Compressor as OfThePackage
    from tiered_kv import KVCacheConfig
    from tiered_kv import MemoryManager as ManagerOfThePackage
    from tiered_kv import Quantizer as QuantizerOfThePackage
    from tiered_kv.compression import Compressor
    from tiered_kv.memory_manager import MemoryManager
    from tiered_kv.quantization import Quantizer
    from tiered_kv.strategies import (
        AdaptiveEvictionStrategy,
        BaseEvictionStrategy,
        LFUEvictionStrategy,
        LRUEvictionStrategy,
        create_eviction_strategy,
    )

    assert (OfThePackage, ManagerOfThePackage, QuantizerOfThePackage) == (Compressor, MemoryManager, Quantizer)
    config, device = KVCacheConfig(max_tokens=4096), "cpu"
    key, value = torch.randn(2, 2, 4, 32, 64)
    quantizer = Quantizer(bits=8, use_amp=True)
    key_q, value_q = quantizer.quantize(key, value)
    compressor = Compressor(ratio=0.3, method="svd")
    key_c, value_c = compressor.compress(key_q, value_q)
    back = quantizer.dequantize(*compressor.decompress(key_c, value_c))
    assert back[0].shape == key.shape
    manager = MemoryManager(config, device)
    assert manager.should_evict(cache_size=5000)
    assert manager.collect_garbage() >= 0
    strategy = create_eviction_strategy(config.cache_strategy)
    assert isinstance(strategy, AdaptiveEvictionStrategy)
    assert issubclass(LRUEvictionStrategy, BaseEvictionStrategy)
    assert issubclass(LFUEvictionStrategy, BaseEvictionStrategy)
