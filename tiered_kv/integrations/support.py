"""Checks whether a transformers model can use the cache, from its config and a run of a few tokens.

KV of a prefix can be reused only if it depends on the tokens of that prefix and on nothing else, and if every layer
stores keys and values as (batch, KV heads, tokens, head dim) of one size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

PROBE_TOKENS = 8
PROBE_PREFIX_TOKENS = 5
PROBE_STRIDE = 7919
"""The difference between consecutive token ids of the test run, modulo the vocabulary size. The ids are equal in every process."""
# The largest difference between two ways to compute the same KV, relative to its norm. A wrong position changes keys by 0.3 or more.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2}
_TOLERANCE_ELSE = 0.2


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's cache, as measured in a run: sizes, dtype, and the device of each layer."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]

    def layout(self, block_tokens: int = 64) -> KVLayout:
        """Returns the layout of this model's blocks."""
        return KVLayout(self.layers, self.kv_heads, self.head_dim, str(self.dtype), block_tokens)


def layout_of(model: Any, block_tokens: int = 64) -> KVLayout:
    """Returns the layout of a model's KV blocks, as measured by `check_supported`. Same cost and errors."""
    return check_supported(model).layout(block_tokens)


def check_supported(model: Any, *, generates: bool = True) -> CacheShape:
    """Returns the shape of the model's cache. Raises `TieredKVError` (kind `model`) with the reason if its KV cannot be reused.

    `generates=False`: also accept a decoder without a language head, such as one from `AutoModel`, and run its forward.
    Cost: three runs of the model on at most eight tokens. Draws no random numbers, and does not change the model's state.
    """
    return examine(model, generates=generates)[0]


def examine(model: Any, *, generates: bool = True) -> tuple[CacheShape, DynamicCache]:
    """Do the same as `check_supported`, at the same cost. Returns the shape of the cache, and the KV of the test run's eight tokens."""
    for check in _CHECKS:
        reason = check(model) if generates or check is not _cannot_generate else None
        if reason:
            raise _refusal(model, reason)
    with torch.random.fork_rng(_cuda_devices(model)):
        return _probe(model, _one_step if model.can_generate() else _one_forward)


def _cuda_devices(model: Any) -> list[torch.device]:
    return list({each.device for each in model.parameters() if each.device.type == "cuda"})


def _refusal(model: Any, reason: str) -> TieredKVError:
    name = type(model).__name__
    return TieredKVError(Kind.MODEL, f"{name} cannot be served from the cache: {reason}", model=name, reason=reason)


def _is_other(model: Any) -> str | None:
    if hasattr(model, "_orig_mod"):
        return "it is the result of torch.compile; attach the model itself, and compile it afterwards"
    if not hasattr(model, "config") or not hasattr(model, "can_generate"):
        return "it is not a transformers model"
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model, whose KV depends on the encoder's input"
    return None


def _cannot_generate(model: Any) -> str | None:
    if not model.can_generate():
        return "it does not generate text (an encoder, or a model without a language head); load it with AutoModelForCausalLM"
    return None


def _reads_more_than_tokens(model: Any) -> str | None:
    if model.config.get_text_config(decoder=True) is not model.config:
        return "it takes images, sound or other input besides tokens, and its KV depends on them"
    return None


def _runs_otherwise(model: Any) -> str | None:
    if model.training:
        return "it is in training mode, where dropout makes KV random; call model.eval()"
    if torch.is_autocast_enabled(model.device.type):
        return "KV computed under torch.autocast is not that of the model's dtype; load the model in the dtype that you want"
    return None


def _keeps_state(model: Any) -> str | None:
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state (linear attention, Mamba, hybrid), which is not the KV of a prefix"
    return None


def _has_other_layers(model: Any) -> str | None:
    """Check the kinds of cache layers that transformers selects for this config.

    Returns why the model is unsupported, or None if supported.
    """
    try:
        layers = DynamicCache(config=model.config).layers
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        return f"transformers cannot determine its cache layers from its config ({type(error).__name__}: {error})"
    for number, layer in enumerate(layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            return f"layer {number} attends to a sliding window or chunk of {layer.sliding_window} tokens and forgets older KV"
        if type(layer) is not DynamicLayer:
            return f"layer {number} has a {type(layer).__name__}, not full attention with KV of its own"
    if getattr(model.config, "num_kv_shared_layers", 0):
        return f"its last {model.config.num_kv_shared_layers} layers share the KV of other layers"
    return None


def _rope_depends_on_length(model: Any) -> str | None:
    for rope_type in _rope_types(model):
        if "dynamic" in rope_type or rope_type in ("longrope", "su"):
            return f"its rope type {rope_type!r} rotates keys by the length of the whole input, so KV of a prefix is not reusable"
    if getattr(model.config, "use_dynamic_ntk", False):
        return "its rope (use_dynamic_ntk) rotates keys by the length of the whole input, so KV of a prefix is not reusable"
    return None


def _rope_types(model: Any) -> Iterator[str]:
    """Yields every rope type in the config or in a module, including those for each kind of layer."""
    found = [getattr(model.config, "rope_parameters", None), getattr(model.config, "rope_scaling", None)]
    found += [getattr(module, "rope_type", None) for module in model.modules()]
    while found:
        value = found.pop()
        if isinstance(value, dict):
            found += value.values()
        elif isinstance(value, str):
            yield value


_PROMPT_LEARNING = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


def _adapter_sees_other_tokens(model: Any) -> str | None:
    adapters = getattr(model, "peft_config", None)
    for name, adapter in adapters.items() if isinstance(adapters, dict) else ():
        kind = str(getattr(adapter, "peft_type", "")).rpartition(".")[2].upper()
        if getattr(adapter, "is_prompt_learning", False) or kind in _PROMPT_LEARNING:
            return f"the adapter {name!r} ({kind or 'prompt learning'}) puts trained vectors before the prompt, which have no token ids"
        if kind == "XLORA" or getattr(adapter, "alora_invocation_tokens", None):
            return f"with the adapter {name!r}, KV depends on tokens that come later"
    return None


_CHECKS: tuple[Callable[[Any], str | None], ...] = (
    _is_other,
    _cannot_generate,
    _reads_more_than_tokens,
    _runs_otherwise,
    _keeps_state,
    _has_other_layers,
    _rope_depends_on_length,
    _adapter_sees_other_tokens,
)


Step = Callable[[Any, torch.Tensor, DynamicCache], tuple[torch.Tensor, DynamicCache]]


def _probe(model: Any, step: Step) -> tuple[CacheShape, DynamicCache]:
    """Run eight tokens at once, and as five plus three, and compare the caches. Returns the shape, and the cache of the eight tokens.

    Raises (kind `model`) if the run fails or the caches differ.
    """
    ids = (1 + PROBE_STRIDE * torch.arange(PROBE_TOKENS, device=model.device))[None] % model.config.vocab_size
    try:
        whole_logits, whole = step(model, ids, DynamicCache(config=model.config))
        _, prefix = step(model, ids[:, :PROBE_PREFIX_TOKENS], DynamicCache(config=model.config))
        shape = _shape_of(model, whole, PROBE_TOKENS)
        _shape_of(model, prefix, PROBE_PREFIX_TOKENS)
        parts_logits, parts = step(model, ids, prefix)
        _shape_of(model, parts, PROBE_TOKENS)
    except TieredKVError:
        raise
    except Exception as error:  # boundary: any model's code may run here, and any error means that the model cannot use the cache
        raise _refusal(model, f"a run of a few tokens failed ({type(error).__name__}: {error})") from error
    tolerance = _TOLERANCE.get(shape.dtype, _TOLERANCE_ELSE)
    for number, (a, b) in enumerate(zip(whole.layers, parts.layers, strict=True)):
        _check_close(model, a.keys, b.keys, tolerance, f"the keys of layer {number}")
        _check_close(model, a.values, b.values, tolerance, f"the values of layer {number}")
    _check_close(model, whole_logits, parts_logits, tolerance, "the logits")
    return shape, whole


def _one_step(model: Any, ids: torch.Tensor, cache: DynamicCache) -> tuple[torch.Tensor, DynamicCache]:
    """Generate one greedy token with `generate`, as requests do. Returns the token's logits, and the cache."""
    settings = GenerationConfig(
        max_new_tokens=1, do_sample=False, num_beams=1, use_cache=True, output_logits=True, return_dict_in_generate=True,
        temperature=1.0, top_p=1.0, top_k=50, pad_token_id=0,
    )  # fmt: skip
    output = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, generation_config=settings)
    return output.logits[0], output.past_key_values


def _one_forward(model: Any, ids: torch.Tensor, cache: DynamicCache) -> tuple[torch.Tensor, DynamicCache]:
    """Run the forward of a model without a language head. Returns the last token's hidden state, and the cache."""
    with torch.no_grad():
        output = model(ids[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True)
    return output.last_hidden_state[:, -1], output.past_key_values


def _shape_of(model: Any, cache: Any, tokens: int) -> CacheShape:
    """Returns the shape of a cache of `tokens` tokens. Raises (kind `model`) unless all layers have the same shape and dtype."""
    layers = getattr(cache, "layers", None)
    if not layers or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
        raise _refusal(model, f"after a run, each layer of its cache must be full attention with KV of its own, got {cache!r}")
    first = layers[0].keys
    if first.ndim != 4 or first.shape[0] != 1 or first.shape[2] != tokens:
        raise _refusal(model, f"its keys must have the shape (1, KV heads, {tokens} tokens, head dim), got {tuple(first.shape)}")
    for number, layer in enumerate(layers):
        for name, part in (("keys", layer.keys), ("values", layer.values)):
            if part.shape != first.shape or part.dtype != first.dtype:
                raise _refusal(
                    model,
                    f"keys and values of all layers must have one shape and dtype, got {tuple(part.shape)} {part.dtype} for the {name} of"
                    f" layer {number}, and {tuple(first.shape)} {first.dtype} for the keys of layer 0"
                    " (multi-head latent attention is not supported)",
                )
    return CacheShape(len(layers), first.shape[1], first.shape[3], first.dtype, tuple(layer.keys.device for layer in layers))


def _check_close(model: Any, whole: torch.Tensor, parts: torch.Tensor, tolerance: float, what: str) -> None:
    apart = float((whole.float() - parts.float()).norm() / whole.float().norm().clamp_min(1e-30))
    if not apart <= tolerance:
        raise _refusal(
            model,
            f"{what} of {PROBE_TOKENS} tokens must be equal when they are computed in two parts, but differ by {apart:.2g} (relative;"
            f" at most {tolerance:g} is allowed), so KV depends on more than the tokens before it",
        )
