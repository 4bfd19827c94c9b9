"""Daemon threads for work that may hang, such as reading a disk: neither `close` nor the interpreter's exit waits for them for ever.

`concurrent.futures.ThreadPoolExecutor` joins its threads at the interpreter's exit, so that one read of a dead network disk keeps the
process for ever. After `fork` its threads exist in the parent only, and whoever submits in the child waits for ever.
"""

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import suppress
from typing import Any, NamedTuple

from tiered_kv import forking
from tiered_kv.errors import Kind, TieredKVError

EXIT_WAIT_S = 0.1
"""How long the interpreter's exit waits for all threads together: enough for what computes, not for what hangs."""


class _Job(NamedTuple):
    """A call, and the future that gets its outcome."""

    future: Future
    call: Callable[..., Any]
    arguments: tuple
    options: dict[str, Any]

    def run(self) -> None:
        """Boundary of the thread: whatever the call raises goes to whoever asks for the outcome."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            outcome = self.call(*self.arguments, **self.options)
        except BaseException as error:  # noqa: BLE001 - see BOUNDARIES
            self.future.set_exception(error)
        else:
            self.future.set_result(outcome)


class _Crew:
    """The threads of one pool and the jobs that wait for them; knows nothing of the pool, so that an unused pool can be freed."""

    def __init__(self, size: int, name: str, initializer: Callable[[], None] | None) -> None:
        self._size = size
        self._name = name
        self._initializer = initializer
        self._is_closed = False
        self._begin()
        forking.register(self)

    def after_fork(self) -> None:
        """In a child process none of the threads exists, any of them may have held the lock, and the jobs are the parent's."""
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []

    def add(self, job: _Job) -> None:
        """Queue a job, with one more thread if all are busy. Raises (kind `closed`) after `dismiss`.

        Where no thread can be started any more, as at the interpreter's exit, the caller runs the job.
        """
        with self._lock:
            if self._is_closed:
                raise TieredKVError(Kind.CLOSED, "the threads that would do this have been stopped")
            self._jobs.put(job)
            if self._idle.acquire(blocking=False) or len(self.threads) == self._size:
                return
            thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self.threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread can be had, or the interpreter is ending
                if self.threads:
                    return
            else:
                self.threads.append(thread)
                return
        self._run_queued()

    def _work(self) -> None:
        if self._initializer is not None:
            self._initializer()
        jobs, idle = self._jobs, self._idle  # of the process that this thread belongs to
        while True:
            try:
                job = jobs.get_nowait()
            except queue.Empty:
                idle.release()
                job = jobs.get()
            if job is None:
                return
            job.run()
            del job  # else its arguments live until the next one

    def _run_queued(self) -> None:
        with suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not None:
                job.run()

    def cancel(self) -> None:
        """Cancel the jobs that no thread has begun."""
        with self._lock, suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.future.cancel()
                    job.future.set_running_or_notify_cancel()

    def dismiss(self) -> None:
        """Take no more jobs, and have each thread end once those in the queue are done."""
        with self._lock:
            self._is_closed = True
            for _ in self.threads:
                self._jobs.put(None)

    def join(self, deadline_s: float | None) -> bool:
        """Wait for the threads to end, until `deadline_s` of the monotonic clock. Returns whether all have."""
        for thread in list(self.threads):
            if thread is not threading.current_thread():
                thread.join(None if deadline_s is None else max(deadline_s - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self.threads)


class DaemonThreads(Executor):
    """At most `size` daemon threads that run calls in the order submitted; each starts when it is first needed.

    `name` begins the threads' names. `initializer` runs first on each thread. In a child process the pool is empty and usable:
    its calls start new threads there. Futures of the parent never end in the child.
    """

    def __init__(self, size: int, name: str, initializer: Callable[[], None] | None = None) -> None:
        if size < 1:
            raise ValueError("a pool needs at least one thread")
        self._crew = _Crew(size, name, initializer)
        _crews.add(self._crew)
        weakref.finalize(self, self._crew.dismiss).atexit = False

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future:
        """Have `call(*arguments, **options)` run; its outcome is the future's. Raises (kind `closed`) after `shutdown` or `stop`."""
        future: Future = Future()
        self._crew.add(_Job(future, call, arguments, options))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; those queued still run unless `cancel_futures`. With `wait`, returns when all threads have ended."""
        if cancel_futures:
            self._crew.cancel()
        self._crew.dismiss()
        if wait:
            self._crew.join(None)

    def stop(self, within_s: float) -> bool:
        """Take no more calls, cancel those queued, and wait at most `within_s` for those that run. Returns whether all have ended."""
        self.shutdown(wait=False, cancel_futures=True)
        return self._crew.join(time.monotonic() + within_s)


class Closer:
    """A thread, started at once, for closing what may hang: whoever closes waits a bounded time, and the thread goes on alone.

    It is there before it is needed because no thread can be started any more while the interpreter ends.
    """

    def __init__(self) -> None:
        self._thread = DaemonThreads(1, "tkv-close")
        self._thread.submit(lambda: None)

    def run(self, close: Callable[[], None], within_s: float) -> bool:
        """Run `close` on the thread. Returns whether it ended within `within_s`; raises what it raised. To be called once."""
        closing = self._thread.submit(close)
        self._thread.shutdown(wait=False)
        try:
            closing.result(within_s)
        except TimeoutError:
            if not closing.done():
                return False
            closing.result()  # it ended just now, or with this error
        self._thread.shutdown()  # the thread has nothing left to do
        return True


_crews: "weakref.WeakSet[_Crew]" = weakref.WeakSet()


def _leave_at_exit(crews: Iterable[_Crew]) -> None:
    """Give the threads a moment to end, so that none computes in libraries that are being unloaded; those that hang are left."""
    deadline_s = time.monotonic() + EXIT_WAIT_S
    crews = list(crews)
    for crew in crews:
        crew.cancel()
        crew.dismiss()
    for crew in crews:
        crew.join(deadline_s)


atexit.register(_leave_at_exit, _crews)


def work_alone() -> None:
    """Have torch use this thread alone for what it computes here: blocks are coded side by side, and threads that wait for each
    other in pieces of a millisecond cost several times what they give.

    torch keeps the number of threads for each thread, and one more number for threads to come, which is put back.
    """
    import torch

    others = torch.get_num_threads()
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=[others])
    restoring.start()
    restoring.join()
