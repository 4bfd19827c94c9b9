"""The identity of a model, read without running it: weights, settings, adapters, buffers, classes, attributes, and foreign code.

Digests of content are equal in every process. The content of code cannot be digested. So forward hooks and replaced methods of modules
are listed (`ModelWalk.foreign`), and a model with any of them never shares its KV.
"""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import xxhash

from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    import torch

DIGEST_BYTES = 32
DEPTH_MAX = 6
SUMS_MAX = 1 << 16


class Sums:
    """A cache of checksums ("sums") of tensors' content. A sum is valid until its tensor is written to or replaced.

    Inference tensors are read each time, because torch does not count writes to them.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], bytes] = {}

    def of(self, tensor: "torch.Tensor") -> bytes:
        """Returns the sum of a tensor's bytes. Reads the tensor only if the sum is not cached."""
        mark = written_mark(tensor)
        if mark is None:
            return _tensor_sum(tensor)
        if mark not in self._known:
            if len(self._known) >= SUMS_MAX:
                self._known.clear()
            self._known[mark] = _tensor_sum(tensor)
        return self._known[mark]


def written_mark(tensor: "torch.Tensor") -> tuple[object, ...] | None:
    """Returns a value that changes when a tensor is written to or gets other memory. None if torch does not count its writes.

    The value has weak references to the tensor and its memory, because a freed object's address may be reused.
    """
    from torch.utils.weak import WeakIdRef

    if tensor.is_inference():
        return None
    memory = WeakIdRef(tensor.untyped_storage())
    return WeakIdRef(tensor), memory, tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.stride(), tensor.dtype


def tensors_digest(state: "Mapping[str, torch.Tensor]", sums: Sums | None = None) -> str:
    """Returns a hex digest of the names, shapes, dtypes and all bytes of the tensors, sorted by name.

    Tensors that share their storage (tied weights) are read once. Tensors whose sums `sums` has cached are not read. Raises (kind
    `model`) for weights without content, and for values whose content cannot be read.
    """
    read = _tensor_sum if sums is None else sums.of
    tensors: dict[str, torch.Tensor] = {}
    texts: dict[str, str] = {}
    for name, value in state.items():
        _flatten(str(name), value, tensors, texts)
    identities = {
        name: (str(value.device), value.data_ptr(), tuple(value.shape), value.stride(), str(value.dtype)) for name, value in tensors.items()
    }
    unique = {identity: tensors[name] for name, identity in identities.items()}
    with ThreadPoolExecutor() as pool:
        sums_by_identity = dict(zip(unique, pool.map(read, unique.values()), strict=True))
    whole = blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(identities):
        shape, dtype = identities[name][2], identities[name][4]
        whole.update(f"{name} {shape} {dtype}\n".encode())
        whole.update(sums_by_identity[identities[name]])
    if texts:
        whole.update(text_digest(texts).encode())
    return whole.hexdigest()


def _flatten(name: str, value: Any, tensors: "dict[str, torch.Tensor]", texts: dict[str, str]) -> None:
    """Add one entry of a state dict to `tensors` or `texts`. Raises (kind `model`) if it is neither a tensor nor plain data."""
    if hasattr(value, "__tensor_flatten__"):  # tensor subclasses, such as quantized weights, have no storage of their own
        parts, settings = value.__tensor_flatten__()
        texts[name] = f"{type(value).__name__} {text_digest(settings)}"
        for part in parts:
            _flatten(f"{name}.{part}", getattr(value, part), tensors, texts)
    elif hasattr(value, "data_ptr"):
        if value.device.type == "meta":
            raise TieredKVError(
                Kind.MODEL, f"namespace: {name} must have content, but it is on the device 'meta'; load the model's weights first"
            )
        if getattr(value, "is_quantized", False) or str(value.layout) != "torch.strided":
            raise TieredKVError(Kind.MODEL, f"namespace: {name} must be a dense, unquantized tensor, got {value.layout}, {value.dtype}")
        tensors[name] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(f"{name}.{key}", item, tensors, texts)
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            _flatten(f"{name}.{number}", item, tensors, texts)
    elif value is None or isinstance(value, str | bytes | int | float) or type(value).__name__ == "dtype":
        texts[name] = f"{type(value).__name__} {value!r}"
    else:
        raise TieredKVError(Kind.MODEL, f"namespace: the model's state {name} must be a tensor or plain data, got {type(value).__name__}")


def _tensor_sum(tensor: "torch.Tensor") -> bytes:
    hasher = xxhash.xxh3_128()
    for piece in _byte_pieces(tensor):
        hasher.update(piece)
    return hasher.digest()


def _byte_pieces(tensor: "torch.Tensor", piece_bytes: int = 64 << 20) -> Iterator[memoryview]:
    import torch

    flat = tensor.detach().reshape(-1).contiguous()
    if not flat.numel():
        return
    for piece in flat.view(torch.uint8).split(piece_bytes):
        yield memoryview(piece.cpu().numpy())


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns a hex digest of a tokenizer's vocabulary; "" for None."""
    if tokenizer is None:
        return ""
    if not hasattr(tokenizer, "get_vocab"):
        raise TieredKVError(Kind.CONFIG, f"tokenizer: must have a method get_vocab, got {type(tokenizer).__name__}", setting="tokenizer")
    return text_digest(sorted(tokenizer.get_vocab().items()))


def text_digest(facts: Any) -> str:
    """Returns a hex digest of settings. Equal settings have equal digests in every process."""
    return blake2b(json.dumps(plain(facts), sort_keys=True).encode(), digest_size=DIGEST_BYTES).hexdigest()


def plain(value: Any, leave_out: tuple[str, ...] = ()) -> Any:
    """Returns settings as JSON data that is the same in every process: sets sorted, keys as text, without the keys in `leave_out`."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(item, leave_out) for key, item in value.items() if key not in leave_out}
    if isinstance(value, set | frozenset):  # a set's order changes from process to process
        return sorted(str(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item, leave_out) for item in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


# Settings of a model's origin, of how it is run and of its output. They do not change its KV. `architectures` exists only in saved models,
# so the class's name is used instead.
NOT_IDENTITY = (
    *("_name_or_path", "name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_attn_implementation"),
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id"),
    *("id2label", "label2id", "problem_type"),
)
_NOT_ADAPTER_IDENTITY = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
_ADAPTER_STATE = ("active_adapter", "active_adapters", "merged_adapters", "merged", "disable_adapters", "scaling")


def adapter_digest(model: Any) -> str:
    """Returns a hex digest of the active adapters' names, scaling and settings, or "" without adapters.

    The adapters' weights are not included here, because they are in the state dict.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return ""
    state = {name: facts for name, module in model.named_modules() if (facts := _adapter_state(module))}
    return text_digest([plain(adapters, leave_out=_NOT_ADAPTER_IDENTITY), state])


def _adapter_state(module: Any) -> dict[str, Any]:
    """Returns a module's attributes of an adapter. Leaves out methods and numbers of the same names, which do not belong to an adapter."""
    found = {fact: getattr(module, fact, None) for fact in _ADAPTER_STATE}
    return {fact: value for fact, value in found.items() if isinstance(value, str | bool | list | tuple | dict)}


# Attributes that torch keeps in every module for itself. Tensors, submodules and forward hooks are examined separately.
TORCHS_OWN = frozenset(
    {
        *("training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks"),
        *("_is_full_backward_hook", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
        *("_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"),
        *("_load_state_dict_post_hooks", "_modules", "_compiled_call_impl", "call_super_init", "dump_patches"),
    }
)
# Attributes about loading, training or distributing a model, and those that are examined separately.
BOOKKEEPING = frozenset(
    {
        *("config", "generation_config", "peft_config", "name_or_path", "_is_hf_initialized", "warnings_issued", "hf_device_map"),
        *("gradient_checkpointing", "_gradient_checkpointing_func", "loss_type", "_loss_function", "loss_function", "kernel_config"),
        *("_fsdp_plan", "_tp_plan", "_ep_plan", "_pp_plan", "_tp_size", "_device_mesh", "_no_split_modules", "_skip_keys_device_placement"),
        *("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_save", "_keys_to_ignore_on_load_missing"),
        *("_keys_to_ignore_on_load_unexpected", "all_tied_weights_keys", "_tied_weights_keys", "_weight_conversions", "_hf_hook"),
        *("_old_forward", "_hf_peft_config_loaded", "_auto_class", "_caches", "hf_quantizer"),
        *("_use_kernels", "_output_capturing_hooks_installed", "_use_cache", "_is_stateful", "_supports_sdpa", "_supports_flash_attn"),
        *("is_loaded_in_8bit", "is_loaded_in_4bit"),
    }
)
_SIZES = frozenset({"in_features", "out_features"})
"""Attributes of torch's linear layers that only repeat the shape of their weights."""
_FRAMEWORKS = ("torch", "transformers", "accelerate", "peft")
_ALIGNING = frozenset({"AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook", "SequentialHook"})


@dataclass
class ModelWalk:
    """The result of a walk over a model's modules.

    `modules`: for each module its class, and its attributes as plain data. `tensors`: tensors that are not in the state dict, by name.
    `foreign`: hooks and replaced methods, each with a text that names its place.
    """

    modules: dict[str, list[Any]] = field(default_factory=dict)
    tensors: "dict[str, torch.Tensor]" = field(default_factory=dict)
    foreign: list[tuple[str, Any]] = field(default_factory=list)


def walk_model(model: Any, ignored: frozenset[tuple[str, str]] = frozenset()) -> ModelWalk:
    """Visit the modules of a model. Returns all that may change its KV besides weights, settings and adapters.

    `ignored`: (module, name) of attributes to skip. Takes about 20 µs per module.
    """
    walk = ModelWalk(foreign=[(f"a hook of all modules ({_named(hook)})", hook) for hook in global_hooks()])
    stored = set(model.state_dict(keep_vars=True)) if hasattr(model, "state_dict") else set()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name not in stored:
            walk.tensors[name] = buffer
    for name, module in model.named_modules():
        where = name or type(module).__name__
        walk.foreign += [(f"a forward hook of {where} ({_named(hook)})", hook) for hook in foreign_hooks(module)]
        walk.foreign += [(f"{where}.{method}, replaced by {_named(code)}", code) for method, code in replaced_methods(module)]
        attributes = {}
        for attribute in watched_attributes(module):
            if (name, attribute) not in ignored and not _is_method(type(module), attribute):
                value = _described(vars(module)[attribute], f"{name}.{attribute}", walk.tensors, DEPTH_MAX)
                if value is not _NOTHING:
                    attributes[attribute] = value
        walk.modules[name] = [class_text(type(module)), attributes]
    return walk


def watched_attributes(module: Any) -> list[str]:
    """Returns the names of those attributes of a module on which the model's KV may depend."""
    from torch import nn

    left_out = _SIZES if type(module) is nn.Linear else frozenset()
    left_out |= TORCHS_OWN | BOOKKEEPING
    return [name for name, value in vars(module).items() if name not in left_out and not is_hook(value)]


_NOTHING = object()


def _described(value: Any, name: str, tensors: "dict[str, torch.Tensor]", depth: int) -> Any:
    """Returns an attribute's value as plain data. Moves tensors in it to `tensors`, and replaces other objects by their class's name."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "data_ptr"):
        tensors[name] = value
        return _NOTHING
    if depth and isinstance(value, Mapping):
        named = {str(key): _described(item, f"{name}.{key}", tensors, depth - 1) for key, item in value.items()}
        return {key: item for key, item in named.items() if item is not _NOTHING}
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if depth and isinstance(value, list | tuple):
        items = [_described(item, f"{name}.{number}", tensors, depth - 1) for number, item in enumerate(value)]
        return [item for item in items if item is not _NOTHING]
    if (type(value).__module__.startswith("torch") and type(value).__name__ == "device") or hasattr(value, "named_modules"):
        return _NOTHING
    if type(value).__name__ in ("dtype", "complex", "bytes") or hasattr(value, "_value_"):  # the last: members of enumerations
        return f"{type(value).__name__} {value!r}" if not hasattr(value, "_value_") else f"{type(value).__name__} {value._value_!r}"
    return _named(value)


def class_text(kind: type) -> str:
    """Returns the name of a class, and that of its forward function, which other code may have replaced for the whole class."""
    return f"{kind.__module__}.{kind.__qualname__} {_named(getattr(kind, 'forward', None))}"


def _named(value: Any) -> str:
    """Returns the module and name of a function or class. For any other value, returns those of its class."""
    value = _plain_function(value)
    if hasattr(value, "__globals__"):
        return f"{value.__globals__.get('__name__')}.{value.__qualname__}"
    if hasattr(value, "__qualname__"):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _plain_function(value: Any) -> Any:
    while isinstance(value, partial) or hasattr(value, "__func__"):
        value = value.func if isinstance(value, partial) else value.__func__
    return value


def is_of_framework(code: Any) -> bool:
    """Returns whether code is defined in torch, transformers, accelerate or peft, and does not wrap code from elsewhere.

    Looks at the module of the code's globals, because `functools.wraps` can change a function's name and `__module__`.
    """
    code = _plain_function(code)
    module = code.__globals__.get("__name__", "") if hasattr(code, "__globals__") else type(code).__module__
    wrapped = getattr(code, "__wrapped__", None)
    return str(module).split(".")[0] in _FRAMEWORKS and (wrapped is None or is_of_framework(wrapped))


def global_hooks() -> list[Any]:
    """Returns the forward hooks that torch calls for every module in this process, without those that the frameworks have set."""
    from torch.nn.modules import module as torchs

    hooks = [*torchs._global_forward_pre_hooks.values(), *torchs._global_forward_hooks.values()]
    return [hook for hook in hooks if not is_of_framework(hook)]


def foreign_hooks(module: Any) -> list[Any]:
    """Returns a module's forward hooks, without those of the frameworks, which do not change the KV."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if not is_of_framework(hook)]


def replaced_methods(module: Any) -> Iterator[tuple[str, Any]]:
    """Yields the name and the new code of each method that was replaced on this module. Leaves out accelerate's wrappers (`to`, `cuda`)."""
    kind = type(module)
    for name, value in vars(module).items():
        if name in TORCHS_OWN or name in BOOKKEEPING or not callable(value) or not _is_method(kind, name):
            continue
        code = below_hook(value)
        if code is None or _is_own(module, name, code):
            continue
        if not (_only_aligns(module, code) if name == "forward" else is_of_framework(code)):
            yield name, code


def _is_method(kind: type, name: str) -> bool:
    return callable(getattr(kind, name, None)) and not isinstance(getattr(kind, name), type)


def is_hook(value: Any) -> bool:
    """Returns whether a value is a hook of this library (`integrations.attached`) in place of a model's method."""
    return hasattr(type(value), "replaced_method")


def below_hook(value: Any) -> Any:
    """Returns what a model had under a method's name before this library's hooks replaced it: a function; None for the class's own method.

    `value`: what the model has there now, which may be such a hook.
    """
    while is_hook(value):
        value = value.replaced_method
    return value


def _is_own(module: Any, name: str, code: Any) -> bool:
    return getattr(code, "__self__", None) is module and getattr(code, "__func__", None) is getattr(type(module), name, None)


def _only_aligns(module: Any, code: Any) -> bool:
    """Returns whether a replaced forward is accelerate's wrapper.

    That wrapper only moves inputs and weights between devices, and calls the class's own forward.
    """
    hook, before = vars(module).get("_hf_hook"), vars(module).get("_old_forward")
    is_accelerates = isinstance(code, partial) and _named(code).startswith("accelerate.hooks.")
    return is_accelerates and _aligns(hook) and before is not None and _is_own(module, "forward", below_hook(before))


def _aligns(hook: Any) -> bool:
    kind = type(hook)
    is_known = kind.__module__ == "accelerate.hooks" and kind.__name__ in _ALIGNING
    return is_known and all(_aligns(each) for each in getattr(hook, "hooks", ()))


def rope_digest(config: dict[str, Any], tensors: "Mapping[str, torch.Tensor]", sums: Sums | None = None) -> str:
    """Returns a hex digest of the rotary settings, and of the tensors outside of the state dict, such as the rotary frequencies."""
    settings = {name: value for name, value in config.items() if "rope" in name or "rotary" in name}
    return text_digest([settings, tensors_digest(tensors, sums)])
