"""Follows the state of a model, which determines the namespace of its KV.

Each request compares the model's current state with the states that are known. An unknown state is read: weights, settings and
probe.
"""

import logging
import threading
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tiered_kv.errors import TieredKVError
from tiered_kv.identity import ModelWalk, Sums, walk_model
from tiered_kv.integrations.probing import probe_of
from tiered_kv.integrations.support import CacheShape, check_supported, examine
from tiered_kv.integrations.watch import Watch
from tiered_kv.keys import Namespace, content_of, private_variant
from tiered_kv.protocol.probes import Probe

log = logging.getLogger(__name__)

STATES_MAX = 8
"""The number of states to remember. A return to a remembered state (such as an earlier LoRA adapter) reads nothing."""


class MovingClient(Protocol):
    """A client that can change its namespace when the model changes."""

    namespace: Namespace

    def use(self, namespace: Namespace) -> None:
        """Use another namespace from now on. Raises `TieredKVError` if the node's settings forbid it."""

    def variant_of(self, namespace: Namespace, probe: Probe) -> str | None:
        """Returns the variant for a model with this probe, or None while the node does not answer.

        Variants separate models of one namespace that compute different KV.
        """


@dataclass
class State:
    """One state of a model.

    `content`: the fields of a namespace that come from the model. `variant`: which of several models of one namespace that
    compute different KV it is; None until known. `refusal`: the error that says why the model cannot use the cache in this
    state, or None.
    """

    watch: Watch
    shape: CacheShape | None = None
    content: dict[str, str] | None = None
    probe: Probe | None = None
    variant: str | None = None
    refusal: TieredKVError | None = None
    used: Namespace | None = None
    """The namespace that a client was last given for this state."""


class ModelState:
    """Follows the state of one model. Thread-safe.

    `given`: the namespace of the model's current state, if it is known. Otherwise the first request reads it, with one pass
    over the weights and three runs of a few tokens. `probe`: the model's probe in that state, from which the client finds the
    variant. After a change of the model, only what has changed is read. `generates`: see `check_supported`.
    """

    def __init__(
        self,
        model: Any,
        given: Namespace | None = None,
        shape: CacheShape | None = None,
        probe: Probe | None = None,
        *,
        generates: bool = True,
    ) -> None:
        self.model = model
        self._generates = generates
        self._sums = Sums()
        self._private: list[tuple[list[Any], str]] = []
        self._lock = threading.RLock()
        self._states: list[State] = []  # the current one first
        self._logged: set[str] = set()
        if shape is not None:
            content = given and {name: getattr(given, name) for name in ("weights", "adapter", "architecture", "rope", "dtype")}
            variant = (given.variant or (None if probe else "")) if given else None
            self._states.append(State(Watch(model), shape, content, probe, variant))

    def now(self) -> State:
        """Returns the model's current state. Cost: 0.15 ms for a model of 300 tensors that has not changed since the last request."""
        with self._lock:
            states = self._states
            if states and states[0].watch.holds():
                return states[0]
            known = next((each for each in states[1:] if each.watch.holds()), None)
            if known is None:
                known = self._read()
                states = [each for each in states if each.watch.is_of_same_parts(known.watch)]  # other states would keep old modules alive
            self._states = [known, *(each for each in states if each is not known)][:STATES_MAX]
            return known

    def forget(self) -> None:
        """Forget all states, so that the next request reads everything again. Call it after a change that cannot be detected."""
        with self._lock:
            self._states.clear()
            self._sums = Sums()

    def as_namespace(self, **others: Any) -> Namespace:
        """Returns the namespace of the current state. `others`: the namespace's fields that do not come from the model.

        Raises (kind `model`) if the model cannot use the cache.
        """
        state = self.now()
        if state.refusal is not None:
            raise state.refusal
        return Namespace(**state.content, **others, variant=state.variant or "")

    def adopt(self, client: MovingClient) -> State | None:
        """Make `client` use the namespace of the model's current state.

        Returns that state, or None if the current request must run without the cache.
        """
        with self._lock:
            state = self.now()
            if state.watch.is_training():
                part = next(where or type(module).__name__ for where, module in self.model.named_modules() if module.training)
                self._log_once("training", f"the model runs without the cache while {part} is in training mode; call model.eval()")
                return None
            if state.refusal is not None:
                self._log_once("refusal", f"the model runs without the cache: {state.refusal}")
                return None
            if state.used is not None and state.used is getattr(client, "namespace", None):
                return state
            return state if self._move(client, state) else None

    def _move(self, client: MovingClient, state: State) -> bool:
        if not hasattr(client, "use"):  # another kind of client, which serves only the state that it was created for
            return state.content is None
        if state.content is None:
            return True
        plain = replace(client.namespace, **state.content, variant="")
        if state.variant is None:
            state.variant = client.variant_of(plain, state.probe)
            if state.variant is None:
                return False
            self._log_variant(state.variant)
        wanted = replace(plain, variant=state.variant)
        if wanted != client.namespace:
            try:
                client.use(wanted)
            except TieredKVError as error:
                self._log_once("use", f"the model runs without the cache: {error}")
                return False
        state.used = client.namespace
        return True

    def _read(self) -> State:
        """Read the current state. Returns it. Digests of tensors that were not written since the last read are reused."""
        if not isinstance(self.model, torch.nn.Module):
            check_supported(self.model)  # raises the reason
        before = _numbers(self.model)
        try:
            shape, cache = examine(self.model, generates=self._generates)
        except TieredKVError as error:
            return State(Watch(self.model), refusal=error)
        after = _numbers(self.model)
        counters = frozenset(name for name, value in after.items() if name in before and before[name] != value)
        watch, walked = Watch(self.model, counters), walk_model(self.model, counters)
        content = content_of(self.model, walked, self._sums)
        return State(watch, shape, content, probe_of(cache), self._private_variant(walked) or None)

    def _private_variant(self, walked: ModelWalk) -> str:
        """Returns a variant for a model with foreign code (hooks, replaced methods), whose effect on KV is unknown.

        The same code objects get the same variant. Returns "" for a model without such code.
        """
        code = [each for _, each in walked.foreign]
        for known, variant in self._private:
            if len(known) == len(code) and all(ours is theirs for ours, theirs in zip(known, code, strict=True)):
                return variant
        variant = private_variant(walked)
        self._private = [*self._private, (code, variant)][-STATES_MAX:]
        return variant

    def _log_variant(self, variant: str) -> None:
        if variant:
            log.warning(
                "this model's KV of a few fixed tokens differs, by more than rounding, from that of the first worker of its namespace,"
                " although weights, settings and classes are equal; its KV is shared only with workers that compute the same (variant %s)",
                variant,
            )

    def _log_once(self, reason: str, message: str) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            log.warning("%s (logged once)", message)


def _numbers(model: Any) -> dict[tuple[str, str], Any]:
    """Returns the numeric attributes of all modules, by module and name.

    An attribute that a run changes is a counter, which does not affect KV.
    """
    return {
        (where, name): value
        for where, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float) and name != "training"
    }
