"""Attaches a cache to a model: its own `generate` and `forward` then fetch and store prefixes, with the same arguments and results.

The cache never changes a result. A call that cannot use the cache correctly runs without it, and is counted by the reason. A call
that needs results for every token (all logits, hidden states) fetches no prefix: the model computes all tokens, and their KV is
stored.
"""

import functools
import logging
import threading
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from tiered_kv.blocks import Fetched
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.arguments import Batch, check_batch, check_request
from tiered_kv.integrations.modelstate import State
from tiered_kv.integrations.transformers import CachedModel, GenerateReport
from tiered_kv.keys import as_token_ids

log = logging.getLogger(__name__)

_FORWARD_TAKES = frozenset({"input_ids", "attention_mask", "use_cache", "return_dict", "logits_to_keep", "labels"}) | {
    "output_hidden_states",
    "output_attentions",
}
_NEEDS_ALL_TOKENS = ("labels", "output_hidden_states", "output_attentions")


class Attachment:
    """Handles the calls of a model between `attach` and `detach`. Thread-safe for the model's calls.

    `serving` returns the `CachedModel` of the model's current weights. `passes_training`: whether calls in training mode run
    without the cache; if False, they raise.
    """

    def __init__(self, model: Any, serving: Callable[[], CachedModel], *, passes_training: bool = False) -> None:
        self.model = model
        self.last_report: GenerateReport | None = None
        self.skipped: Counter[str] = Counter()
        """The number of calls that ran without the cache, by reason."""
        self._serving = serving
        self._passes_training = passes_training
        self._inside = threading.local()
        self._hooks: dict[str, MethodHook] = {}

    @property
    def is_attached(self) -> bool:
        """Whether this attachment handles the model's calls now."""
        return bool(self._hooks)

    def attach(self) -> None:
        """Handle the model's calls from now on. Raises (kind `model`) if another cache is already attached."""
        for name in ("forward", "generate"):
            if isinstance(vars(self.model).get(name), MethodHook):
                raise TieredKVError(Kind.MODEL, f"attach: {type(self.model).__name__} has a cache attached already; detach that one first")
        for name, handler in (("forward", self._forward), ("generate", self._generate)):
            if hasattr(self.model, name):
                self._hooks[name] = MethodHook(self.model, name, handler)
                setattr(self.model, name, self._hooks[name])

    def detach(self) -> None:
        """Restore the model's own methods. A second call does nothing.

        If other code has replaced a hooked method since `attach`, the replacement stays, and runs without a cache.
        """
        hooks, self._hooks = self._hooks, {}
        for hook in hooks.values():
            hook.remove()

    # generate

    def _generate(self, plain: Callable, arguments: tuple, options: dict[str, Any]) -> Any:
        if self._is_inside() or not self._may_serve():
            return self.bypass(plain, *arguments, **options)
        given = dict(zip(_GENERATE_TAKES, arguments, strict=False)) | options
        given = {name: value for name, value in given.items() if value is not None}
        try:
            if len(arguments) > len(_GENERATE_TAKES) or ("inputs" in given) == ("input_ids" in given):
                raise TieredKVError(Kind.MODEL, "generate: either inputs or input_ids must be given, got none or both", argument="inputs")
            prompt = given.pop("inputs") if "inputs" in given else given.pop("input_ids")
            run = self._planned(prompt, given)
        except TieredKVError as error:
            self._pass("generate", error)
            return self.bypass(plain, *arguments, **options)
        output, self.last_report = self.bypass(run, plain)
        return output

    def _planned(self, prompt: Any, given: dict[str, Any]) -> Callable[[Callable], tuple[Any, GenerateReport]]:
        """Returns a function that runs the request. Raises (kinds `model`, `tokens`) if the request cannot use the cache."""
        cached = self._serving()
        try:
            check_request(self.model, prompt, given)
        except TieredKVError:
            batch = check_batch(self.model, prompt, given)
            return lambda plain: self._run_batch(cached, batch, plain, given)
        return lambda plain: cached.run(prompt, **given)

    def _run_batch(self, cached: CachedModel, batch: Batch, plain: Callable, given: dict[str, Any]) -> tuple[Any, GenerateReport]:
        rows = Rows.of(cached, batch.input_ids, batch.pads)
        reused = rows.common(batch.input_ids.shape[1] - 1)  # the last column's logits choose the next token
        cache = rows.cache(reused, batch.copies)
        output = plain(batch.input_ids, past_key_values=cache, **given)
        rows.store(cache, batch.copies)
        prompt_tokens = sum(map(len, rows.ids))
        reused_tokens = sum(max(reused - pads, 0) for pads in batch.pads)
        report = GenerateReport(prompt_tokens, reused_tokens, computed_prompt_tokens=prompt_tokens - reused_tokens)
        return output, report

    # forward

    def _forward(self, plain: Callable, arguments: tuple, options: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling() or self._is_inside():
            return plain(*arguments, **options)
        if not self._may_serve():
            return self.bypass(plain, *arguments, **options)
        given = ({"input_ids": arguments[0]} if arguments else {}) | options
        given = {name: value for name, value in given.items() if value is not None}
        try:
            if len(arguments) > 1:
                raise TieredKVError(Kind.MODEL, "forward: arguments after the first must be given by name", argument="inputs")
            lengths = self._lengths(given)
            cached = self._serving()
        except TieredKVError as error:
            self._pass("forward", error)
            return self.bypass(plain, *arguments, **options)
        return self.bypass(self._run_forward, cached, lengths, plain, given)

    def _lengths(self, given: dict[str, Any]) -> list[int]:
        """Returns the number of tokens of each row. Raises (kind `model`) if the KV does not depend on the rows' tokens alone."""
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        for name in given:
            if name not in _FORWARD_TAKES:
                raise _no_forward(name)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
            raise _no_forward("input_ids")
        if not given.get("use_cache", getattr(self.model.config, "use_cache", True)):
            raise _no_forward("use_cache")
        if not given.get("return_dict", getattr(self.model.config, "return_dict", True)):
            raise _no_forward("return_dict")
        if torch.is_autocast_enabled(self.model.device.type):
            raise _no_forward("autocast")
        if mask is None:
            return [ids.shape[1]] * len(ids)
        lengths = (mask == 1).sum(1) if tuple(mask.shape) == tuple(ids.shape) else None
        columns = torch.arange(ids.shape[1], device=ids.device)
        if lengths is None or not bool(((columns < lengths[:, None]) == (mask == 1)).all()) or not bool(((mask == 0) | (mask == 1)).all()):
            raise _no_forward("attention_mask")  # with padding on the left, keys are rotated by other positions
        return lengths.tolist()

    def _run_forward(self, cached: CachedModel, lengths: list[int], plain: Callable, given: dict[str, Any]) -> Any:
        ids = given["input_ids"]
        keep = given.get("logits_to_keep", 0)
        skips = isinstance(keep, int) and 0 < keep < ids.shape[1] and min(lengths) == ids.shape[1]
        skips = skips and not any(given.get(name) not in (None, False) for name in _NEEDS_ALL_TOKENS)
        skips = skips and not (torch.is_grad_enabled() and any(each.requires_grad for each in self.model.parameters()))
        rows = Rows.of(cached, ids, [0] * len(ids), lengths, fetch=skips)
        reused = rows.common(ids.shape[1] - keep) if skips else 0
        cache = rows.cache(reused)
        output = plain(**given | {"input_ids": ids[:, reused:], "past_key_values": cache, "use_cache": True})
        rows.store(cache)
        return output

    # generate and forward

    def _may_serve(self) -> bool:
        """Returns whether a call may use the cache. Raises (kind `model`) in training mode unless `passes_training` is set."""
        if not self._hooks:
            return False
        if not self.model.training:
            return True
        if not self._passes_training:
            raise TieredKVError(
                Kind.MODEL,
                f"{type(self.model).__name__} must be in evaluation mode, but is in training mode, where dropout makes KV random:"
                " call model.eval(), detach the cache, or give it cache_mode=CacheMode.TRAINING",
            )
        return False

    def _is_inside(self) -> bool:
        return getattr(self._inside, "depth", 0) > 0

    def bypass(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Run a function. The calls of the model that it makes do not use the cache. Returns the function's result."""
        self._inside.depth = getattr(self._inside, "depth", 0) + 1
        try:
            return function(*arguments, **options)
        finally:
            self._inside.depth -= 1

    def _pass(self, what: str, error: TieredKVError) -> None:
        reason = f"{what}: {error.context.get('argument', error.kind)}"
        if not self.skipped[reason]:
            log.info("a call runs without the cache (logged once for each reason): %s", error)
        self.skipped[reason] += 1


_GENERATE_TAKES = ("inputs", "generation_config", "logits_processor", "stopping_criteria")


def _no_forward(name: str) -> TieredKVError:
    return TieredKVError(Kind.MODEL, f"forward: the call cannot use the cache because of its {name}", argument=name)


class MethodHook:
    """Replaces a model's method and passes its calls to an attachment.

    A deep copy of the model, or a pickled one, has the model's own method instead, and no cache.
    """

    def __init__(self, model: Any, name: str, handler: Callable) -> None:
        self._model = model
        self._name = name
        self._handler = handler
        self._before = vars(model).get(name)
        self._plain = getattr(model, name)
        functools.update_wrapper(self, self._plain)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._handler(self._plain, arguments, options)

    @property
    def replaced_method(self) -> Callable | None:
        """The function that this hook replaced (see `identity.below_hook`), or None if it replaced the method of the model's class."""
        return self._before

    def __deepcopy__(self, memo: dict) -> Any:
        copy = memo.get(id(self._model), self._model)
        return types.MethodType(getattr(type(copy), self._name), copy)

    def __reduce__(self) -> tuple:
        return getattr, (self._model, self._name)

    def remove(self) -> None:
        """Restore the method that this hook replaced, unless this hook was itself replaced since."""
        if vars(self._model).get(self._name) is not self:
            return
        delattr(self._model, self._name)
        if self._before is not None:
            setattr(self._model, self._name, self._before)


class Rows(NamedTuple):
    """The prompts of a batch.

    ids, pads, found: for each row, its token ids, the number of padding columns on its left, and the prefix fetched from the
    cache.
    """

    cached: CachedModel
    columns: int
    ids: list[np.ndarray]
    pads: list[int]
    found: list[Fetched]
    state: State | None
    """The state of the model that computes this KV, or None if the KV may not be stored."""

    @classmethod
    def of(
        cls, cached: CachedModel, input_ids: torch.Tensor, pads: list[int], lengths: Sequence[int] | None = None, fetch: bool = True
    ) -> "Rows":
        """Returns the rows of `input_ids` (B, N). Fetches their cached prefixes if `fetch` is set.

        `lengths`: each row's number of tokens after its padding; None: every row ends in the last column.
        """
        whole = as_token_ids(input_ids.reshape(-1)).reshape(input_ids.shape)
        ends = [input_ids.shape[1]] * len(pads) if lengths is None else [a + b for a, b in zip(pads, lengths, strict=True)]
        ids = [whole[row, start:end] for row, (start, end) in enumerate(zip(pads, ends, strict=True))]
        state = cached.ready()
        found = [cached.found(each, state) if fetch and state else cached.nothing() for each in ids]
        return cls(cached, input_ids.shape[1], ids, pads, found, state)

    def common(self, most: int) -> int:
        """Returns how many leading columns are fetched or padding in every row, at most `most`. 0 if no row has fetched tokens."""
        reach = min(pads + each.tokens for pads, each in zip(self.pads, self.found, strict=True))
        return 0 if not any(each.tokens for each in self.found) else max(min(reach, most), 0)

    def cache(self, columns: int, copies: int = 1) -> DynamicCache:
        """Returns a transformers cache with the KV of the first `columns` columns, each row `copies` times.

        Padding has zeros, which the mask hides.
        """
        cache = DynamicCache(config=self.cached.model.config)
        if not columns:
            return cache
        shape = self.cached.shape
        for number, layer in enumerate(cache.layers):
            pair = torch.zeros(2, len(self.ids), shape.kv_heads, columns, shape.head_dim, dtype=shape.dtype)
            for row, (pads, each) in enumerate(zip(self.pads, self.found, strict=True)):
                if columns > pads:
                    pair[:, row, :, pads:] = each.kv[number, :, :, : columns - pads]
            keys, values = pair.repeat_interleave(copies, dim=1).to(shape.devices[number]) if copies > 1 else pair.to(shape.devices[number])
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        return cache

    def store(self, cache: DynamicCache, copies: int = 1) -> None:
        """Store those whole blocks of the prompts that were not fetched. `copies`: how often `cache` repeats each row."""
        if self.state is None or not self.state.watch.is_unwritten():
            return
        for row, (ids, pads, each) in enumerate(zip(self.ids, self.pads, self.found, strict=True)):
            start, held = each.tokens, cache.get_seq_length()
            if start < len(ids) and pads + len(ids) <= held:
                at, span = row * copies, slice(pads + start, pads + len(ids))
                self.cached.keep(ids, [(layer.keys[at, :, span], layer.values[at, :, span]) for layer in cache.layers], start, self.state)
