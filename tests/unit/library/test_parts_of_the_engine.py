"""The library's eviction strategies and memory manager."""

import pytest

import tiered_kv
from tiered_kv import CacheStrategy, KVCacheConfig
from tiered_kv.errors import TieredKVError
from tiered_kv.library import memory
from tiered_kv.library.memory import MemoryFigures
from tiered_kv.memory_manager import MemoryManager
from tiered_kv.strategies import (
    AdaptiveEvictionStrategy,
    BaseEvictionStrategy,
    LFUEvictionStrategy,
    LRUEvictionStrategy,
    create_eviction_strategy,
)


@pytest.mark.parametrize("strategy", CacheStrategy)
def test_every_strategy_returns_as_many_victims_as_requested(strategy) -> None:
    ranking = create_eviction_strategy(strategy, 10)
    assert isinstance(ranking, BaseEvictionStrategy)
    assert ranking.name == strategy.value
    for key in "abcdef":
        ranking.add(key, 1.0)
    chosen = ranking.victims(2, protected=("a",), now_s=2.0)
    assert len(chosen) == 2
    assert "a" not in chosen
    ranking.remove(chosen[0])
    assert len(ranking) == 5
    assert chosen[0] not in ranking
    assert ranking.victims(0) == []


def test_each_strategy_class_has_its_strategys_name() -> None:
    for member, cls in [("LRU", LRUEvictionStrategy), ("LFU", LFUEvictionStrategy), ("ADAPTIVE", AdaptiveEvictionStrategy)]:
        assert type(create_eviction_strategy(CacheStrategy[member])) is cls
        assert type(create_eviction_strategy(member.lower())) is cls
    assert tiered_kv.create_eviction_strategy is create_eviction_strategy


def test_order_of_eviction() -> None:
    times, counts = {1: 5.0, 2: 1.0, 3: 9.0, 4: 2.0}, {1: 1, 2: 7, 3: 2, 4: 2}
    assert LRUEvictionStrategy().select_eviction_candidates([1, 2, 3, 4], times, counts, 2) == [2, 4]
    assert LFUEvictionStrategy().select_eviction_candidates([1, 2, 3, 4], times, counts, 3) == [1, 4, 3]
    ranking = LRUEvictionStrategy()
    ranking.add("prompt")
    ranking.add("answer", parent="prompt")
    ranking.use("answer")
    assert ranking.victims(2) == ["answer", "prompt"], "a parent is evicted after its children"


def test_invalid_strategy_arguments_are_rejected() -> None:
    for wrong in ("paged", None, 3):
        with pytest.raises(TieredKVError, match="strategy must be one of lru, lfu"):
            create_eviction_strategy(wrong)
    with pytest.raises(TieredKVError, match="capacity must be"):
        LRUEvictionStrategy(0)
    with pytest.raises(TieredKVError, match="no entry 5"):
        LRUEvictionStrategy().use(5)
    ranking = LRUEvictionStrategy()
    ranking.add(5)
    with pytest.raises(TieredKVError, match="is there already"):
        ranking.add(5)


def test_the_manager_checks_tokens_and_real_memory(monkeypatch) -> None:
    manager = MemoryManager(KVCacheConfig(max_tokens=1000), "cpu")
    figures = manager.figures()
    assert 0 < figures.process_bytes < figures.total_bytes
    assert 0 <= figures.available_bytes <= figures.total_bytes
    stats = manager.get_memory_stats()
    assert stats["host_total_mb"] == figures.total_bytes / (1 << 20)
    monkeypatch.setattr(manager, "figures", lambda: MemoryFigures(100, 50, 10))
    assert not manager.should_evict(cache_size=999)
    assert manager.should_evict(cache_size=1000)
    monkeypatch.setattr(manager, "figures", lambda: MemoryFigures(100, 4, 10))
    assert manager.should_evict(cache_size=0)
    assert manager.collect_garbage() == 0


def test_a_containers_memory_limit_applies(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    machine = memory.host_memory()
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "memory.current").write_text("786432\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 262144\n")
    assert memory.host_memory()[:2] == (1 << 20, 1 << 19)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.host_memory().total_bytes == machine.total_bytes


def test_the_manager_rejects_invalid_arguments(monkeypatch) -> None:
    with pytest.raises(TieredKVError, match="device must be"):
        MemoryManager(KVCacheConfig(), "tape")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(TieredKVError, match="device 'cuda' is not there"):
        MemoryManager(KVCacheConfig(), "cuda")
    with pytest.raises(TieredKVError, match="config must be"):
        MemoryManager({}, "cpu")
    for wrong in (-1, 1.5, True, None):
        with pytest.raises(TieredKVError, match="cache_size must be"):
            MemoryManager(KVCacheConfig(), "cpu").should_evict(wrong)
