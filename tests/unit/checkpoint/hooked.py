"""A shared store in which each process can be observed, paused and killed at every step."""

from collections import Counter
from collections.abc import Callable, Sequence
from threading import RLock
from typing import NamedTuple

from tests.unit.checkpoint.checkpoints import Clock
from tiered_kv.checkpoint.manifest import Manifest
from tiered_kv.checkpoint.repository import Repository
from tiered_kv.codecs.base import Buffer
from tiered_kv.tiers.objects.store import MemoryStore, ObjectStore


class Crash(BaseException):
    """Stands for the death of a process."""


class Step(NamedTuple):
    """One call of a store.

    `number`: among all calls of one `Hooked`. `done`: whether the call was carried out already.
    """

    number: int
    call: str
    name: str
    done: bool


class Shared(MemoryStore):
    """The content that all processes share. Asserts that no manifest ever names a missing pack.

    `puts`: how often each pack was written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.puts: Counter[str] = Counter()
        self._named: dict[str, dict[str, int]] = {}
        self._lock = RLock()

    def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        with self._lock:
            super().put(name, buffers)
            self.puts[name] += name.endswith(".pack")
            if name.endswith(".tkv"):
                self._named[name] = dict(Manifest.read(self, name).packs)
            self._check()

    def delete(self, names: Sequence[str]) -> None:
        with self._lock:
            super().delete(names)
            self._check()

    def sizes(self) -> dict[str, int]:
        with self._lock:
            return super().sizes()

    def copy(self) -> "Shared":
        """Returns a copy of the content, without the counts."""
        other = Shared()
        other.objects, other._named = dict(self.objects), dict(self._named)
        return other

    def _check(self) -> None:
        for name, packs in self._named.items():
            if name in self.objects:
                for pack, nbytes in packs.items():
                    assert len(self.objects.get(pack, b"")) == nbytes, f"{name} names {pack}, which does not exist"


class Hooked(ObjectStore):
    """One process's access to a shared store. `hook` is called before and after every step, and may raise an error."""

    url = "memory://"

    def __init__(self, shared: Shared, hook: Callable[[Step], None] = lambda _: None) -> None:
        self.shared, self.hook = shared, hook
        self.steps = 0
        self._lock = RLock()

    def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        self._step("put", name, lambda: self.shared.put(name, buffers))

    def get(self, name: str) -> memoryview:
        return self._step("get", name, lambda: self.shared.get(name))

    def get_range(self, name: str, offset: int, nbytes: int) -> memoryview:
        return self._step("get_range", name, lambda: self.shared.get_range(name, offset, nbytes))

    def sizes(self) -> dict[str, int]:
        return self._step("sizes", "", self.shared.sizes)

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            self._step("delete", name, lambda name=name: self.shared.delete([name]))

    def close(self) -> None:
        """Does nothing, because other processes use the content."""

    def _step(self, call: str, name: str, act: Callable):
        with self._lock:
            number = self.steps
            self.steps += 1
        self.hook(Step(number, call, name, False))
        answer = act()
        self.hook(Step(number, call, name, True))
        return answer


class Death:
    """A hook that kills a process before or after step `at`. None of its later steps is carried out."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.dead = at, after, False

    def __call__(self, step: Step) -> None:
        if self.dead or (step.number >= self.at and step.done == self.after):
            self.dead = True
            raise Crash


def repository_of(store: ObjectStore, clock: Clock) -> Repository:
    return Repository(store, clock, clock.sleep)
