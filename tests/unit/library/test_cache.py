"""Caches within one process: look-ups by prefix and by position, the cap in tokens, and the statistics."""

import threading

import pytest
import torch

from tiered_kv import AdaptiveKVCache, BaseKVCache, CachePersistence, CacheStrategy, KVCacheConfig, KVLayout, Namespace
from tiered_kv.clock import ManualClock
from tiered_kv.errors import Kind, TieredKVError

BLOCK = 8
LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=8, dtype="float32", block_tokens=BLOCK)


def kv_of(tokens: int, seed: int = 0, layout: KVLayout = LAYOUT) -> torch.Tensor:
    return torch.randn(layout.kv_shape(tokens), generator=torch.Generator().manual_seed(seed)).to(layout.torch_dtype)


def pair(seed: int, shape: tuple = (1, 2, 4, 8), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return key, value


@pytest.fixture
def make(checked):
    def make(cls=BaseKVCache, **settings):
        given = {"max_tokens": 8 * BLOCK, "block_tokens": BLOCK} | settings
        options = {name: given.pop(name) for name in ("layout", "namespace", "clock") if name in given}
        return checked(cls(KVCacheConfig(**given), **options))

    return make


def test_a_fetched_prefix_equals_the_stored_one_bit_for_bit(make) -> None:
    cache, kv = make(), kv_of(30)
    assert cache.match(range(30)).tokens == 0
    assert cache.store(range(30), kv).new == 3
    fetched = cache.fetch([*range(20), 99, 98])
    assert fetched.tokens == 2 * BLOCK
    assert torch.equal(fetched.kv, kv[..., : 2 * BLOCK, :])
    assert cache.match(range(30)).tokens == 3 * BLOCK


def test_the_layout_is_that_of_the_config_or_of_the_first_store(make) -> None:
    with pytest.raises(TieredKVError, match="num_layers, num_heads, head_dim and dtype"):
        make().fetch(range(8))
    said = make(num_layers=2, num_heads=2, head_dim=8, dtype="float32")
    assert said.fetch(range(8)).tokens == 0
    assert said.layout == LAYOUT
    cache = make()
    with pytest.raises(TieredKVError, match="must be a tensor"):
        cache.store(range(8), torch.zeros(2, 8))
    cache.store(range(8), kv_of(8))
    with pytest.raises(TieredKVError, match="must be float32, the layout's dtype"):
        cache.store(range(8), kv_of(8).double())


@pytest.mark.parametrize("strategy", CacheStrategy)
def test_max_tokens_is_a_cap_whatever_the_strategy(make, strategy) -> None:
    cache = make(cache_strategy=strategy)
    for number in range(10):
        ids = range(100 * number, 100 * number + 2 * BLOCK)
        assert cache.store(ids, kv_of(2 * BLOCK, number)).refused == 0
        assert torch.equal(cache.fetch(ids).kv, kv_of(2 * BLOCK, number))
    stats = cache.get_stats()
    assert stats["num_entries"] == 8
    assert stats["evictions"] == 12
    assert 0 < stats["memory_usage_bytes"] <= stats["capacity_bytes"]


def test_put_and_get_by_position(make) -> None:
    cache = make()
    for at in range(6):
        assert cache.put(at, *pair(at))
    assert cache.put(2, *pair(20))
    for at, seed in [(0, 0), (2, 20), (5, 5)]:
        for found, given in zip(cache.get(at), pair(seed), strict=True):
            assert torch.equal(found, given)
    assert cache.get(6) is None
    assert cache.positions() == [0, 1, 3, 4, 5, 2]
    other = pair(7, (3, 1, 4, 8), torch.bfloat16)
    assert cache.put(1, *other)
    assert torch.equal(cache.get(1)[1], other[1])


def test_get_returns_none_for_evicted_positions(make) -> None:
    cache = make(max_tokens=32, block_tokens=4, cache_strategy="lru")
    for at in range(300):
        assert cache.put(at, *pair(at))
    assert cache.positions() == list(range(292, 300))
    assert cache.get(0) is None
    assert len(cache._placed) < 100


BAD_PAIRS = {
    "other shapes": (torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 5, 8), "value must have the shape"),
    "other dtypes": (torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8).half(), "value must have the dtype"),
    "whole numbers": (torch.zeros(1, 1, 4, 8).int(), torch.zeros(1, 1, 4, 8).int(), "floating-point"),
    "no tensor": ([1.0], torch.zeros(1, 1, 4, 8), "key must be a torch tensor"),
    "three axes": (torch.zeros(1, 4, 8), torch.zeros(1, 4, 8), "batch, heads, tokens"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_invalid_pairs_and_positions_are_rejected(make, case) -> None:
    key, value, words = BAD_PAIRS[case]
    cache = make()
    with pytest.raises(TieredKVError, match=words) as caught:
        cache.put(0, key, value)
    assert caught.value.kind is Kind.LAYOUT
    assert cache.get(0) is None
    for at in (-1, 1.5, True, "0"):
        with pytest.raises(TieredKVError, match="position must be"):
            cache.put(at, *pair(0))


def test_a_block_of_more_tokens_than_the_cap_is_rejected(make) -> None:
    with pytest.raises(TieredKVError, match="max_tokens 64 has no room for 65 tokens, the size of one block"):
        make().put(0, *pair(0, (1, 2, 65, 8)))


def test_statistics_add_up_and_clear_resets_them(make) -> None:
    cache = make()
    assert (cache.get_stats()["hit_rate"], cache.get_stats()["lookups"]) == (0.0, 0)
    cache.store(range(16), kv_of(16))
    cache.fetch(range(16))
    cache.fetch(range(500, 516))
    stats = cache.get_stats()
    assert (stats["lookups"], stats["hits"], stats["misses"], stats["hit_rate"]) == (4, 2, 2, 0.5)
    assert stats["stores"] == 1
    cache.clear()
    assert cache.get_stats()["num_entries"] == 0
    assert cache.fetch(range(16)).tokens == 0
    cache.close()
    cache.close()
    with pytest.raises(TieredKVError) as caught:
        cache.fetch(range(16))
    assert caught.value.kind is Kind.CLOSED


def test_namespaces_share_no_blocks(make) -> None:
    ours, theirs = (make(layout=LAYOUT, namespace=Namespace(weights=name)) for name in ("ours", "theirs"))
    ours.store(range(8), kv_of(8))
    theirs.store(range(8), kv_of(8, 1))
    assert torch.equal(ours.fetch(range(8)).kv, kv_of(8))
    assert torch.equal(theirs.fetch(range(8)).kv, kv_of(8, 1))


def test_adaptive_is_adaptive_whatever_the_config_says(make) -> None:
    cache = make(AdaptiveKVCache, cache_strategy="lru")
    assert cache.config.cache_strategy is CacheStrategy.ADAPTIVE
    assert cache.learned() == {}
    cache.store(range(8), kv_of(8))
    assert cache.learned()["name"] == "adaptive"


def test_a_config_of_another_type_is_rejected() -> None:
    with pytest.raises(TieredKVError, match="config must be a KVCacheConfig, got dict"):
        BaseKVCache({"max_tokens": 5})


def test_two_threads_use_one_cache(make) -> None:
    cache, wrong = make(max_tokens=64 * BLOCK), []

    def work(worker: int) -> None:
        for number in range(30):
            ids = range(1000 * (number % 5), 1000 * (number % 5) + 3 * BLOCK)
            cache.store(ids, kv_of(3 * BLOCK, number % 5))
            found = cache.fetch(ids)
            if not torch.equal(found.kv, kv_of(3 * BLOCK, number % 5)[..., : found.tokens, :]):
                wrong.append(number)
            cache.put(worker, *pair(worker))
            if not torch.equal(cache.get(worker)[0], pair(worker)[0]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=[worker]) for worker in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(("settings", "error"), [({"quantization_bits": 8}, 4e-5), ({"quantization_bits": 4}, 2e-2)])
def test_blocks_are_quantized_when_memory_fills_up(make, settings, error) -> None:
    cache = make(max_tokens=8192, block_tokens=16, use_quantization=True, **settings)
    layout = KVLayout(4, 2, 32, "float32", 16)
    prompts = [range(1000 * number, 1000 * number + 256) for number in range(48)]
    for number, ids in enumerate(prompts):
        cache.store(ids, kv_of(256, number, layout))
    cache.engine(layout).settle()
    assert sum(each["blocks"] for each in cache.get_stats()["codecs"]["host"].values()) > 0
    kept = 0
    for number, ids in enumerate(prompts):
        found = cache.fetch(ids)
        exact = kv_of(256, number, layout)[..., : found.tokens, :]
        apart = (found.kv - exact).square().mean() / exact.square().mean() if found.tokens else 0
        kept += found.tokens
        assert apart <= error
    assert kept > 8192


def test_a_disk_tier_keeps_blocks_evicted_from_memory(make) -> None:
    cache = make(tiers={"disk": "8MiB"})
    for number in range(20):
        cache.store(range(100 * number, 100 * number + BLOCK), kv_of(BLOCK, number))
        cache.engine(LAYOUT).settle()
    assert all(torch.equal(cache.fetch(range(100 * n, 100 * n + BLOCK)).kv, kv_of(BLOCK, n)) for n in range(20))


def test_new_pairs_get_other_serials_than_pairs_loaded_from_a_checkpoint(make, tmp_path) -> None:
    saved, cache = make(), make()
    saved.put(0, *pair(1)), saved.put(5, *pair(2))
    cache.put(0, *pair(3)), cache.put(7, *pair(4))
    CachePersistence(tmp_path).save_cache(saved, "pairs")
    CachePersistence(tmp_path).load_cache(cache, "pairs")
    for position, seed in ((0, 1), (5, 2), (7, 4)):
        assert torch.equal(cache.get(position)[0], pair(seed)[0])


def test_a_profile_has_every_stage(make) -> None:
    clock = ManualClock()
    cache = make(enable_profiling=True, clock=clock)
    cache.store(range(16), kv_of(16))
    cache.fetch(range(16))
    calls = {each.stage: each.calls for each in cache.profile.stages()}
    assert list(calls) == ["hash", "look-up", "copy", "decode", "store"]
    assert calls["hash"] == 2
    assert calls["look-up"] == 2
    assert (calls["copy"], calls["decode"], calls["store"]) == (1, 0, 1)
    assert [line.split()[0] for line in cache.profile_table().splitlines()] == ["stage", *calls]
    timed = cache.profile.timed("hash", lambda: clock.advance(0.5))
    timed()
    assert cache.profile.stages()[0].longest_s == 0.5


def test_there_is_no_profile_unless_it_is_enabled(make) -> None:
    cache = make()
    cache.store(range(8), kv_of(8))
    client = cache.client()
    assert not hasattr(client._names.keys, "__wrapped__")
    assert "find" not in vars(client._source)
    assert "write" not in vars(client._writer)
    with pytest.raises(TieredKVError, match="enable_profiling is off"):
        cache.profile_table()
