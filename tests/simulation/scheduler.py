"""The scheduler of a simulation: tasks that run one at a time, in an order that only a seed decides, on a clock of their own.

Each task is the code of one simulated thread. At every switch point (`World.pause`) the clock moves on a little, a planned crash may
happen, and another task may run next. A task that waits does not run until it is woken or its time is over. If every task waits, the
clock jumps to the next timer. So nothing depends on the machine, on its load or on real time.

A crash of a process ends its tasks where they are, as `kill -9` does: they never run again, so that no `finally` of theirs
runs. Only when the simulation is over are they unwound, and then every simulated lock, file and socket refuses to work.
"""

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from hashlib import blake2b
from random import Random
from typing import Any

from tests.simulation.carriers import Carriers

STEPS_MAX = 300_000
"""Limit: a simulation with more switch points than this does not end by itself."""


class Killed(BaseException):
    """Raised in a task once the simulation is over, so that its stack is unwound."""


class SimulationError(Exception):
    """A failure of the simulated system. `kind` is the same for failures that have the same cause."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class State(Enum):
    """What a task does."""

    RUNNING = "running"  # at most one task
    READY = "ready"  # waits for its turn
    WAITING = "waiting"
    FROZEN = "frozen"  # ready, but its process is stopped
    ENDED = "ended"
    LOST = "lost"  # its process crashed


class Process:
    """A simulated process: its tasks live and end together. `on_crash` closes what the kernel would close."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.is_alive = True
        self.is_stopped = False
        self.tasks: dict[Task, None] = {}
        self.steps = 0
        self.crash_at_step: int | None = None
        self.pause_share = 0.0
        """The share of its switch points at which a slow process sleeps, for up to `pause_s_max`."""
        self.pause_s_max = 0.0
        self.interrupted_s = 0.0
        """For how long faults have interrupted its tasks so far: calls may take so much longer."""
        self.on_crash: list[Callable[[], None]] = []
        world.processes.append(self)

    def stop(self) -> None:
        """Let no task of this process run until `go_on`, as SIGSTOP does."""
        self.is_stopped = True
        for task in [task for task in self.world.ready if task.process is self]:
            self.world.ready.remove(task)
            task.state = State.FROZEN

    def go_on(self) -> None:
        """Let its tasks run again, as SIGCONT does."""
        self.is_stopped = False
        for task in self.tasks:
            if task.state is State.FROZEN and self.is_alive:
                task.state = State.READY
                self.world.ready.append(task)

    def crash(self) -> None:
        """End the process now, as `kill -9` does. If the calling task belongs to it, this never returns."""
        if not self.is_alive:
            return
        world = self.world
        self.is_alive = False
        world.note(f"{self.name} crashes after {self.steps} steps")
        for task in self.tasks:
            if task.state is not State.ENDED:
                if task.state is State.READY:
                    world.ready.remove(task)
                task.leave_queue()
                task.state = State.LOST
        with world.atomic():
            for undo in self.on_crash:
                undo()
        if world.current is not None and world.current.process is self:
            world.leave_for_ever()


class Task:
    """One simulated thread."""

    def __init__(self, world: "World", process: Process, name: str, run: Callable[[], Any]) -> None:
        self.world = world
        self.process = process
        self.name = name
        self.run = run
        self.state = State.READY
        self.carrier: Any = None
        self.queue: list[Task] | None = None
        self.timer = 0
        self.was_woken = False
        self.ended: list[Task] = []
        """Tasks that wait for this one to end."""
        self.thread: Any = None
        """The simulated `threading.Thread`, if there is one."""

    def leave_queue(self) -> None:
        """Take the task out of the queue in which it waits."""
        if self.queue is not None:
            self.queue.remove(self)
            self.queue = None
        self.timer += 1


class World:
    """One simulation: its clock, its tasks, and the random numbers that decide everything."""

    active: "World | None" = None

    def __init__(self, seed: int, switch_share: float, step_s: float, carriers: Carriers) -> None:
        self._carriers = carriers
        self.random = Random(seed)
        self.now_s = 1000.0
        self.wall_offset_s = 0.0
        self.steps = 0
        self.processes: list[Process] = []
        self.reached: dict[str, Callable[[str], None]] = {}
        """By name of a place in the code: what to call when a task of the process that is passed is there."""
        self.ready: list[Task] = []
        self.current: Task | None = None
        self.over = False
        self.failure: BaseException | None = None
        self.log: list[str] = []
        self._switch_share = switch_share
        self._step_s = step_s
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_number = 0
        self._tasks: list[Task] = []
        self._atomic = 0
        self._numbers = 0
        self._hash = blake2b(digest_size=16)
        self._names: dict[str, int] = {}

    # What happened

    def note(self, text: str) -> None:
        """Write a line into the history."""
        line = f"{self.now_s - 1000:9.4f} s  {text}"
        self.log.append(line)
        self._hash.update(line.encode())

    def number(self) -> int:
        """Returns the next whole number, for use as an object's hash, so that sets have the same order in every run."""
        self._numbers += 1
        return self._numbers

    def digest(self) -> str:
        """Returns the hash of the history so far: of each line of it, and of each change from one task to another."""
        return self._hash.hexdigest()

    def fail(self, failure: BaseException) -> None:
        """Record the first failure. The simulation is over."""
        if self.failure is None and not self.over:
            self.failure = failure
        self.over = True

    # Tasks

    def spawn(self, process: Process, name: str, run: Callable[[], Any]) -> Task:
        """Add a task to a process. It starts when it is first its turn."""
        number = self._names[name] = self._names.get(name, 0) + 1
        task = Task(self, process, f"{process.name}/{name}.{number}", run)
        if not process.is_alive:
            task.state = State.LOST
            return task
        self._tasks.append(task)
        process.tasks[task] = None
        self._make_ready(task)
        return task

    def _make_ready(self, task: Task) -> None:
        if not task.process.is_alive:
            return
        if task.process.is_stopped:
            task.state = State.FROZEN
        else:
            task.state = State.READY
            self.ready.append(task)

    def is_here(self) -> bool:
        """Whether the calling thread runs the current task."""
        return self.current is not None and self._carriers.is_here()

    # Switch points

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """A context without switch points, for the checks of the simulation itself. Nothing in it may wait."""
        self._atomic += 1
        try:
            yield
        finally:
            self._atomic -= 1

    def pause(self, share: float | None = None) -> None:
        """A switch point of the current task. `share`: how often another task is next (default: the world's)."""
        if self._atomic:
            return
        if self.over:
            raise Killed
        task = self.current
        assert task is not None
        self._count(task)
        if self.random.random() < (self._switch_share if share is None else share):
            process = task.process
            if process.pause_share and self.random.random() < process.pause_share:
                self.sleep(self.random.random() * process.pause_s_max)
            elif self.ready:
                self._make_ready(task)
                self._pass_on()

    def reach(self, place: str) -> None:
        """Note that the current task is at a place of this name in the code."""
        call = self.reached.get(place)
        if call is not None and self.current is not None:
            call(self.current.process.name)

    def _count(self, task: Task) -> None:
        self.steps += 1
        self.now_s += self._step_s
        if self._timers and self._timers[0][0] <= self.now_s:
            self._fire()
        if self.steps > STEPS_MAX:
            self.fail(SimulationError("endless", f"more than {STEPS_MAX} switch points"))
            raise Killed
        process = task.process
        process.steps += 1
        if process.crash_at_step is not None and process.steps >= process.crash_at_step:
            process.crash_at_step = None
            process.crash()

    def sleep(self, seconds: float) -> None:
        """Let the current task wait for simulated time."""
        self.wait([], seconds)

    def wait(self, queue: list[Task], timeout_s: float | None = None) -> bool:
        """Let the current task wait in `queue` until it is woken. Returns False if `timeout_s` passed before."""
        if self.over:
            raise Killed
        assert not self._atomic, "the checks of the simulation must not wait"
        task = self.current
        assert task is not None
        queue.append(task)
        task.queue = queue
        task.state = State.WAITING
        task.was_woken = False
        task.timer += 1
        if timeout_s is not None:
            timer = task.timer
            self.after(timeout_s, lambda: self._time_out(task, timer))
        self._pass_on()
        return task.was_woken

    def _time_out(self, task: Task, timer: int) -> None:
        if task.timer == timer and task.state is State.WAITING:
            task.leave_queue()
            self._make_ready(task)

    def wake(self, queue: list[Task], count: int | None = None) -> None:
        """Wake the tasks that wait in a queue, or `count` of them, chosen at random."""
        while queue and count != 0:
            task = queue[self.random.randrange(len(queue)) if len(queue) > 1 else 0]
            task.leave_queue()
            task.was_woken = True
            if task.state is State.WAITING:
                self._make_ready(task)
            if count is not None:
                count -= 1

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function, which must not wait, when this time has passed."""
        self._timer_number += 1
        heapq.heappush(self._timers, (self.now_s + max(seconds, 0.0), self._timer_number, call))

    def _fire(self) -> None:
        while self._timers and self._timers[0][0] <= self.now_s:
            heapq.heappop(self._timers)[2]()

    # Turns

    def _pass_on(self) -> None:
        """Let a ready task run. Returns when it is the current one's turn again."""
        task = self.current
        assert task is not None
        successor = self._next()
        if successor is None:
            raise Killed
        if successor is not task:
            self._become(successor)
            self._carriers.switch(task, successor)
        if self.over:
            raise Killed

    def leave_for_ever(self) -> None:
        """Let others run and never return: the process of the current task has crashed."""
        self._pass_on()

    def _next(self) -> Task | None:
        """Choose a ready task. Returns None, and the simulation is over, if every task waits for ever."""
        while not self.ready:
            if not self._timers:
                waiting = [task.name for task in self._tasks if task.state is State.WAITING]
                self.fail(SimulationError("deadlock", f"every task waits for ever: {waiting}"))
                return None
            self.now_s = max(self.now_s, self._timers[0][0])
            self._fire()
        at = self.random.randrange(len(self.ready)) if len(self.ready) > 1 else 0
        task = self.ready[at]
        self.ready[at] = self.ready[-1]
        self.ready.pop()
        task.state = State.RUNNING
        return task

    def _become(self, task: Task) -> None:
        self.current = task
        self._hash.update(task.name.encode())

    def carry(self, task: Task) -> Task | None:
        """Run a task to its end, on its carrier. Returns the task that is next, None at the end of the simulation."""
        try:
            if not self.over:
                task.run()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - no thread of the project may end with an error
            self.fail(error)
        task.run = lambda: None
        task.carrier = None
        task.state = State.ENDED
        task.process.tasks.pop(task, None)
        successor = None
        if not self.over:
            self._tasks.remove(task)
            self.wake(task.ended)
            successor = self._next()
        if successor is None:
            successor = self._next_to_unwind()
        else:
            self._become(successor)
        return successor

    def _forget(self) -> None:
        """Drop the references to all tasks and processes, so that they can be freed."""
        self._timers.clear()
        self.ready.clear()
        self.reached.clear()
        for process in self.processes:
            process.on_crash.clear()
            process.tasks.clear()

    def _next_to_unwind(self) -> Task | None:
        """Returns the next task whose stack must be unwound (begun, not ended), now that the simulation is over."""
        while self._tasks:
            task = self._tasks.pop()
            if task.carrier is not None:
                self.current = task
                return task
        self.current = None
        return None

    # The whole simulation

    def run(self, director: Callable[[], None]) -> None:
        """Run a simulation: `director` is its first task, and it is over when that ends. Raises its first failure."""

        def direct() -> None:
            try:
                director()
            except Exception as error:  # noqa: BLE001 - whatever invariant was broken
                self.fail(error)
            finally:
                self.over = True

        task = self.spawn(Process(self, "director"), "main", direct)
        self.ready.remove(task)
        task.state = State.RUNNING
        self.current = task
        World.active = self
        try:
            self._carriers.begin(self, task)
        finally:
            World.active = None
            self._forget()
        if self.failure is not None:
            raise self.failure
