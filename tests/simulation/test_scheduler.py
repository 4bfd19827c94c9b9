"""Tests of the scheduler: simulated locks, conditions and threads work as the real ones, and a crash runs no `finally`."""

from collections.abc import Callable

import pytest

from tests.simulation.carriers import Carriers, Threads, carriers
from tests.simulation.primitives import QUEUE, THREADING, TIME
from tests.simulation.scheduler import Process, SimulationError, World


@pytest.fixture(params=[Threads, carriers], ids=["threads", "default"])
def run(request) -> Callable[[Callable[[World], None]], World]:
    """Returns a function that runs a director in a new world, and returns the world."""

    def go(director: Callable[[World], None]) -> World:
        on: Carriers = request.param()
        world = World(7, 0.5, 1e-6, on)
        world.run(lambda: director(world))
        return world

    return go


def test_a_lock_excludes_and_its_timeout_is_kept(run) -> None:
    inside: list[str] = []

    def director(world: World) -> None:
        lock = THREADING.Lock()

        def work(name: str) -> None:
            for _ in range(20):
                with lock:
                    inside.append(name)
                    TIME.sleep(0.01)
                    assert inside.pop() == name
                    assert not inside

        threads = [THREADING.Thread(target=work, args=[name]) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lock.acquire()
        begun_s = TIME.monotonic()
        assert not lock.acquire(timeout=5.0)
        assert TIME.monotonic() - begun_s == pytest.approx(5.0, abs=0.01)
        assert not lock.acquire(blocking=False)

    run(director)


def test_a_condition_wakes_whoever_waits_and_gives_its_lock_back(run) -> None:
    def director(world: World) -> None:
        ready, items = THREADING.Condition(), []

        def produce() -> None:
            for item in range(5):
                TIME.sleep(1.0)
                with ready:
                    items.append(item)
                    ready.notify_all()

        THREADING.Thread(target=produce).start()
        with ready:
            assert ready.wait_for(lambda: len(items) == 5, timeout=60)
            assert not ready.wait(timeout=3.0)
        assert TIME.monotonic() == pytest.approx(1008.0, abs=0.1)

    run(director)


def test_a_queue_hands_over_each_item_once(run) -> None:
    def director(world: World) -> None:
        jobs, done = QUEUE.SimpleQueue(), []

        def consume() -> None:
            while (job := jobs.get()) is not None:
                done.append(job)

        threads = [THREADING.Thread(target=consume) for _ in range(3)]
        for thread in threads:
            thread.start()
        for job in [*range(30), None, None, None]:
            jobs.put(job)
        for thread in threads:
            thread.join()
        assert sorted(done) == list(range(30))
        with pytest.raises(QUEUE.Empty):
            jobs.get_nowait()

    run(director)


def test_a_crash_ends_a_process_where_it_is(run) -> None:
    ran: list[str] = []

    def director(world: World) -> None:
        process = Process(world, "victim")
        lock = THREADING.Lock()

        def work() -> None:
            try:
                with lock:
                    while True:
                        world.pause()
            finally:
                ran.append("over" if world.over else "finally")

        world.spawn(process, "work", work)
        process.on_crash.append(lambda: ran.append("kernel"))
        process.crash_at_step = 50
        world.sleep(1.0)
        assert not process.is_alive
        assert lock.locked()
        assert process.steps == 50
        assert ran == ["kernel"]

    run(director)
    assert ran == ["kernel", "over"]


def test_a_stopped_process_misses_its_timers_until_it_goes_on(run) -> None:
    def director(world: World) -> None:
        process, at_s = Process(world, "stopped"), []

        def tick() -> None:
            while True:
                world.sleep(1.0)
                at_s.append(int(world.now_s - 1000))

        world.spawn(process, "tick", tick)
        world.sleep(2.5)
        process.stop()
        world.sleep(5.0)
        process.go_on()
        world.sleep(1.5)
        assert at_s == [1, 2, 7, 8]

    run(director)


def test_tasks_that_wait_for_each_other_are_a_failure(run) -> None:
    def director(world: World) -> None:
        first, second = THREADING.Lock(), THREADING.Lock()

        def work() -> None:
            with second:
                TIME.sleep(1.0)
                first.acquire()

        with first:
            THREADING.Thread(target=work, name="other").start()
            TIME.sleep(0.5)
            second.acquire()

    with pytest.raises(SimulationError, match="waits for ever") as raised:
        run(director)
    assert raised.value.kind == "deadlock"
    assert "other" in str(raised.value)


def test_an_error_that_ends_a_thread_is_a_failure(run) -> None:
    def director(world: World) -> None:
        THREADING.Thread(target=lambda: 1 / 0).start()
        TIME.sleep(1.0)
        pytest.fail("the simulation is over by now")

    with pytest.raises(ZeroDivisionError):
        run(director)


def test_outside_of_a_simulation_the_real_modules_answer() -> None:
    lock = THREADING.Lock()
    with lock:
        assert not lock.acquire(timeout=0.001)
    assert abs(TIME.monotonic() - __import__("time").monotonic()) < 1.0
