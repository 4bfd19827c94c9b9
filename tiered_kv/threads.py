"""Daemon threads for work that may hang, such as reading a disk. Neither `close` nor the interpreter's exit waits for them forever.

`concurrent.futures.ThreadPoolExecutor` joins its threads at the interpreter's exit, so one read of a dead network disk would keep the
process alive forever. After `fork` its threads exist in the parent only, and calls submitted in the child never run.
"""

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple, ParamSpec, TypeVar

from tiered_kv import forking
from tiered_kv.errors import Kind, TieredKVError

P = ParamSpec("P")
R = TypeVar("R")

EXIT_WAIT_S = 0.1
"""The interpreter's exit waits this long for all threads together: long enough for computations, not for threads that hang."""


class _Job(NamedTuple):
    """A call, and the future that gets its outcome."""

    future: Future[Any]
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self) -> None:
        """Run the call. Boundary of the thread: any exception of the call is set on the future."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            outcome = self.call(*self.arguments, **self.options)
        except BaseException as error:  # noqa: BLE001 - see BOUNDARIES
            self.future.set_exception(error)
        else:
            self.future.set_result(outcome)


class _Crew:
    """The threads and queued jobs of one pool. It has no reference to the pool, so that an unused pool can be freed."""

    def __init__(self, size: int, name: str, initializer: Callable[[], None] | None) -> None:
        self._size = size
        self._name = name
        self._initializer = initializer
        self._is_closed = False
        self._begin()
        forking.register(self)

    def after_fork(self) -> None:
        """Reset in a child process: the threads do not exist there, one may have held the lock, and the jobs belong to the parent."""
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []

    def add(self, job: _Job) -> None:
        """Queue a job, and start another thread if all are busy. Raises (kind `closed`) after `dismiss`.

        If no thread can be started, as at the interpreter's exit, the caller runs the job.
        """
        with self._lock:
            if self._is_closed:
                raise TieredKVError(Kind.CLOSED, f"the pool of threads {self._name} was stopped")
            self._jobs.put(job)
            if self._idle.acquire(blocking=False) or len(self.threads) == self._size:
                return
            thread = threading.Thread(target=self._work, name=f"{self._name}_{len(self.threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the process has too many threads, or the interpreter is ending
                if self.threads:
                    return
            else:
                self.threads.append(thread)
                return
        self._run_queued()

    def _work(self) -> None:
        if self._initializer is not None:
            self._initializer()
        jobs, idle = self._jobs, self._idle  # those of this process; a child process gets others
        while True:
            try:
                job = jobs.get_nowait()
            except queue.Empty:
                idle.release()
                job = jobs.get()
            if job is None:
                return
            job.run()
            del job  # else its arguments stay in memory until the next job

    def _run_queued(self) -> None:
        with suppress(queue.Empty):
            while (job := self._jobs.get_nowait()) is not None:
                job.run()

    def cancel(self) -> None:
        """Cancel the jobs that no thread has started."""
        with self._lock, suppress(queue.Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    job.future.cancel()
                    job.future.set_running_or_notify_cancel()

    def dismiss(self) -> None:
        """Accept no more jobs. Each thread ends once the queue is empty."""
        with self._lock:
            self._is_closed = True
            for _ in self.threads:
                self._jobs.put(None)

    def join(self, deadline_s: float | None) -> bool:
        """Wait for the threads to end, until `deadline_s` on the monotonic clock. Returns whether all have ended."""
        for thread in list(self.threads):
            if thread is not threading.current_thread():
                thread.join(None if deadline_s is None else max(deadline_s - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self.threads)


class DaemonThreads(Executor):
    """A pool of at most `size` daemon threads. They run calls in the order of submission, and each starts when first needed.

    `name`: prefix of the threads' names. `initializer` runs first on each thread. In a child process the pool is empty but usable:
    submitted calls start new threads there. Futures of the parent never complete in the child.
    """

    def __init__(self, size: int, name: str, initializer: Callable[[], None] | None = None) -> None:
        if size < 1:
            raise ValueError(f"size: must be at least 1 thread, got {size}")
        self._crew = _Crew(size, name, initializer)
        _crews.add(self._crew)
        self._finalizer = weakref.finalize(self, self._crew.dismiss)
        self._finalizer.atexit = False

    def submit(self, call: Callable[P, R], /, *arguments: P.args, **options: P.kwargs) -> Future[R]:
        """Queue `call(*arguments, **options)`. Returns the future of its outcome. Raises (kind `closed`) after `shutdown` or `stop`."""
        future: Future[R] = Future()
        self._crew.add(_Job(future, call, arguments, options))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls. Queued calls still run unless `cancel_futures`. With `wait`, returns when all threads have ended."""
        if cancel_futures:
            self._crew.cancel()
        self._crew.dismiss()
        self._finalizer.detach()  # it would keep what `initializer` refers to, which may refer to this pool
        if wait:
            self._crew.join(None)

    def stop(self, within_s: float) -> bool:
        """Accept no more calls, cancel queued ones, and wait at most `within_s` for running ones. Returns whether all have ended."""
        self.shutdown(wait=False, cancel_futures=True)
        return self._crew.join(time.monotonic() + within_s)


class Closer:
    """Runs a function that may hang, such as `close`, on a separate thread.

    The caller waits a limited time, then the thread continues alone.

    The thread starts at once, because no thread can be started while the interpreter ends.
    """

    def __init__(self) -> None:
        self._thread = DaemonThreads(1, "tkv-close")
        self._thread.submit(lambda: None)

    def run(self, close: Callable[[], None], within_s: float) -> bool:
        """Run `close` on the thread. Returns whether it ended within `within_s`. Raises the error of `close`, if any. Call it only once."""
        closing = self._thread.submit(close)
        self._thread.shutdown(wait=False)
        try:
            closing.result(within_s)
        except TimeoutError:
            if not closing.done():
                return False
            closing.result()  # it ended just now, or raised this TimeoutError itself
        self._thread.shutdown()  # joins the thread, which has no work left
        return True


_crews: "weakref.WeakSet[_Crew]" = weakref.WeakSet()


def _leave_at_exit(crews: Iterable[_Crew]) -> None:
    """Wait up to EXIT_WAIT_S for the threads to end, so that no thread computes while libraries are unloaded. Leave threads that hang."""
    deadline_s = time.monotonic() + EXIT_WAIT_S
    crews = list(crews)
    for crew in crews:
        crew.cancel()
        crew.dismiss()
    for crew in crews:
        crew.join(deadline_s)


atexit.register(_leave_at_exit, _crews)


def work_alone() -> None:
    """Make torch use only the calling thread for computations that this thread starts.

    Blocks are encoded and decoded in parallel, one on each thread. Several torch threads for one block would mostly wait for each other,
    which costs several times what they gain. torch keeps a number of threads for each thread, and a default for new threads. The call
    also changes this default, so another thread restores it.
    """
    import torch

    others = torch.get_num_threads()
    torch.set_num_threads(1)
    restoring = threading.Thread(target=torch.set_num_threads, args=[others])
    restoring.start()
    restoring.join()


class CheckedLock:
    """A context that holds `lock` while its body runs. Before the body, it calls `check`, which may raise."""

    __slots__ = ("_check", "_lock")

    def __init__(self, lock: AbstractContextManager[Any], check: Callable[[], None]) -> None:
        self._lock = lock
        self._check = check

    def __enter__(self) -> None:
        self._lock.__enter__()
        try:
            self._check()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise

    def __exit__(self, *_: object) -> None:
        self._lock.__exit__(None, None, None)
