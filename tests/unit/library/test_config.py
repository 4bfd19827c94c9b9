"""Settings of a library cache: which values are rejected, and which settings of the node they become."""

import subprocess
import sys

import pytest

import tiered_kv
from tiered_kv import CacheMode, CacheStrategy, KVCacheConfig
from tiered_kv.errors import Kind, TieredKVError

BAD = {
    "max_tokens": [0, -1, 15, 1.5, True, "4096", None],
    "cache_strategy": ["paged", None, 3],
    "cache_mode": ["evaluate", None],
    "quantization_bits": [3, 16, "8", 8.0, True],
    "compression_ratio": [0, 1.01, -0.3, "0.3", True, float("nan")],
    "compression_method": ["zip", None, 1],
    "block_tokens": [0, -16, 2.0],
    "use_quantization": [1, "yes"],
    "enable_profiling": [None],
    "num_layers": [0, "12"],
    "num_heads": [-1],
    "head_dim": [0.5],
    "seed": [-1],
    "tiers": ["disk", {"host": "1GiB"}, {"policy": "lru"}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_an_error_names_the_field_and_its_allowed_values(name: str, value: object) -> None:
    with pytest.raises(TieredKVError, match=f"{name} must be") as caught:
        KVCacheConfig(**{name: value})
    assert caught.value.kind is Kind.CONFIG
    assert caught.value.context["setting"] == name


def test_errors_list_allowed_values_and_suggest_near_names() -> None:
    for name, words in (("cache_strategy", ("lru", "adaptive", "s3fifo")), ("cache_mode", ("training", "inference", "bulk"))):
        with pytest.raises(TieredKVError) as caught:
            KVCacheConfig(**{name: "best"})
        assert all(word in str(caught.value) for word in words)
    with pytest.raises(TieredKVError, match="did you mean 'disk'"):
        KVCacheConfig(tiers={"dist": "1GiB"})
    with pytest.raises(TieredKVError, match="did you mean 'max_tokens'"):
        KVCacheConfig().with_(max_token=5)
    with pytest.raises(TieredKVError, match=r"dtype must be one of .*, got 'int8'"):
        KVCacheConfig(dtype="int8")


def test_members_and_their_values_are_the_same() -> None:
    assert KVCacheConfig(cache_strategy="lru", cache_mode="training") == KVCacheConfig(
        cache_strategy=CacheStrategy.LRU, cache_mode=CacheMode.TRAINING
    )
    assert {strategy.value for strategy in CacheStrategy} == set(tiered_kv.config.POLICIES)


@pytest.mark.parametrize(
    ("settings", "codec"),
    [
        ({}, None),
        ({"use_quantization": True}, "int8"),
        ({"use_quantization": True, "quantization_bits": 4}, "int4"),
        ({"use_compression": True, "compression_ratio": 0.25}, "lowrank:0.25"),
        ({"use_compression": True, "compression_method": "sparse"}, "sparse:0.3"),
        ({"use_compression": True, "use_quantization": True}, "lowrank:0.3"),
    ],
)
def test_compression_settings_become_the_nodes_codec(settings: dict, codec: str | None) -> None:
    config = KVCacheConfig(**settings)
    assert config.codec == codec
    assert config.engine_config(1 << 20).codec == (codec and f"host={codec}")


def test_a_complete_shape_gives_a_layout() -> None:
    config = KVCacheConfig(num_layers=2, num_heads=3, head_dim=8, dtype="torch.bfloat16")
    assert config.layout == tiered_kv.KVLayout(2, 3, 8, "bfloat16", 16)
    assert config.with_(dtype=None).layout is None


def test_importing_the_settings_does_not_import_torch() -> None:
    names = "KVCacheConfig, CacheStrategy, CacheMode, create_eviction_strategy"
    code = f"import sys; from tiered_kv import {names}; KVCacheConfig(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
