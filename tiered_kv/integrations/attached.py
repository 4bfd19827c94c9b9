"""A cache attached to a model: its own `generate` and `forward` find and keep prefixes, called as before and with the same results.

Whatever cannot be served correctly from the cache runs as if there were none, and is counted by its reason: the cache never
changes a result. Where a call asks for what a reused prefix does not have (logits of every token, hidden states) all is
computed, and only kept.
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
    """What stands between a model and its callers from `attach` to `detach`. Calls may come from several threads.

    `serving` gives the `CachedModel` of the model's present weights; `passes_training`: whether calls in training mode run past
    the cache (else they are refused).
    """

    def __init__(self, model: Any, serving: Callable[[], CachedModel], *, passes_training: bool = False) -> None:
        self.model = model
        self.last_report: GenerateReport | None = None
        self.passed: Counter[str] = Counter()
        """Calls that ran past the cache, by reason."""
        self._serving = serving
        self._passes_training = passes_training
        self._inside = threading.local()
        self._doors: dict[str, Door] = {}

    @property
    def is_attached(self) -> bool:
        """Whether calls of the model come here."""
        return bool(self._doors)

    def attach(self) -> None:
        """From now on the model's callers come here. Raises (kind `model`) where another cache is attached already."""
        for name in ("forward", "generate"):
            if isinstance(vars(self.model).get(name), Door):
                raise TieredKVError(Kind.MODEL, f"{type(self.model).__name__} has a cache attached already; detach that one before")
        for name, through in (("forward", self._forward), ("generate", self._generate)):
            if hasattr(self.model, name):
                self._doors[name] = Door(self.model, name, through)
                setattr(self.model, name, self._doors[name])

    def detach(self) -> None:
        """The model is as it was before; a second time does nothing. What others have put over it since stays, without a cache."""
        doors, self._doors = self._doors, {}
        for door in doors.values():
            door.remove()

    # generate

    def _generate(self, plain: Callable, arguments: tuple, options: dict[str, Any]) -> Any:
        if self._is_inside() or not self._may_serve():
            return self.straight(plain, *arguments, **options)
        given = dict(zip(_GENERATE_TAKES, arguments, strict=False)) | options
        given = {name: value for name, value in given.items() if value is not None}
        try:
            if len(arguments) > len(_GENERATE_TAKES) or ("inputs" in given) == ("input_ids" in given):
                raise TieredKVError(Kind.MODEL, "generate: no input_ids", argument="inputs")
            prompt = given.pop("inputs") if "inputs" in given else given.pop("input_ids")
            run = self._planned(prompt, given)
        except TieredKVError as error:
            self._pass("generate", error)
            return self.straight(plain, *arguments, **options)
        output, self.last_report = self.straight(run, plain)
        return output

    def _planned(self, prompt: Any, given: dict[str, Any]) -> Callable[[Callable], tuple[Any, GenerateReport]]:
        """How the request will run; raises (kinds `model`, `tokens`) where it cannot be served."""
        cached = self._serving()
        try:
            check_request(self.model, prompt, given)
        except TieredKVError:
            batch = check_batch(self.model, prompt, given)
            return lambda plain: self._run_batch(cached, batch, plain, given)
        return lambda plain: cached.run(prompt, **given)

    def _run_batch(self, cached: CachedModel, batch: Batch, plain: Callable, given: dict[str, Any]) -> tuple[Any, GenerateReport]:
        rows = Rows.of(cached, batch.input_ids, batch.pads)
        reused = rows.common(batch.input_ids.shape[1] - 1)  # the last column has to run
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
            return self.straight(plain, *arguments, **options)
        given = ({"input_ids": arguments[0]} if arguments else {}) | options
        given = {name: value for name, value in given.items() if value is not None}
        try:
            if len(arguments) > 1:
                raise TieredKVError(Kind.MODEL, "forward: arguments without their names", argument="inputs")
            lengths = self._lengths(given)
            cached = self._serving()
        except TieredKVError as error:
            self._pass("forward", error)
            return self.straight(plain, *arguments, **options)
        return self.straight(self._run_forward, cached, lengths, plain, given)

    def _lengths(self, given: dict[str, Any]) -> list[int]:
        """The tokens of each row; raises (kind `model`) where the KV of a call is not that of its rows' tokens alone."""
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
            raise _no_forward("attention_mask")  # padding on the left turns keys by other positions
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

    # Both

    def _may_serve(self) -> bool:
        """Whether a call may use the cache; raises (kind `model`) in training mode where that is not meant."""
        if not self._doors:
            return False
        if not self.model.training:
            return True
        if not self._passes_training:
            raise TieredKVError(
                Kind.MODEL,
                f"{type(self.model).__name__} is in training mode, where dropout makes KV random:"
                " call model.eval(), detach the cache, or give it cache_mode=CacheMode.TRAINING",
            )
        return False

    def _is_inside(self) -> bool:
        return getattr(self._inside, "depth", 0) > 0

    def straight(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        """Run what itself calls the model: those calls go straight to it."""
        self._inside.depth = getattr(self._inside, "depth", 0) + 1
        try:
            return function(*arguments, **options)
        finally:
            self._inside.depth -= 1

    def _pass(self, what: str, error: TieredKVError) -> None:
        reason = f"{what}: {error.context.get('argument', error.kind)}"
        if not self.passed[reason]:
            log.info("runs past the cache (said once): %s", error)
        self.passed[reason] += 1


_GENERATE_TAKES = ("inputs", "generation_config", "logits_processor", "stopping_criteria")


def _no_forward(name: str) -> TieredKVError:
    return TieredKVError(Kind.MODEL, f"forward: with this {name} nothing is kept or found", argument=name)


class Door:
    """In the place of a model's method: hands calls to an attachment. A deep copy of the model, or one that was pickled, has its own
    method in that place, and no cache.
    """

    def __init__(self, model: Any, name: str, through: Callable) -> None:
        self._model = model
        self._name = name
        self._through = through
        self._before = vars(model).get(name)
        self._plain = getattr(model, name)
        functools.update_wrapper(self, self._plain)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._through(self._plain, arguments, options)

    @property
    def stands_before(self) -> Callable | None:
        """What was in this place of the model before (`identity.below_door`); None for the method of its class."""
        return self._before

    def __deepcopy__(self, memo: dict) -> Any:
        copy = memo.get(id(self._model), self._model)
        return types.MethodType(getattr(type(copy), self._name), copy)

    def __reduce__(self) -> tuple:
        return getattr, (self._model, self._name)

    def remove(self) -> None:
        """Put back what was there, unless somebody has put something over it."""
        if vars(self._model).get(self._name) is not self:
            return
        delattr(self._model, self._name)
        if self._before is not None:
            setattr(self._model, self._name, self._before)


class Rows(NamedTuple):
    """The prompts of a batch: their token ids, the columns of padding before each, and what was fetched for each."""

    cached: CachedModel
    columns: int
    ids: list[np.ndarray]
    pads: list[int]
    found: list[Fetched]
    state: State | None
    """The model's state that this is KV of; None where nothing of it may be kept."""

    @classmethod
    def of(
        cls, cached: CachedModel, input_ids: torch.Tensor, pads: list[int], lengths: Sequence[int] | None = None, fetch: bool = True
    ) -> "Rows":
        """The rows (B, N), each of the `lengths` tokens behind its padding (None: to the end); without `fetch` nothing is looked for."""
        whole = as_token_ids(input_ids.reshape(-1)).reshape(input_ids.shape)
        ends = [input_ids.shape[1]] * len(pads) if lengths is None else [a + b for a, b in zip(pads, lengths, strict=True)]
        ids = [whole[row, start:end] for row, (start, end) in enumerate(zip(pads, ends, strict=True))]
        state = cached.ready()
        found = [cached.found(each, state) if fetch and state else cached.nothing() for each in ids]
        return cls(cached, input_ids.shape[1], ids, pads, found, state)

    def common(self, most: int) -> int:
        """Columns, `most` at most, that nobody has to compute."""
        reach = min(pads + each.tokens for pads, each in zip(self.pads, self.found, strict=True))
        return 0 if not any(each.tokens for each in self.found) else max(min(reach, most), 0)

    def cache(self, columns: int, copies: int = 1) -> DynamicCache:
        """The first columns of all rows, each row `copies` times; what stands for padding is zeros, and masked."""
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
        """Keep the whole blocks of the prompts that were not found."""
        if self.state is None or not self.state.watch.is_unwritten():
            return
        for row, (ids, pads, each) in enumerate(zip(self.ids, self.pads, self.found, strict=True)):
            start, held = each.tokens, cache.get_seq_length()
            if start < len(ids) and pads + len(ids) <= held:
                at, span = row * copies, slice(pads + start, pads + len(ids))
                self.cached.keep(ids, [(layer.keys[at, :, span], layer.values[at, :, span]) for layer in cache.layers], start, self.state)
