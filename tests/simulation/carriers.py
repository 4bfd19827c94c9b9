"""Runs the tasks of a simulation one at a time: on greenlets, or on threads if the package greenlet is not installed.

Both give the same histories. A change between greenlets costs less than 1 µs, one between threads 20 µs, and several times that
on a busy machine. Tasks on greenlets share thread-local data, such as the codecs' buffers. That is harmless, because no other
task runs while a codec works.
"""

import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tests.simulation.scheduler import Task, World


class Carriers(Protocol):
    """Runs tasks. `World.carry` runs a task to its end and returns the one that is next."""

    def begin(self, world: "World", first: "Task") -> None:
        """Run the task `first` and then each next task, until there is none."""

    def switch(self, task: "Task", successor: "Task") -> None:
        """Run `successor`. Returns when `task`, the calling one, is next again."""

    def is_here(self) -> bool:
        """Whether the calling thread runs the current task."""


class Greenlets:
    """Runs all tasks on the thread that calls `begin`."""

    def __init__(self) -> None:
        import greenlet

        self._greenlet: Any = greenlet.greenlet
        self._current: Any = greenlet.getcurrent
        self._thread = 0

    def begin(self, world: "World", first: "Task") -> None:
        self._world = world
        self._thread = threading.get_ident()
        self._main = self._current()
        self._of(first).switch()

    def switch(self, task: "Task", successor: "Task") -> None:
        self._of(successor).switch()

    def is_here(self) -> bool:
        return threading.get_ident() == self._thread

    def _of(self, task: "Task") -> Any:
        if task.carrier is None:
            task.carrier = self._greenlet(lambda *_: self._run(task), self._main)
        return task.carrier

    def _run(self, task: "Task") -> None:
        successor = self._world.carry(task)
        # A greenlet that ends is followed by its parent.
        self._current().parent = self._main if successor is None else self._of(successor)


class _Thread:
    """A thread that runs one task after another. Starting a new thread for each would cost 0.1 ms."""

    idle: list["_Thread"] = []

    def __init__(self) -> None:
        self.baton = threading.Lock()
        self.baton.acquire()
        self.task: Task | None = None
        self.carriers: Threads | None = None
        self._thread = threading.Thread(target=self._run, name="sim-carrier", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.baton.acquire()
            (task, self.task), (carriers, self.carriers) = (self.task, None), (self.carriers, None)
            assert task is not None
            assert carriers is not None
            successor = carriers.world.carry(task)
            self.idle.append(self)  # before the next task runs, so that no two threads change the list at the same time
            following = carriers.finished if successor is None else carriers.baton_of(successor)
            del task, carriers, successor
            following.release()


class Threads:
    """Runs each task on a thread. Each thread waits for a lock, its baton, which is released when its task may run."""

    def begin(self, world: "World", first: "Task") -> None:
        self.world = world
        self.finished = threading.Lock()
        self.finished.acquire()
        self.baton_of(first).release()
        self.finished.acquire()

    def switch(self, task: "Task", successor: "Task") -> None:
        own = task.carrier.baton
        self.baton_of(successor).release()
        own.acquire()

    def is_here(self) -> bool:
        task = self.world.current
        return task is not None and task.carrier is not None and task.carrier._thread.ident == threading.get_ident()

    def baton_of(self, task: "Task") -> threading.Lock:
        """Returns the lock whose release lets a task run."""
        if task.carrier is None:
            task.carrier = _Thread.idle.pop() if _Thread.idle else _Thread()
            task.carrier.task, task.carrier.carriers = task, self
        baton: threading.Lock = task.carrier.baton
        return baton


def carriers() -> Carriers:
    """Returns greenlets if they are installed, else threads."""
    return Greenlets() if find_spec("greenlet") else Threads()
