"""Hugging Face transformers: converts KV to and from `DynamicCache`, and runs `generate` with prefixes from the cache.

Shapes: kv (L, 2, H, T, D) as in `layout`. A cache layer has keys and values (1, H, T, D).
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
from tiered_kv.protocol.probes import Probe

__all__ = ["CacheShape", "CachedModel", "GenerateReport", "cache_from_kv", "check_supported", "kv_from_cache", "kv_pairs", "layout_of"]

log = logging.getLogger(__name__)
KVPair = tuple[torch.Tensor, torch.Tensor]
SCRATCH_TOKENS = 256
SCRATCH_BYTES_MAX = 256 << 20


class CacheClient(Protocol):
    """The methods of a tiered_kv client that `CachedModel` uses."""

    layout: KVLayout

    def fetch(self, token_ids: np.ndarray, out: torch.Tensor | None = None) -> Fetched:
        """Copy the longest cached prefix, in whole blocks, into the first tokens of `out`, or into new memory if `out` is None.

        Returns the prefix.
        """

    def store(self, token_ids: np.ndarray, kv: list[KVPair], *, start: int = 0, hint: Hint | None = None) -> Stored:
        """Store the whole blocks of token_ids[start:]. `kv` has one (k, v) of shape (H, n, D) for each layer.

        A client that has the method `use` (`modelstate.MovingClient`) must also accept the argument `namespace` in `fetch` and
        `store`: the namespace of the model's current state.
        """

    def note_prefill(self, tokens: int, seconds: float, position: int = 0) -> None:
        """Record that the model computed `tokens` tokens of a prompt in `seconds`, after `position` tokens that it did not compute."""


def cache_from_kv(kv: torch.Tensor, config: Any, devices: Sequence[torch.device] | None = None) -> DynamicCache:
    """Returns a cache with views of `kv` (L, 2, H, T, D). Copies only layers whose device in `devices` differs.

    When the model appends tokens to the cache, it allocates new memory. So `kv` is never written. Raises (kind `layout`) if the
    number of layers differs from the config's.
    """
    cache = DynamicCache(config=config)
    if kv.ndim != 5 or kv.shape[:2] != (len(cache.layers), 2):
        raise TieredKVError(
            Kind.LAYOUT, f"kv must have the shape ({len(cache.layers)}, 2, H, T, D), got {tuple(kv.shape)}", shape=tuple(kv.shape)
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
    """Returns keys and values (H, stop - start, D) of tokens start to stop, one pair for each layer.

    They are views of the cache, not copies. Raises (kind `layout`) if the cache does not have these tokens.
    """
    pairs = []
    for number, layer in enumerate(cache.layers):
        held = layer.get_seq_length()
        if not 0 <= start <= stop <= held:
            message = f"start and stop must be within the {held} tokens of layer {number} of the cache, got {start} and {stop}"
            raise TieredKVError(Kind.LAYOUT, message)
        if not held:
            raise TieredKVError(Kind.LAYOUT, "the cache must have at least one token; an empty one has no shape")
        pairs.append((layer.keys[0, :, start:stop], layer.values[0, :, start:stop]))
    return pairs


def kv_from_cache(cache: DynamicCache, start: int, stop: int) -> torch.Tensor:
    """Returns the KV of tokens start to stop as a new tensor (L, 2, H, stop - start, D) on the first layer's device.

    Cost: one copy. Raises the errors of `kv_pairs`.
    """
    pairs = kv_pairs(cache, start, stop)
    device = pairs[0][0].device
    return torch.stack([torch.stack((keys.to(device), values.to(device))) for keys, values in pairs])


@dataclass(frozen=True)
class GenerateReport:
    """The tokens that one request reused and computed, its stored blocks, and its times in seconds.

    `reused_tokens_by_tier` sums to `reused_tokens`. `declined_tokens`: cached tokens that the model computed because loading them would
    have taken longer.
    """

    prompt_tokens: int
    reused_tokens: int
    reused_tokens_by_tier: dict[str, int] = field(default_factory=dict)
    computed_prompt_tokens: int = 0
    generated_tokens: int = 0
    stored: Stored = field(default_factory=lambda: Stored(0, 0, 0))
    seconds_to_first_token: float = 0.0
    seconds_fetch: float = 0.0
    seconds_store: float = 0.0
    declined_tokens: int = 0


class CachedModel:
    """A model whose `generate` starts from the longest cached prefix, and stores the KV that it computed.

    The output equals that of `model.generate`. In half precision it may differ by rounding, as with any reused prefix. If the client
    fails, the request runs without the cache. If the model changes (weights, adapters, hooks, settings), the next request uses
    another namespace. If the model changes back, its earlier namespace is used again. `integrations.watch` lists the changes that
    cannot be detected.
    """

    def __init__(
        self, model: Any, client: CacheClient, *, store_generated: bool = True, shape: CacheShape | None = None, clock: Clock | None = None
    ) -> None:
        """`shape`: the result of `check_supported(model)`. If None, the model is checked here, which may raise."""
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
                Kind.LAYOUT,
                f"client must have the model's layout {self._layout.spec}, got one of another model, with layout {client.layout.spec}",
            )
        self.reshaped = False
        """Whether the layout of the model's KV has changed, and differs from the client's."""
        self._state = _state_of(model, client, shape, probe)
        self._store_generated = store_generated
        self._clock = clock or SystemClock()
        self._logged: set[tuple[str, str]] = set()
        self._scratch: list[torch.Tensor] = []  # KV buffers of finished requests, reused by later fetches

    def generate(self, input_ids: Any, **arguments: Any) -> Any:
        """Run `model.generate` for one prompt, (1, n) or (n,). Returns its output, and sets `last_report`.

        Raises `TieredKVError` before any work: kind `model`, with the name of an argument that cannot use the cache, or kind
        `tokens` for an empty prompt.
        """
        output, self.last_report = self.run(input_ids, **arguments)
        return output

    def run(self, input_ids: Any, **arguments: Any) -> tuple[Any, GenerateReport]:
        """Do the same as `generate` without setting `last_report`, so that several threads may call it. Returns output and report."""
        begun_s = self._clock.now_s()
        prompt = check_request(self.model, input_ids, arguments)
        scratch = self._take_scratch(prompt.shape[-1])
        try:
            return self._run(prompt, arguments, scratch, begun_s)
        finally:
            if scratch is not None:
                self._scratch.append(scratch)  # free to reuse: the model's append made a copy, so no cache has views of it

    def _take_scratch(self, tokens: int) -> torch.Tensor | None:
        """Returns a buffer for the KV of `tokens` tokens, or None if it would exceed SCRATCH_BYTES_MAX.

        Reuses the buffer of an earlier request if possible, because new memory costs more than the copy into it.
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
        reused = min(fetched.tokens, len(ids) - 1)  # the last token must be computed: its logits choose the first new token
        cache = cache_from_kv(fetched.kv[..., :reused, :], self.model.config, self._shape.devices)
        fetched_s = self._clock.now_s()
        first = _FirstTokenTimer(self._clock, arguments.pop("streamer", None))
        output = self.model.generate(prompt, past_key_values=cache, streamer=first, **arguments)
        generated_s = self._clock.now_s()
        if first.seen_s is not None:
            self.client.note_prefill(len(ids) - reused, first.seen_s - fetched_s, reused)
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
            declined_tokens=fetched.declined,
        )
        return output, report

    @property
    def shape(self) -> CacheShape:
        """The shape of the model's cache."""
        return self._shape

    def ready(self) -> State | None:
        """Make the client use the namespace of the model's current state.

        Returns that state, or None if this request must run without the cache.
        """
        try:
            state = self._state.adopt(self.client)
        except Exception as error:  # noqa: BLE001 - boundary: no fault of the cache fails a request
            self._log_once("checking the model", error)
            return None
        self.reshaped = state is not None and state.shape != self._shape
        return None if self.reshaped else state

    def found(self, ids: np.ndarray, state: State) -> Fetched:
        """Returns a prompt's longest cached prefix for this state of the model, in new memory. The prefix is empty if the cache fails."""
        return self._fetch(ids, None, _of(state))

    def nothing(self) -> Fetched:
        """Returns an empty prefix, for requests without a look-up."""
        return Fetched(0, torch.empty(self._layout.kv_shape(0), dtype=self._shape.dtype))

    def keep(self, ids: np.ndarray, pairs: list[KVPair], start: int, state: State) -> Stored:
        """Store the KV of ids[start:], which the model computed in this state. Returns the counts, which are 0 if the cache fails.

        `pairs`: one (key, value) of shape (H, n, D) for each layer.
        """
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
                raise TieredKVError(Kind.LAYOUT, f"fetch must return at most the prompt's {len(ids)} tokens, got {fetched.tokens}")
        except Exception as error:  # noqa: BLE001 - boundary: no fault of the cache fails a request
            self._log_once("fetch", error)
            return self.nothing()
        return fetched

    def _store(self, sequence: np.ndarray, cache: DynamicCache, start: int, hint: Hint, of: dict[str, Namespace]) -> Stored:
        stop = min(len(sequence), cache.get_seq_length())  # the model has not computed the KV of the last token
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
            log.warning("%s failed; the request goes on without the cache (logged once): %s: %s", verb, type(error).__name__, error)


def _state_of(model: Any, client: CacheClient, shape: CacheShape, probe: Probe | None) -> ModelState:
    """Returns the object that follows the state of `model`, and keeps it in `client.followed`.

    The client's namespace is that of the first model that it serves, in that model's current state. If the client already follows
    another model, `model` is read at its first request.
    """
    followed = getattr(client, "followed", None)
    if isinstance(followed, ModelState) and followed.model is model:
        return followed
    if isinstance(followed, ModelState) and hasattr(client, "use"):
        state = ModelState(model)
    else:
        state = ModelState(model, getattr(client, "namespace", None), shape, probe)
    with suppress(AttributeError):  # a client of another class may not allow new attributes
        client.followed = state
    return state


def _of(state: State | None) -> dict[str, Namespace]:
    """Returns the argument that passes this state's namespace to a client's call, or {} if the client does not follow models.

    A client may serve several models at the same time.
    """
    return {"namespace": state.used} if state is not None and state.used is not None else {}


def _less(tokens_by_tier: dict[str, int], tokens: int) -> dict[str, int]:
    """Returns the token counts by tier, reduced by `tokens` in all. The last tiers are reduced first."""
    left = {}
    for tier, count in reversed(tokens_by_tier.items()):
        taken = min(count, tokens)
        tokens -= taken
        if count > taken:
            left[tier] = count - taken
    return dict(reversed(left.items()))


class _FirstTokenTimer(BaseStreamer):
    """Records when the first new token was generated, and passes all tokens on to the caller's own streamer."""

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
