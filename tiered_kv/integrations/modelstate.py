"""Which namespace the KV of a model belongs to, at every request: the state of the model is compared with those known, and read anew
where it is another.
"""

import logging
import threading
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tiered_kv.errors import TieredKVError
from tiered_kv.identity import Facts, Sums, facts_of
from tiered_kv.integrations.probing import probe_of
from tiered_kv.integrations.support import CacheShape, check_supported, examine
from tiered_kv.integrations.watch import Watch
from tiered_kv.keys import Namespace, content_of, private_variant
from tiered_kv.service.probes import Probe

log = logging.getLogger(__name__)

STATES_MAX = 8
"""States that are remembered, so that going back to one of them (another LoRA adapter) reads nothing."""


class MovingClient(Protocol):
    """What is needed of a client that follows a model's changes."""

    namespace: Namespace

    def use(self, namespace: Namespace) -> None:
        """Work under another namespace from now on; raises `TieredKVError` where the node's settings have something against it."""

    def variant_of(self, namespace: Namespace, probe: Probe) -> str | None:
        """The variant of a namespace that a model with this probe belongs to; None while the node does not answer."""


@dataclass
class State:
    """One state of a model.

    `content`: the fields of a namespace that come from the model. `variant`: None until it is known. `refusal`: why the model
    cannot be served in this state.
    """

    watch: Watch
    shape: CacheShape | None = None
    content: dict[str, str] | None = None
    probe: Probe | None = None
    variant: str | None = None
    refusal: TieredKVError | None = None
    used: Namespace | None = None
    """The namespace that a client was last given for it."""


class ModelState:
    """Follows the state of one model. Thread-safe.

    `given`: the namespace that the model has in its present state, where that is known; else it is read when it is first asked for:
    a pass over the weights, and three runs of a few tokens.
    `probe`: its probe in that state, which tells it from later ones. Later changes read what has changed. `generates`: as for
    `check_supported`.
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
        self._states: list[State] = []  # the present one first
        self._said: set[str] = set()
        if shape is not None:
            content = given and {name: getattr(given, name) for name in ("weights", "adapter", "architecture", "rope", "dtype")}
            variant = (given.variant or (None if probe else "")) if given else None
            self._states.append(State(Watch(model), shape, content, probe, variant))

    def now(self) -> State:
        """The model's present state. Cost: 0.15 ms for a model of 300 tensors that is as it was at the last request."""
        with self._lock:
            states = self._states
            if states and states[0].watch.holds():
                return states[0]
            known = next((each for each in states[1:] if each.watch.holds()), None)
            if known is None:
                known = self._read()
                states = [each for each in states if each.watch.is_of_same_parts(known.watch)]  # others keep old modules alive
            self._states = [known, *(each for each in states if each is not known)][:STATES_MAX]
            return known

    def forget(self) -> None:
        """Read everything anew at the next request, after a change that cannot be seen."""
        with self._lock:
            self._states.clear()
            self._sums = Sums()

    def as_namespace(self, **others: Any) -> Namespace:
        """The namespace of the present state; `others`: its fields that are not of the model. Raises where the model cannot be served."""
        state = self.now()
        if state.refusal is not None:
            raise state.refusal
        return Namespace(**state.content, **others, variant=state.variant or "")

    def adopt(self, client: MovingClient) -> State | None:
        """Have `client` work under the namespace of the model's present state; None: what is done now must be done without the cache."""
        with self._lock:
            state = self.now()
            if state.watch.is_training():
                part = next(where or type(module).__name__ for where, module in self.model.named_modules() if module.training)
                self._say("training", f"runs without the cache while {part} is in training mode; call model.eval()")
                return None
            if state.refusal is not None:
                self._say("refusal", f"runs without the cache: {state.refusal}")
                return None
            if state.used is not None and state.used is getattr(client, "namespace", None):
                return state
            return state if self._move(client, state) else None

    def _move(self, client: MovingClient, state: State) -> bool:
        if not hasattr(client, "use"):  # a client of another make: it serves the state that it was made for
            return state.content is None
        if state.content is None:
            return True
        plain = replace(client.namespace, **state.content, variant="")
        if state.variant is None:
            state.variant = client.variant_of(plain, state.probe)
            if state.variant is None:
                return False
            self._tell_variant(state.variant)
        wanted = replace(plain, variant=state.variant)
        if wanted != client.namespace:
            try:
                client.use(wanted)
            except TieredKVError as error:
                self._say("use", f"runs without the cache: {error}")
                return False
        state.used = client.namespace
        return True

    def _read(self) -> State:
        """The present state from scratch; sums of tensors that were not written since are known."""
        if not isinstance(self.model, torch.nn.Module):
            check_supported(self.model)  # says why not
        before = _numbers(self.model)
        try:
            shape, cache = examine(self.model, generates=self._generates)
        except TieredKVError as error:
            return State(Watch(self.model), refusal=error)
        after = _numbers(self.model)
        counters = frozenset(name for name, value in after.items() if name in before and before[name] != value)
        watch, walked = Watch(self.model, counters), facts_of(self.model, counters)
        content = content_of(self.model, walked, self._sums)
        return State(watch, shape, content, probe_of(cache), self._private_variant(walked) or None)

    def _private_variant(self, walked: Facts) -> str:
        """The name for a model with this foreign code, which stays the same as long as this code does."""
        code = [each for _, each in walked.foreign]
        for known, variant in self._private:
            if len(known) == len(code) and all(ours is theirs for ours, theirs in zip(known, code, strict=True)):
                return variant
        variant = private_variant(walked)
        self._private = [*self._private, (code, variant)][-STATES_MAX:]
        return variant

    def _tell_variant(self, variant: str) -> None:
        if variant:
            log.warning(
                "this model computes other KV from a few fixed tokens than the first worker of its namespace did, by more than rounding,"
                " although weights, settings and classes are equal; its KV is shared with workers whose KV agrees with it (variant %s)",
                variant,
            )

    def _say(self, what: str, words: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning("%s (said once)", words)


def _numbers(model: Any) -> dict[tuple[str, str], Any]:
    """All attributes of modules that are numbers: what a run changes of them is a counter, and says nothing of KV."""
    return {
        (where, name): value
        for where, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, int | float) and name != "training"
    }
