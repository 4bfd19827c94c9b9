"""The settings of the connector, from `kv_connector_extra_config`, and a check that refuses unsafe settings of the engine."""

import difflib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tiered_kv.errors import Kind, TieredKVError

log = logging.getLogger("vllm.tiered_kv")
"""The log of the connector. Its name starts with `vllm.`, because vLLM shows only such logs."""

KINDS = {"FullAttentionSpec", "MLAAttentionSpec", "SinkFullAttentionSpec"}
"""The supported kinds of KV cache in vLLM. A block is final once its tokens are computed, and a request needs all its prefix's blocks."""
_WORDS = {"str": "a text", "float": "a number of at least 0", "int": "a whole number of at least 0", "bool": "true or false"}


@dataclass(frozen=True)
class Settings:
    """`kv_connector_extra_config`. Every field has a default.

    `cluster`: the name given to `tiered-kv up`. `node`: the id of the node to use, for machines with several nodes of one cluster.
    `tenant`: engines of different tenants share nothing. `epoch`: a number, such as that of a training step; engines with different
    epochs share nothing. `on_reset`: the effect of `reset_prefix_cache(reset_connector=True)`: "new_epoch" forgets all blocks so far,
    "keep" keeps them. `load_deadline_ms`: the longest time for a load; blocks not loaded by then are computed (0: the cluster's
    `fetch_deadline_ms`). `store_wait_ms`: the longest wait for room in a step. `ask_nodes_ms`: the longest time that a request waits
    for other machines' nodes to say which blocks they have; 0: they are not asked. `hold_s`: how long a promised block is kept from
    eviction. `allow_mm_uuids`: whether to cache requests with images and other media. Users may give images ids of their own, which
    look like hashes of the content here. Equal ids of different images would then give wrong answers. `recompute_tokens_per_s`: how
    fast the engine computes a prompt; blocks of slow tiers and of other machines are loaded only if that is faster (0: as measured on
    a CPU; on a GPU everything is loaded).
    """

    cluster: str = "default"
    node: str = ""
    tenant: str = "default"
    epoch: int = 0
    on_reset: str = "new_epoch"
    load_deadline_ms: float = 0.0
    store_wait_ms: float = 20.0
    ask_nodes_ms: float = 100.0
    hold_s: float = 2.0
    recompute_tokens_per_s: float = 0.0
    allow_mm_uuids: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "Settings":
        """Returns the settings in a mapping. Raises (kind `config`) for an unknown name or a wrong value, and names it."""
        known = {field.name: field for field in fields(cls)}
        for name, value in given.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
                raise TieredKVError(Kind.CONFIG, f"kv_connector_extra_config: unknown setting {name!r}; {hint}", setting=name)
            kind = type(getattr(cls, name))
            accepted = {float: int | float}.get(kind, kind)
            is_right = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
            if not is_right or (kind in (int, float) and value < 0):
                message = f"kv_connector_extra_config: {name} must be {_WORDS[kind.__name__]}, got {value!r}"
                raise TieredKVError(Kind.CONFIG, message, setting=name)
        settings = cls(**given)
        if settings.on_reset not in ("new_epoch", "keep"):
            raise TieredKVError(
                Kind.CONFIG,
                f"kv_connector_extra_config: on_reset must be 'new_epoch' or 'keep', got {settings.on_reset!r}",
                setting="on_reset",
            )
        if not settings.tenant:
            raise TieredKVError(Kind.CONFIG, "kv_connector_extra_config: tenant must not be empty", setting="tenant")
        return settings


def check_engine(config: Any, kv_cache_config: Any) -> None:
    """Raise (kind `config`) for settings of vLLM under which the connector could give wrong answers or fail requests."""
    transfer, parallel, cache = config.kv_transfer_config, config.parallel_config, config.cache_config
    if transfer.kv_load_failure_policy != "recompute":
        raise _refused(
            "kv_load_failure_policy",
            f'must be "recompute" in --kv-transfer-config, got "{transfer.kv_load_failure_policy}":'
            " with any other policy, a block that cannot be loaded fails the request",
        )
    algorithm = str(getattr(cache, "prefix_caching_hash_algo", "sha256"))
    if "xxhash" in algorithm and os.getenv("PYTHONHASHSEED") is None:
        raise _refused(
            "prefix_caching_hash_algo",
            f"must be sha256 or sha256_cbor, got {algorithm}: its hashes differ in every process, unless PYTHONHASHSEED is set",
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise _refused(name, f"must be 1, got {getattr(parallel, name)}: blocks of a part of the context are not supported")
    if getattr(cache, "calculate_kv_scales", False):
        raise _refused("calculate_kv_scales", "must be false: each engine would compute scales of its own for the same prefix")
    if not getattr(getattr(config, "model_config", None), "is_prefix_caching_supported", True):
        raise _refused("model", "must support prefix caching, which vLLM says of this pooling model that it does not")
    if config.speculative_config is not None and getattr(config.speculative_config, "method", None) != "ngram":
        raise _refused(
            "speculative_config",
            f"must be none or of the method 'ngram', got {getattr(config.speculative_config, 'method', None)!r}:"
            " the KV of draft models is not supported",
        )
    check_groups(kv_cache_config)


def check_groups(kv_cache_config: Any) -> None:
    """Raise (kind `config`) unless all layers are in one group of KV cache, of the supported `KINDS`."""
    groups = kv_cache_config.kv_cache_groups
    kinds = [kind for group in groups for kind in _kinds(group.kv_cache_spec)]
    other = sorted({kind for kind in kinds if kind not in KINDS})
    if other:
        raise _refused("model", f"must have full attention (or MLA) in all layers, got {', '.join(other)}")
    if len(groups) != 1:
        raise _refused("model", f"must have one group of KV cache, got {len(groups)}: {', '.join(sorted(set(kinds)))}")


def _kinds(spec: Any) -> list[str]:
    """Returns the names of the kinds of KV cache in a group of layers."""
    parts = getattr(spec, "kv_cache_specs", None)
    if parts:
        return [kind for part in parts.values() for kind in _kinds(part)]
    return [type(spec).__name__]


def _refused(name: str, why: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"tiered_kv cannot be used with this engine: {name} {why}", setting=name)
