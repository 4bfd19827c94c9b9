"""Hugging Face transformers: KV blocks as a `DynamicCache`, and `generate` with prefixes from the cache.

Shapes: kv (L, 2, H, T, D) as in `layout`; a cache layer has keys and values (1, H, T, D).
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from tiered_kv.blocks import Fetched, Hint, Stored
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.arguments import check_request
from tiered_kv.integrations.modelstate import ModelState, State
from tiered_kv.integrations.probing import probe_of
from tiered_kv.integrations.support import CacheShape, check_supported, examine, layout_of
from tiered_kv.keys import Namespace, as_token_ids
from tiered_kv.layout import KVLayout
from tiered_kv.service.probes import Probe

__all__ = ["CacheShape", "CachedModel", "GenerateReport", "cache_from_kv", "check_supported", "kv_from_cache", "kv_pairs", "layout_of"]

log = logging.getLogger(__name__)
KVPair = tuple[torch.Tensor, torch.Tensor]
SCRATCH_TOKENS = 256
SCRATCH_BYTES_MAX = 256 << 20


class Client(Protocol):
    """What is needed of a tiered_kv client."""

    layout: KVLayout

    def fetch(self, token_ids: np.ndarray, out: torch.Tensor | None = None) -> Fetched:
        """The longest cached prefix, in whole blocks, in the first tokens of `out` or in new memory."""

    def store(self, token_ids: np.ndarray, kv: list[KVPair], *, start: int = 0, hint: Hint | None = None) -> Stored:
        """Keep the whole blocks of token_ids[start:], given as one (k, v) of (H, n, D) a layer.

        A client that has `use` (`modelstate.MovingClient`) is given `namespace=` by both: whose KV it is.
        """

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """So many tokens of a prompt were computed in so many seconds."""


def cache_from_kv(kv: torch.Tensor, config: Any, devices: Sequence[torch.device] | None = None) -> DynamicCache:
    """A cache that holds `kv` (L, 2, H, T, D) as views; no copy, unless a layer's device in `devices` is another.

    The model appends by allocating anew, so `kv` is never written. Raises (kind `layout`) if the config has other layers.
    """
    cache = DynamicCache(config=config)
    if kv.ndim != 5 or kv.shape[:2] != (len(cache.layers), 2):
        raise TieredKVError(
            Kind.LAYOUT, f"kv has shape {tuple(kv.shape)}; needed is ({len(cache.layers)}, 2, H, T, D)", shape=tuple(kv.shape)
        )
    if not kv.shape[3]:
        return cache
    for number, layer in enumerate(cache.layers):
        device = devices[number] if devices else kv.device
        keys, values = kv[number, 0][None].to(device), kv[number, 1][None].to(device)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def kv_pairs(cache: DynamicCache, start: int, stop: int) -> list[KVPair]:
    """Keys and values (H, stop - start, D) of tokens start to stop, a pair a layer; views of the cache, no copy."""
    pairs = []
    for number, layer in enumerate(cache.layers):
        held = layer.get_seq_length()
        if not 0 <= start <= stop <= held:
            raise TieredKVError(Kind.LAYOUT, f"tokens {start} to {stop} are not in layer {number} of the cache, which holds {held}")
        if not held:
            raise TieredKVError(Kind.LAYOUT, "the cache is empty and has no shape")
        pairs.append((layer.keys[0, :, start:stop], layer.values[0, :, start:stop]))
    return pairs


def kv_from_cache(cache: DynamicCache, start: int, stop: int) -> torch.Tensor:
    """The KV of tokens start to stop as a new tensor (L, 2, H, stop - start, D) on the first layer's device; one copy."""
    pairs = kv_pairs(cache, start, stop)
    device = pairs[0][0].device
    return torch.stack([torch.stack((keys.to(device), values.to(device))) for keys, values in pairs])


@dataclass(frozen=True)
class GenerateReport:
    """What one request reused, computed and kept. Tokens, blocks, seconds; `reused_tokens_by_tier` sums to `reused_tokens`."""

    prompt_tokens: int
    reused_tokens: int
    reused_tokens_by_tier: dict[str, int] = field(default_factory=dict)
    computed_prompt_tokens: int = 0
    generated_tokens: int = 0
    stored: Stored = field(default_factory=lambda: Stored(0, 0, 0))
    seconds_to_first_token: float = 0.0
    seconds_fetch: float = 0.0
    seconds_store: float = 0.0


class CachedModel:
    """A model whose `generate` starts from the longest prefix that the cluster has, and keeps what it computed.

    The output is that of `model.generate`; in half precision, as with any reused prefix, up to rounding. A client that fails costs
    the reuse, never the request. A model that changes (weights, adapters, hooks, settings) gets another namespace at the next request,
    and the one before when it is as before; what cannot be seen is in `integrations.watch`.
    """

    def __init__(
        self, model: Any, client: Client, *, store_generated: bool = True, shape: CacheShape | None = None, clock: Clock | None = None
    ) -> None:
        """`shape`: what `check_supported(model)` gave, if it was called before; else it is called here, and raises as it does."""
        self.model = model
        self.client = client
        self.last_report: GenerateReport | None = None
        probe = None
        if shape is None:
            shape, computed = examine(model)
            probe = probe_of(computed)
        self._shape = shape
        self._layout = self._shape.layout(client.layout.block_tokens)
        if client.layout != self._layout:
            raise TieredKVError(
                Kind.LAYOUT, f"the client is of another model: its layout is {client.layout.spec}, the model's {self._layout.spec}"
            )
        self.reshaped = False
        """Whether the model's KV has another layout by now than the client's."""
        self._state = _state_of(model, client, shape, probe)
        self._store_generated = store_generated
        self._clock = clock or SystemClock()
        self._logged: set[tuple[str, str]] = set()
        self._scratch: list[torch.Tensor] = []  # KV buffers of requests that are over, to be fetched into again

    def generate(self, input_ids: Any, **arguments: Any) -> Any:
        """As `model.generate` for one prompt, (1, n) or (n,); `last_report` then tells what was reused.

        Raises `TieredKVError` before any work: kind `model`, naming an argument that cannot be served; kind `tokens`.
        """
        output, self.last_report = self.run(input_ids, **arguments)
        return output

    def run(self, input_ids: Any, **arguments: Any) -> tuple[Any, GenerateReport]:
        """As `generate`, and returns the report with the output; for use by several threads."""
        begun_s = self._clock.now_s()
        prompt = check_request(self.model, input_ids, arguments)
        scratch = self._take_scratch(prompt.shape[-1])
        try:
            return self._run(prompt, arguments, scratch, begun_s)
        finally:
            if scratch is not None:
                self._scratch.append(scratch)  # the model has appended, which is to copy: nobody looks into it any more

    def _take_scratch(self, tokens: int) -> torch.Tensor | None:
        """A buffer for the KV of `tokens` tokens, where possible an earlier request's: new memory costs more than the copy into it.

        None for a prompt so long that its buffer would not be worth keeping.
        """
        rounded = -(-tokens // SCRATCH_TOKENS) * SCRATCH_TOKENS
        if rounded * self._layout.token_bytes > SCRATCH_BYTES_MAX:
            return None
        try:
            scratch = self._scratch.pop()
        except IndexError:
            scratch = None
        if scratch is None or scratch.shape[-2] < tokens:
            scratch = torch.empty(self._layout.kv_shape(rounded), dtype=self._shape.dtype)
        return scratch

    def _run(
        self, prompt: torch.Tensor, arguments: dict[str, Any], scratch: torch.Tensor | None, begun_s: float
    ) -> tuple[Any, GenerateReport]:
        ids = as_token_ids(prompt)
        state = self.ready()
        of = _of(state)
        fetched = self._fetch(ids, scratch, of) if state else self.nothing()
        reused = min(fetched.tokens, len(ids) - 1)  # the last token has to run: its logits choose the first new one
        cache = cache_from_kv(fetched.kv[..., :reused, :], self.model.config, self._shape.devices)
        fetched_s = self._clock.now_s()
        first = _FirstToken(self._clock, arguments.pop("streamer", None))
        output = self.model.generate(prompt, past_key_values=cache, streamer=first, **arguments)
        generated_s = self._clock.now_s()
        if first.seen_s is not None:
            self.client.note_prefill(len(ids) - reused, first.seen_s - fetched_s)
        sequence = as_token_ids(output if isinstance(output, torch.Tensor) else output.sequences)
        stop = len(sequence) if self._store_generated else len(ids)
        stored = Stored(0, 0, 0)
        if state and state.watch.is_unwritten():
            stored = self._store(sequence[:stop], cache, fetched.tokens, Hint(answer_tokens=len(sequence) - len(ids)), of)
        report = GenerateReport(
            prompt_tokens=len(ids),
            reused_tokens=reused,
            reused_tokens_by_tier=_less(fetched.tokens_by_tier, fetched.tokens - reused),
            computed_prompt_tokens=len(ids) - reused,
            generated_tokens=len(sequence) - len(ids),
            stored=stored,
            seconds_to_first_token=(generated_s if first.seen_s is None else first.seen_s) - begun_s,
            seconds_fetch=fetched_s - begun_s,
            seconds_store=self._clock.now_s() - generated_s,
        )
        return output, report

    @property
    def shape(self) -> CacheShape:
        """What the model's cache looks like."""
        return self._shape

    def ready(self) -> State | None:
        """Have the client work under the namespace of the model as it is now; None where this request must run without the cache."""
        try:
            state = self._state.adopt(self.client)
        except Exception as error:  # noqa: BLE001 - boundary: no fault of the cache fails a request
            self._log_once("check of the model", error)
            return None
        self.reshaped = state is not None and state.shape != self._shape
        return None if self.reshaped else state

    def found(self, ids: np.ndarray, state: State) -> Fetched:
        """The longest prefix of a prompt that the cache has of this state, in memory of its own; nothing where the cache fails."""
        return self._fetch(ids, None, _of(state))

    def nothing(self) -> Fetched:
        """What is found where nothing is looked for."""
        return Fetched(0, torch.empty(self._layout.kv_shape(0), dtype=self._shape.dtype))

    def keep(self, ids: np.ndarray, pairs: list[KVPair], start: int, state: State) -> Stored:
        """Keep the KV of ids[start:] in this state, one (key, value) of (H, n, D) a layer; refused where the cache fails."""
        try:
            return self.client.store(ids, pairs, start=start, **_of(state))
        except Exception as error:  # noqa: BLE001 - boundary: no fault of the cache fails a request
            self._log_once("store", error)
            return Stored(0, 0, 0)

    def _fetch(self, ids: np.ndarray, scratch: torch.Tensor | None, of: dict[str, Namespace]) -> Fetched:
        try:
            fetched = self.client.fetch(ids, scratch, **of)
            self._layout.check_kv(fetched.kv, fetched.tokens, "fetched kv")
            if fetched.tokens > len(ids):
                raise TieredKVError(Kind.LAYOUT, f"fetched {fetched.tokens} tokens for a prompt of {len(ids)}")
        except Exception as error:  # noqa: BLE001 - boundary: no fault of the cache fails a request
            self._log_once("fetch", error)
            return self.nothing()
        return fetched

    def _store(self, sequence: np.ndarray, cache: DynamicCache, start: int, hint: Hint, of: dict[str, Namespace]) -> Stored:
        stop = min(len(sequence), cache.get_seq_length())  # the last token of the sequence never ran
        if start >= stop:
            return Stored(0, 0, 0)
        try:
            return self.client.store(sequence[:stop], kv_pairs(cache, start, stop), start=start, hint=hint, **of)
        except Exception as error:  # noqa: BLE001 - boundary: no fault of the cache fails a request
            self._log_once("store", error)
            return Stored(0, 0, 0)

    def _log_once(self, verb: str, error: Exception) -> None:
        seen = (verb, str(error.kind) if isinstance(error, TieredKVError) else type(error).__name__)
        if seen not in self._logged:
            self._logged.add(seen)
            log.warning("%s failed, going on without the cache (said once): %s: %s", verb, type(error).__name__, error)


def _state_of(model: Any, client: Client, shape: CacheShape, probe: Probe | None) -> ModelState:
    """What follows the model's state. The namespace that a client was given is that of the first model it serves, as that is now;
    any other model is read when it is first asked for.
    """
    followed = getattr(client, "followed", None)
    if isinstance(followed, ModelState) and followed.model is model:
        return followed
    if isinstance(followed, ModelState) and hasattr(client, "use"):
        state = ModelState(model)
    else:
        state = ModelState(model, getattr(client, "namespace", None), shape, probe)
    with suppress(AttributeError):  # a client of another make may have no room for it
        client.followed = state
    return state


def _of(state: State | None) -> dict[str, Namespace]:
    """Whose KV a call is about, for a client that follows models; a client may serve several models at the same time."""
    return {"namespace": state.used} if state is not None and state.used is not None else {}


def _less(tokens_by_tier: dict[str, int], tokens: int) -> dict[str, int]:
    """The counts without the last `tokens`, which are taken from the tier named last."""
    left = {}
    for tier, count in reversed(tokens_by_tier.items()):
        taken = min(count, tokens)
        tokens -= taken
        if count > taken:
            left[tier] = count - taken
    return dict(reversed(left.items()))


class _FirstToken(BaseStreamer):
    """Notes when the first new token came, and hands everything on to the caller's own streamer."""

    def __init__(self, clock: Clock, then: BaseStreamer | None) -> None:
        self.seen_s: float | None = None
        self._clock = clock
        self._then = then
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt and self.seen_s is None:
            self.seen_s = self._clock.now_s()
        self._has_prompt = True
        if self._then is not None:
            self._then.put(value)

    def end(self) -> None:
        if self._then is not None:
            self._then.end()
