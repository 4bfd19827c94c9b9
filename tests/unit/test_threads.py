"""The pool of daemon threads: as `ThreadPoolExecutor`, but nobody waits for what hangs, and it works in a forked child."""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from tests.forking import in_child
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.threads import Closer, DaemonThreads

PATIENCE_S = 30.0


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hangs in a test waits for this; it opens at the test's end."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def pool() -> Iterator[DaemonThreads]:
    threads = DaemonThreads(2, "tkv-test")
    yield threads
    threads.shutdown(wait=False, cancel_futures=True)


def test_calls_run_on_daemon_threads_and_give_their_outcome(pool: DaemonThreads) -> None:
    thread = pool.submit(threading.current_thread).result(PATIENCE_S)
    assert thread.daemon
    assert thread.name == "tkv-test_0"
    assert list(pool.map(abs, range(-50, 0))) == list(range(50, 0, -1))
    failed = pool.submit(int, "no number")
    assert isinstance(failed.exception(PATIENCE_S), ValueError)
    assert pool.submit(dict, [("a", 1)], b=2).result(PATIENCE_S) == {"a": 1, "b": 2}


def test_no_more_threads_than_asked_for_run_at_once(pool: DaemonThreads, gate: threading.Event) -> None:
    entered = threading.Semaphore(0)

    def hang() -> None:
        entered.release()
        gate.wait(PATIENCE_S)

    hanging = [pool.submit(hang) for _ in range(3)]
    assert entered.acquire(timeout=PATIENCE_S)
    assert entered.acquire(timeout=PATIENCE_S)
    assert not hanging[2].running()
    gate.set()
    for each in hanging:
        each.result(PATIENCE_S)


def test_each_thread_runs_the_initializer_first() -> None:
    local = threading.local()
    with DaemonThreads(1, "tkv-test", lambda: setattr(local, "ready", True)) as pool:
        assert pool.submit(lambda: local.ready).result(PATIENCE_S)


def test_stop_cancels_what_waits_and_does_not_wait_for_what_hangs(pool: DaemonThreads, gate: threading.Event) -> None:
    hanging = [pool.submit(gate.wait, PATIENCE_S) for _ in range(2)]
    waiting = pool.submit(abs, -1)
    begun_s = time.monotonic()
    assert not pool.stop(0.05)
    assert time.monotonic() - begun_s < 5.0
    assert waiting.cancelled()
    gate.set()
    assert all(each.result(PATIENCE_S) for each in hanging), "they still end, once they can"
    assert pool.stop(PATIENCE_S)


def test_a_pool_that_was_stopped_takes_no_more_calls(pool: DaemonThreads) -> None:
    pool.shutdown()
    with pytest.raises(TieredKVError) as caught:
        pool.submit(abs, 1)
    assert caught.value.kind is Kind.CLOSED


def test_shutdown_finishes_what_was_queued(pool: DaemonThreads) -> None:
    futures = [pool.submit(abs, -number) for number in range(100)]
    pool.shutdown()
    assert [future.result(0) for future in futures] == list(range(100))


def test_a_pool_that_nobody_holds_any_more_ends_its_threads() -> None:
    thread = DaemonThreads(1, "tkv-test").submit(threading.current_thread).result(PATIENCE_S)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_closer_waits_a_bounded_time_and_goes_on_alone(gate: threading.Event) -> None:
    ended = threading.Event()
    assert Closer().run(lambda: None, PATIENCE_S)
    assert not Closer().run(lambda: (gate.wait(PATIENCE_S), ended.set()), 0.05)
    gate.set()
    assert ended.wait(PATIENCE_S)
    with pytest.raises(TimeoutError, match="its own"):
        Closer().run(lambda: (_ for _ in ()).throw(TimeoutError("its own")), PATIENCE_S)


def test_a_forked_child_has_threads_of_its_own(pool: DaemonThreads, gate: threading.Event) -> None:
    """Also where those of the parent were busy, and its jobs queued: they are the parent's."""
    pool.submit(gate.wait, PATIENCE_S)
    pool.submit(gate.wait, PATIENCE_S)
    mine = pool.submit(os.getpid)
    assert in_child(lambda: pool.submit(os.getpid).result(PATIENCE_S)) != os.getpid()
    gate.set()
    assert mine.result(PATIENCE_S) == os.getpid()


HANGING = """
import threading
from tiered_kv.threads import DaemonThreads
pool = DaemonThreads(2, "tkv-test")
entered = threading.Event()
pool.submit(lambda: (entered.set(), threading.Event().wait()))
entered.wait()
print("ended")
"""


def test_the_interpreter_exits_while_a_call_hangs() -> None:
    ran = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert ran.stdout == "ended\n"
    assert not ran.stderr


def test_a_pool_that_was_shut_down_is_freed_although_its_initializer_refers_to_its_owner() -> None:
    """So is a node that has ended: its pools encode blocks with its own storage."""

    class Owner:
        def __init__(self) -> None:
            self.pool = DaemonThreads(1, "tkv-test", self.begin)

        def begin(self) -> None: ...

    owner = Owner()
    owner.pool.submit(int).result(PATIENCE_S)
    owner.pool.shutdown()
    freed = weakref.ref(owner)
    del owner
    gc.collect()
    assert freed() is None
