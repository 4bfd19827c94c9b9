"""The namespace and layout of an engine: everything that must be equal for its KV to be reusable."""

import platform
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tiered_kv.checkpoint_files import weights_digest
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.identity import NOT_IDENTITY, plain, text_digest
from tiered_kv.integrations.vllm.pages import block_axis
from tiered_kv.integrations.vllm.settings import log
from tiered_kv.integrations.vllm.versions import hash_seed, version
from tiered_kv.keys import Namespace
from tiered_kv.layout import OpaqueLayout

_WITHOUT_FILES = ("dummy",)
"""Load formats without files. Such weights are usually replaced after the start, so no other process can identify them."""


def layout_of(config: Any, arrays: Sequence[torch.Tensor], kv_caches: Mapping[str, Any], blocks: int, block_tokens: int) -> OpaqueLayout:
    """Returns the layout of a block of this worker: the pages of all layers, in the engine's own order of bytes.

    `arrays`: the pages as `pages_in` returns them. `blocks`: the number of blocks in the KV cache; the layout does not depend on it.
    """
    tensors = {name: cache if isinstance(cache, list | tuple) else [cache] for name, cache in kv_caches.items()}
    forms = text_digest([[name, [_form(name, each, blocks) for each in held]] for name, held in tensors.items()])
    one = next(iter(tensors.values()))[0]
    description = (
        f"vllm {version()} {_backends(config, kv_caches)} {str(one.dtype).removeprefix('torch.')} on {_hardware(one.device)},"
        f" {len(arrays)} pages a block, form {forms[:32]}"
    )
    return OpaqueLayout(sum(array.shape[1] for array in arrays), block_tokens, description, one.element_size())


def _form(name: str, cache: torch.Tensor, blocks: int) -> list[Any]:
    """Returns the shape of one block of a cache, and the order of its axes in memory."""
    axis = block_axis(name, cache, blocks)
    order = sorted(range(cache.ndim), key=lambda each: -cache.stride(each))
    return [[size for each, size in enumerate(cache.shape) if each != axis], order, str(cache.dtype)]


def _backends(config: Any, kv_caches: Mapping[str, Any]) -> str:
    """Returns the names of the attention backends of the layers."""
    layers = config.compilation_config.static_forward_context
    names = set()
    for name in kv_caches:
        backend = getattr(layers.get(name), "attn_backend", None)
        names.add(backend.get_name() if backend is not None else "unknown")
    return "+".join(sorted(names))


def _hardware(device: torch.device) -> str:
    """Returns a description of the hardware, because the order of bytes in a page may depend on it.

    On CPUs, keys are packed for the instruction set.
    """
    if device.type != "cpu":
        return f"{device.type} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
    flags = [name for name in ("_is_amx_tile_supported", "_is_avx512_supported", "_is_avx2_supported") if _has(name)]
    return f"cpu {platform.machine()} {' '.join(flag.split('_')[2] for flag in flags)}".strip()


def _has(name: str) -> bool:
    probe = getattr(torch.cpu, name, None)
    return bool(probe is not None and probe())


def namespace_of(config: Any, *, tenant: str, rank: int, world: int) -> Namespace:
    """Returns the namespace of one rank.

    The first process reads the files of the weights. Later processes only compare the files' sizes and times.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    facts = {
        "hf_config": plain(model.hf_config, leave_out=NOT_IDENTITY),  # with hf_overrides applied
        "max_model_len": model.max_model_len if "longrope" in str(model.hf_config.to_dict()) else None,  # it chooses longrope's factors
        "quantization": [str(model.quantization), str(plain(getattr(model, "quantization_config", None)))],
        "model_impl": str(getattr(model, "model_impl", None)),
        "mm_processor": plain(getattr(getattr(model, "multimodal_config", None), "mm_processor_kwargs", None) or {}),
        "load_format": str(config.load_config.load_format),
        "model_loader_extra_config": plain(getattr(config.load_config, "model_loader_extra_config", None) or {}),
        "parallel": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.enable_expert_parallel],
        "hash": [str(cache.prefix_caching_hash_algo), hash_seed(config)],
        "enforce": [getattr(model, name, None) for name in ("runner_type", "convert_type", "disable_sliding_window")],
    }
    scales = {"cache_dtype": str(cache.cache_dtype), "calculate": bool(getattr(cache, "calculate_kv_scales", False))}
    scales["skipped"] = list(getattr(cache, "kv_cache_dtype_skip_layers", None) or [])
    return Namespace(
        weights=weights_of(config),
        tenant=tenant,
        architecture=text_digest(facts),
        rope=text_digest(plain(getattr(model.hf_text_config, "rope_parameters", None) or {})),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_scales=text_digest(scales),
        rank=rank,
        world=world,
    )


def weights_of(config: Any) -> str:
    """Returns a text that identifies the content of the weights. For load formats without files, the text is random.

    Raises (kind `model`) if the files of the weights cannot be found.
    """
    model, load = config.model_config, config.load_config
    if str(load.load_format) in _WITHOUT_FILES:
        return f"{load.load_format} weights {secrets.token_hex(16)}"
    named = model.model_weights or model.model
    found = local_folder(named, model.revision, load.download_dir)
    if found is None:
        raise TieredKVError(
            Kind.MODEL,
            f"tiered_kv needs the files of the weights to know which KV may be shared, and found none of {named!r} on this machine;"
            " use a local folder, or a model in the Hugging Face cache",
        )
    return weights_digest(found, progress=lambda line: log.info("%s", line))


def local_folder(name: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Returns a model's local folder or file: the path itself, or the snapshot in the Hugging Face cache. None if neither exists."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=download_dir, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError):
        return None
