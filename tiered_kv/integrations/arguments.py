"""Checks whether a `generate` request can use the cache: its KV must depend on the prompt's token ids alone."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, GenerationMixin

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import as_token_ids


class Rule(NamedTuple):
    """A rule for one setting of `generate`: the values with which the cache can be used.

    allows: returns whether a value is allowed. why: the reason in the error text if a value is not allowed.
    """

    allows: Callable[[Any], bool]
    why: str


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, int | float) and value == 0)


def _at_most_one(value: Any) -> bool:
    return value is None or value <= 1


_ONE = Rule(_at_most_one, "only one sequence at a time can be served from the cache")
_PLAIN = Rule(_is_off, "only greedy decoding and sampling can be served from the cache")
_PREFIX = Rule(_is_off, "with a reused prefix its result would not include the prefix's tokens")
_RULES = {
    "num_beams": _ONE,
    "num_return_sequences": _ONE,
    "num_beam_groups": _ONE,
    "constraints": _PLAIN,
    "force_words_ids": _PLAIN,
    "penalty_alpha": _PLAIN,
    "dola_layers": _PLAIN,
    "custom_generate": _PLAIN,
    "assistant_model": Rule(_is_off, "assisted decoding is not supported"),
    "assistant_early_exit": Rule(_is_off, "assisted decoding is not supported"),
    "prompt_lookup_num_tokens": Rule(_is_off, "assisted decoding is not supported"),
    "use_mtp": Rule(_is_off, "assisted decoding is not supported"),
    "is_assistant": Rule(_is_off, "assisted decoding is not supported"),
    "token_healing": Rule(_is_off, "token healing changes the prompt's tokens"),
    "output_attentions": _PREFIX,
    "output_hidden_states": _PREFIX,
    "use_cache": Rule(lambda value: value is None or bool(value), "without a KV cache nothing can be reused"),
    "cache_implementation": Rule(
        lambda value: value in (None, "hybrid"), "tiered_kv fills the cache itself, and it is always a dynamic one"
    ),
}
_REPEATS = ("num_beams", "num_return_sequences")
_NAMED = frozenset(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
_SETTINGS = frozenset(vars(GenerationConfig()))
_BESIDE = frozenset({"attention_mask", "tokenizer"})


def check_request(model: Any, input_ids: Any, arguments: Mapping[str, Any]) -> torch.Tensor:
    """Check that a request of one prompt can use the cache. Returns the prompt as token ids (1, n).

    Raises (kind `model`, with the name of the argument) if the cache cannot be used, and (kind `tokens`) for an empty prompt.
    """
    _check_model(model)
    prompt = _one_prompt(model, input_ids)
    _check_arguments(model, arguments, _RULES)
    _check_padding(model, prompt, arguments)
    return prompt


class Batch(NamedTuple):
    """Several prompts as rows of `input_ids`.

    pads: for each row, the number of padding columns on its left. copies: how often generate repeats each row.
    """

    input_ids: torch.Tensor
    pads: list[int]
    copies: int


def check_batch(model: Any, input_ids: Any, arguments: Mapping[str, Any]) -> Batch:
    """Check a request that may have several prompts, padding on the left, beams or several answers. Returns its prompts.

    Raises (kind `model`, with the name of the argument) if the cache cannot be used.
    """
    _check_model(model)
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
        got = f"{tuple(input_ids.shape)} {input_ids.dtype}" if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise _refusal("input_ids", f"it must be a non-empty tensor (prompts, tokens) of whole numbers, got {got}")
    _check_arguments(model, arguments, {name: rule for name, rule in _RULES.items() if name not in _REPEATS})
    copies = max(int(effective(model, arguments, name) or 1) for name in _REPEATS)
    if arguments.get("attention_mask") is None:
        _check_padding(model, input_ids, arguments)
        return Batch(input_ids, [0] * len(input_ids), copies)
    return Batch(input_ids, left_pads(input_ids, arguments["attention_mask"]), copies)


def left_pads(input_ids: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """Returns the number of padding columns on the left of each prompt. Raises (kind `model`) if the mask has zeros elsewhere."""
    if tuple(mask.shape) == tuple(input_ids.shape) and bool(((mask == 0) | (mask == 1)).all()):
        pads = (mask == 0).sum(1)
        columns = torch.arange(mask.shape[1], device=mask.device)
        if bool((mask[:, -1] == 1).all()) and bool(((columns >= pads[:, None]) == (mask == 1)).all()):
            return pads.tolist()
    raise _refusal("attention_mask", "it must be 0 for padding on the left of a prompt and 1 for its tokens")


def _check_model(model: Any) -> None:
    if model.training:
        raise _refusal("model", "it is in training mode, where dropout makes KV random; call model.eval()")
    if torch.is_autocast_enabled(model.device.type):
        raise _refusal(
            "autocast", "KV computed under torch.autocast is not that of the model's dtype; load the model in the dtype that you want"
        )


def _check_arguments(model: Any, arguments: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    for name, value in arguments.items():
        if value is not None and name not in _SETTINGS and name not in _NAMED and name not in _BESIDE:
            raise _refusal(name, "the KV may depend on this argument, but must depend on token ids alone")
    for name, rule in rules.items():
        value = effective(model, arguments, name)
        if not rule.allows(value):
            raise _refusal(name, f"{rule.why}, got {value if isinstance(value, int | float | str) else type(value).__name__!r}")


def effective(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """Returns the value that `generate` uses for a setting: the argument, else the given generation config's, else the model's."""
    if name in arguments:
        return arguments[name]
    for config in (arguments.get("generation_config"), model.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def _refusal(name: str, why: str) -> TieredKVError:
    return TieredKVError(Kind.MODEL, f"generate: {name} cannot be served from the cache: {why}", argument=name)


def _one_prompt(model: Any, input_ids: Any) -> torch.Tensor:
    if not isinstance(input_ids, torch.Tensor):
        input_ids = torch.from_numpy(as_token_ids(input_ids).astype("int64")).to(model.device)
    if input_ids.ndim == 1:
        input_ids = input_ids[None]
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise _refusal("input_ids", f"it must be one prompt of shape (1, n), got {tuple(input_ids.shape)}; call generate for each prompt")
    if not input_ids.shape[1]:
        raise TieredKVError(Kind.TOKENS, "generate: input_ids must have at least one token, got none")
    return input_ids


def _check_padding(model: Any, prompt: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    mask = arguments.get("attention_mask")
    if mask is not None:
        if tuple(mask.shape) != tuple(prompt.shape) or not bool((mask == 1).all()):
            raise _refusal("attention_mask", "it must be 1 for every token of the prompt; remove the padding")
        return
    pad, eos = effective(model, arguments, "pad_token_id"), effective(model, arguments, "eos_token_id")
    ends = torch.as_tensor([] if eos is None else eos).flatten().tolist()
    if pad is not None and int(pad) not in ends and bool((prompt == int(pad)).any()):
        raise _refusal(
            "input_ids",
            f"it contains pad_token_id {int(pad)}, which generate treats as padding; if it is a token, pass an attention_mask of ones",
        )
