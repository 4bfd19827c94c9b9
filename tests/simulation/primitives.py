"""The simulated `threading`, `time`, `queue` and `secrets`, which take the places of the real modules in tiered_kv's modules.

Each name falls back to the real module for threads that are not of the simulation, such as those of pytest, so that it may be replaced
while they run. Only what tiered_kv and `concurrent.futures` use is here; another name is an AttributeError.
"""

import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from tests.simulation.scheduler import Killed, Task, World


def world_here() -> World | None:
    """Returns the simulation that the calling thread belongs to, if any."""
    world = World.active
    return world if world is not None and world.is_here() else None


class Lock:
    """As `threading.Lock`. Each acquisition is a switch point."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_taken = False
        self._waiting: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        world = self._world
        if world.over:
            return True
        world.pause()
        until_s = world.now_s + timeout
        while self._is_taken:
            if not blocking or (timeout >= 0 and world.now_s >= until_s):
                return False
            world.wait(self._waiting, until_s - world.now_s if timeout >= 0 else None)
        self._is_taken = True
        return True

    def release(self) -> None:
        if not self._world.over:
            if not self._is_taken:
                raise RuntimeError("release unlocked lock")
            self._is_taken = False
            self._world.wake(self._waiting, 1)

    def locked(self) -> bool:
        return self._is_taken

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock:
    """As `threading.RLock`. Each outermost acquisition is a switch point."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.owner: Task | None = None
        self._count = 0
        self._waiting: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        world = self._world
        if self.owner is world.current and self.owner is not None:
            self._count += 1
            return True
        if world.over:
            return True
        world.pause()
        until_s = world.now_s + timeout
        while self.owner is not None:
            if not blocking or (timeout >= 0 and world.now_s >= until_s):
                return False
            world.wait(self._waiting, until_s - world.now_s if timeout >= 0 else None)
        self.owner, self._count = world.current, 1
        return True

    def release(self) -> None:
        if self._world.over:
            return
        if self.owner is not self._world.current:
            raise RuntimeError("cannot release un-acquired lock")
        self._count -= 1
        if not self._count:
            self.owner = None
            self._world.wake(self._waiting, 1)

    def give_up(self) -> int:
        """Release the lock completely before a wait. Returns the number of acquisitions, for `take_again`."""
        count, self._count, self.owner = self._count, 0, None
        self._world.wake(self._waiting, 1)
        return count

    def take_again(self, count: int) -> None:
        """Acquire the lock again after a wait, with the count that `give_up` returned."""
        while self.owner is not None:
            self._world.wait(self._waiting)
        self.owner, self._count = self._world.current, count

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition:
    """As `threading.Condition`."""

    def __init__(self, world: World, lock: RLock | None = None) -> None:
        self._world = world
        self._lock = lock or RLock(world)
        self._waiting: list[Task] = []
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        if self._world.over:
            raise Killed
        if self._lock.owner is not self._world.current:
            raise RuntimeError("cannot wait on un-acquired lock")
        count = self._lock.give_up()
        was_woken = self._world.wait(self._waiting, timeout)
        self._lock.take_again(count)
        return was_woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        until_s = None if timeout is None else self._world.now_s + timeout
        while not (result := predicate()):
            left_s = None if until_s is None else until_s - self._world.now_s
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
        return result

    def notify(self, n: int = 1) -> None:
        if not self._world.over:
            self._world.wake(self._waiting, n)

    def notify_all(self) -> None:
        if not self._world.over:
            self._world.wake(self._waiting)


class Event:
    """As `threading.Event`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._is_set = False
        self._waiting: list[Task] = []

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        if not self._world.over:
            self._world.wake(self._waiting)

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        self._world.pause()
        if not self._is_set:
            self._world.wait(self._waiting, timeout)
        return self._is_set


class Semaphore:
    """As `threading.Semaphore`."""

    def __init__(self, world: World, value: int = 1) -> None:
        self._world = world
        self._value = value
        self._waiting: list[Task] = []

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        self._world.pause()
        if self._value == 0 and blocking:
            until_s = None if timeout is None else self._world.now_s + timeout
            while self._value == 0 and (until_s is None or until_s > self._world.now_s):
                self._world.wait(self._waiting, None if until_s is None else until_s - self._world.now_s)
        if self._value == 0:
            return False
        self._value -= 1
        return True

    def release(self, n: int = 1) -> None:
        self._value += n
        if not self._world.over:
            self._world.wake(self._waiting, n)


class SimpleQueue:
    """As `queue.SimpleQueue`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._items: deque[Any] = deque()
        self._waiting: list[Task] = []

    def put(self, item: Any) -> None:
        if self._world.over:
            return
        self._world.pause()
        self._items.append(item)
        self._world.wake(self._waiting, 1)

    def get(self) -> Any:
        self._world.pause()
        while not self._items:
            self._world.wait(self._waiting)
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._world.over:
            self._world.pause()
        if not self._items:
            raise queue.Empty
        return self._items.popleft()


class Thread:
    """As `threading.Thread`: a task of the process of the task that starts it."""

    def __init__(
        self,
        world: World,
        group: None = None,
        target: Callable[..., object] = lambda: None,
        name: str = "thread",
        args: Iterable[Any] = (),
        *,
        daemon: bool | None = None,
    ) -> None:
        self._world = world
        self._run = lambda: target(*args)
        self.name = name
        self.daemon = daemon
        self.ident: str | None = None
        self._task: Task | None = None
        self._number = world.number()

    def __hash__(self) -> int:
        return self._number

    def start(self) -> None:
        assert self._world.current is not None
        self._world.pause()
        self._task = self._world.spawn(self._world.current.process, self.name, self._run)
        self._task.thread = self
        self.ident = self._task.name
        del self._run

    def is_alive(self) -> bool:
        return self._task is not None and not self._world.over and self._task.state.value not in ("ended", "lost")

    def join(self, timeout: float | None = None) -> None:
        if self._world.over:
            return
        self._world.pause()
        if self.is_alive() and self._task is not None:
            self._world.wait(self._task.ended, timeout)


def _made(real: Callable[..., Any], simulated: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that makes a simulated object in a simulation, else a real one."""

    def make(*arguments: Any, **options: Any) -> Any:
        world = world_here()
        return real(*arguments, **options) if world is None else simulated(world, *arguments, **options)

    return make


def _current_thread() -> Any:
    world = world_here()
    if world is None:
        return threading.current_thread()
    assert world.current is not None
    return world.current.thread or world.current


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(f"simulated_{name}")
    vars(module).update(content)
    return module


def _sleep(seconds: float) -> None:
    world = world_here()
    if world is None:
        time.sleep(seconds)
    else:
        world.sleep(seconds)


def _monotonic() -> float:
    world = world_here()
    return time.monotonic() if world is None else world.now_s


def _wall() -> float:
    world = world_here()
    return time.time() if world is None else 1_700_000_000 + world.now_s + world.wall_offset_s


def _randbits(bits: int) -> int:
    world = world_here()
    return secrets.randbits(bits) if world is None else world.random.getrandbits(bits)


def _token_hex(nbytes: int = 32) -> str:
    return f"{_randbits(8 * nbytes):0{2 * nbytes}x}"


THREADING = _module(
    "threading",
    Lock=_made(threading.Lock, Lock),
    RLock=_made(threading.RLock, RLock),
    Condition=_made(threading.Condition, Condition),
    Event=_made(threading.Event, Event),
    Semaphore=_made(threading.Semaphore, Semaphore),
    Thread=_made(threading.Thread, Thread),
    current_thread=_current_thread,
    get_ident=threading.get_ident,
    get_native_id=threading.get_native_id,
    local=threading.local,
    enumerate=threading.enumerate,
)
TIME = _module(
    "time",
    monotonic=_monotonic,
    monotonic_ns=lambda: int(_monotonic() * 1e9),
    perf_counter=_monotonic,
    time=_wall,
    time_ns=lambda: int(_wall() * 1e9),
    sleep=_sleep,
)
QUEUE = _module("queue", SimpleQueue=_made(queue.SimpleQueue, SimpleQueue), Empty=queue.Empty)
SECRETS = _module("secrets", randbits=_randbits, token_hex=_token_hex)
