"""What the connector refuses, and what makes two engines share or not: settings, versions, identity."""

from types import SimpleNamespace
from typing import Any

import pytest

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.vllm import identity, versions
from tiered_kv.integrations.vllm.settings import Settings, check_engine

T = 16
LLAMA3 = {"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"clutser": "x"}, "did you mean 'cluster'"),
        ({"zzz": 1}, "known are: cluster"),
        ({"hold_s": "2"}, "hold_s must be a number"),
        ({"hold_s": -1}, "hold_s must be"),
        ({"epoch": True}, "epoch must be a whole number"),
        ({"epoch": 1.5}, "epoch must be"),
        ({"allow_mm_uuids": 1}, "allow_mm_uuids must be true or false"),
        ({"on_reset": "drop"}, "on_reset must be 'new_epoch' or 'keep'"),
        ({"tenant": ""}, "tenant must not be empty"),
    ],
)
def test_wrong_settings_are_named(given, words):
    with pytest.raises(TieredKVError, match=words) as caught:
        Settings.of(given)
    assert caught.value.kind is Kind.CONFIG


def test_whole_numbers_are_numbers():
    assert Settings.of({"hold_s": 3, "cluster": "x"}) == Settings(hold_s=3, cluster="x")


class FullAttentionSpec:
    block_size = T


class MambaSpec:
    block_size = T


def good_engine() -> tuple[Any, Any]:
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy="recompute"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256", calculate_kv_scales=False),
        speculative_config=None,
    )
    return config, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=FullAttentionSpec())])


@pytest.mark.parametrize(
    ("part", "name", "value", "words"),
    [
        ("kv_transfer_config", "kv_load_failure_policy", "fail", 'kv_load_failure_policy must be "recompute"'),
        ("parallel_config", "decode_context_parallel_size", 2, "decode_context_parallel_size must be 1"),
        ("cache_config", "prefix_caching_hash_algo", "xxhash", "PYTHONHASHSEED"),
        ("cache_config", "calculate_kv_scales", True, "calculate_kv_scales must be false"),
        ("", "speculative_config", SimpleNamespace(method="eagle"), "'ngram', got 'eagle'"),
    ],
)
def test_engines_that_would_be_unsafe_are_refused(monkeypatch, part, name, value, words):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    config, caches = good_engine()
    check_engine(config, caches)
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(TieredKVError, match=words):
        check_engine(config, caches)


def test_models_without_prefix_caching_are_refused():
    config, caches = good_engine()
    config.model_config = SimpleNamespace(is_prefix_caching_supported=False)
    with pytest.raises(TieredKVError, match="must support prefix caching"):
        check_engine(config, caches)


@pytest.mark.parametrize(("rope", "differs"), [("longrope", True), ("llama3", False)])
def test_the_length_of_the_context_is_a_part_of_the_identity_where_it_changes_rope(monkeypatch, rope, differs):
    monkeypatch.setattr(identity, "weights_of", lambda config: "weights")
    names = {length: identity.namespace_of(whole_config(rope, length), tenant="t", rank=0, world=1) for length in (4096, 8192)}
    assert (names[4096] != names[8192]) == differs
    assert names[4096] == identity.namespace_of(whole_config(rope, 4096), tenant="t", rank=0, world=1)


@pytest.mark.parametrize("name", ["quantization_config", "model_impl", "dtype"])
def test_settings_that_change_kv_are_a_part_of_the_identity(monkeypatch, name):
    monkeypatch.setattr(identity, "weights_of", lambda config: "weights")
    plain, other = whole_config("default", 4096), whole_config("default", 4096)
    setattr(other.model_config, name, "other")
    assert len({identity.namespace_of(each, tenant="t", rank=0, world=1) for each in (plain, other)}) == 2


def test_weights_without_files_are_shared_with_nobody():
    config = whole_config("default", 4096)
    config.load_config.load_format = "dummy"
    assert identity.weights_of(config) != identity.weights_of(config)


def whole_config(rope: str, length: int) -> Any:
    """What the identity reads of a configuration of vLLM."""
    from transformers import LlamaConfig

    hf_config = LlamaConfig(rope_parameters={"rope_type": rope, "rope_theta": 1e4, "factor": 8.0, **LLAMA3} if rope == "llama3" else None)
    if rope == "longrope":
        hf_config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0]}
    model = {"hf_config": hf_config, "hf_text_config": hf_config, "max_model_len": length, "quantization": None, "dtype": "bfloat16"}
    model |= {"quantization_config": None, "model_impl": "auto", "multimodal_config": None}
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        cache_config=SimpleNamespace(cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, enable_expert_parallel=False),
        load_config=SimpleNamespace(load_format="auto"),
    )


def test_other_kinds_of_kv_cache_are_refused_by_name():
    config, caches = good_engine()
    caches.kv_cache_groups.append(SimpleNamespace(kv_cache_spec=MambaSpec()))
    with pytest.raises(TieredKVError, match="got MambaSpec"):
        check_engine(config, caches)
    caches.kv_cache_groups[1] = caches.kv_cache_groups[0]
    with pytest.raises(TieredKVError, match="one group of KV cache, got 2"):
        check_engine(config, caches)


def test_an_interface_with_other_hooks_is_refused():
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    versions.check_hooks(KVConnectorBase_V1)
    other = type("Other", (KVConnectorBase_V1,), {"reset_cache": None, "get_finished": lambda self, names: None})
    with pytest.raises(TieredKVError, match=r"reset_cache is missing.*get_finished\(names\)|get_finished\(names\).*reset_cache is missing"):
        versions.check_hooks(other)


def test_the_seed_of_hashes_is_a_part_of_the_identity(monkeypatch):
    config = SimpleNamespace(cache_config=SimpleNamespace(prefix_caching_hash_algo="sha256"))
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    assert versions.hash_seed(config) == "5"
    monkeypatch.setenv("PYTHONHASHSEED", "6")
    assert versions.hash_seed(config) == "6"
