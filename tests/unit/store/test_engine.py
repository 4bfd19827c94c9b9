"""The engine carries out the machine's instructions. Its mover uses dictionaries, and a test can delay or fail each step."""

import threading

import pytest

from tests.unit.store.bench import NBYTES, PATIENCE_S, Bench
from tests.unit.store.world import key_of
from tiered_kv.blocks import Location, Tier
from tiered_kv.store import engine
from tiered_kv.store import events as ev
from tiered_kv.store.engine import FillOutcome

DEVICE, HOST, DISK, OBJECTS, CHECKPOINT = Tier


def in_thread(function, *arguments) -> tuple[threading.Thread, list]:
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(function(*arguments)))
    thread.start()
    return thread, answers


def test_a_store_waits_for_room_from_a_demotion(make) -> None:
    bench = make(DISK, slots=1)
    bench.mover.append_allowed[DISK].clear()
    bench.store(1)
    thread, stored = in_thread(bench.store, 2)
    assert bench.mover.entered.wait(PATIENCE_S)
    assert bench.tier(1) is HOST, "readable while it is being demoted"
    bench.mover.append_allowed[DISK].set()
    thread.join(PATIENCE_S)
    assert stored == [[True]]
    assert (bench.tier(1), bench.tier(2)) == (DISK, HOST)


def test_a_store_without_a_wait_is_refused_and_makes_room_for_the_next(make) -> None:
    bench = make(DISK, slots=1)
    bench.store(1)
    bench.mover.append_allowed[DISK].clear()
    assert bench.store(2, wait_s=0) == [False]
    bench.mover.append_allowed[DISK].set()
    bench.engine.settle()
    assert bench.store(2, wait_s=0) == [True]


def test_stores_that_wait_for_the_same_demotion_do_not_evict_for_each_other(make) -> None:
    bench = make(DISK, slots=4)
    bench.store(1, 2, 3, 4)
    bench.mover.append_allowed[DISK].clear()
    assert bench.store(5, 6, wait_s=0) == [False, False]
    bench.mover.append_allowed[DISK].set()
    bench.engine.settle()
    assert [bench.tier(number) for number in (1, 2, 3, 4)] == [DISK, HOST, HOST, HOST]


def test_other_blocks_are_evicted_if_the_disk_accepts_none(make) -> None:
    bench = make(DISK, slots=3)
    bench.store(1, 2, 3)
    bench.mover.append_allowed[DISK].clear()
    assert bench.store(4, 5, wait_s=0.01) == [True, True], "a disk that hangs refuses no store"
    assert [bench.tier(number) for number in (1, 2, 3)] == [HOST, None, None], "what is on its way may still arrive"
    assert bench.engine.machine.counts["dropped_under_pressure"] == 2


def test_a_promotion_drops_nothing_because_of_a_slow_disk(make) -> None:
    bench = make(DISK, OBJECTS, slots=2)
    bench.store(1)
    bench.engine.handle([ev.Needed(HOST, 1)])
    bench.engine.settle()
    bench.store(2, 3)
    bench.mover.append_allowed[DISK].clear()
    bench.index.touched = [key_of(1)]
    bench.engine.drain_touches()
    bench.engine.bring([key_of(1)], PATIENCE_S)
    bench.let_go()
    assert bench.engine.machine.counts["dropped_under_pressure"] == 0


def test_a_store_uses_room_freed_during_its_wait_without_evicting_more(make) -> None:
    bench = make(DISK, slots=4)
    bench.store(1, 2, 3, 4)
    bench.mover.append_allowed[DISK].clear()
    thread, offsets = in_thread(bench.engine.reserve, NBYTES, [key_of(5)], None, PATIENCE_S)
    assert bench.mover.entered.wait(PATIENCE_S)
    bench.let_go()
    thread.join(PATIENCE_S)
    bench.engine.settle()
    assert [bench.tier(number) for number in (1, 2, 3, 4)] == [DISK, HOST, HOST, HOST]
    for offset in offsets[0]:
        bench.mover.free(Location(HOST, 0, 0, offset, NBYTES, NBYTES))


def test_a_block_that_can_never_fit_evicts_nothing(make) -> None:
    bench = make(slots=2)
    bench.store(1, 2)
    assert bench.engine.reserve(NBYTES + 1, [key_of(9)], None, PATIENCE_S) == []
    assert bench.tier(1) is bench.tier(2) is HOST


def test_a_failed_demotion_keeps_the_source_and_stores_continue(make) -> None:
    bench = make(DISK, slots=1)
    bench.store(1)
    bench.mover.failure = OSError("the disk is gone")
    bench.mover.append_allowed[DISK].clear()
    assert bench.store(2, wait_s=0) == [False]
    bench.mover.append_allowed[DISK].set()
    bench.engine.settle()
    assert bench.tier(1) is HOST
    assert bench.store(2) == [True]
    assert bench.tier(1) is None, "dropped, for the disk did not want it"


def test_a_full_disk_reclaims_its_oldest_segment(make) -> None:
    bench = make(DISK, slots=1, segments=2)
    bench.store(1, 2, 3, 4)
    bench.engine.settle()
    assert [bench.tier(number) for number in (1, 2, 3, 4)] == [None, DISK, DISK, HOST]


def on_disk_with_room(make) -> Bench:
    """Returns a bench with block 1 only on disk, and a free host extent."""
    bench = make(DISK, slots=2)
    bench.store(1, 2)
    bench.store(3)
    bench.engine.settle()
    bench.engine.handle([ev.Crowded(1)])
    bench.check()
    assert bench.tier(1) is DISK
    assert bench.mover.free_slots[HOST]
    return bench


def test_a_touched_block_is_promoted_from_disk(make) -> None:
    bench = on_disk_with_room(make)
    bench.touch(1)
    assert bench.tier(1) is HOST
    assert bench.engine.machine.has(key_of(1), DISK)


@pytest.mark.parametrize(
    ("outcome", "failure", "left"),
    [(FillOutcome.GONE, None, None), (FillOutcome.LATER, None, DISK), (FillOutcome.DONE, RuntimeError("nobody thought of it"), DISK)],
)
def test_a_failed_promotion_releases_its_extent(make, outcome: FillOutcome, failure: Exception | None, left: Tier | None) -> None:
    bench = on_disk_with_room(make)
    free = sorted(bench.mover.free_slots[HOST])
    bench.mover.failure, bench.mover.outcome = failure, outcome
    bench.touch(1)
    assert sorted(bench.mover.free_slots[HOST]) == free
    assert bench.tier(1) is left, "only what is damaged is given up"


def test_a_late_promotion_does_no_harm(make) -> None:
    bench = on_disk_with_room(make)
    bench.mover.fill_allowed.clear()
    bench.index.touched = [key_of(1)]
    bench.engine.drain_touches()
    assert bench.mover.entered.wait(PATIENCE_S)
    bench.engine.handle([ev.Lost(key_of(1), bench.index[key_of(1)])])
    assert bench.store(1) == [True]
    bench.mover.fill_allowed.set()
    bench.engine.settle()
    assert bench.tier(1) is HOST


def test_closing_ends_a_wait_for_room(make) -> None:
    bench = make(DISK, slots=1, io_threads=1)
    bench.store(1)
    bench.mover.append_allowed[DISK].clear()
    waiter, stored = in_thread(bench.store, 2)
    assert bench.mover.entered.wait(PATIENCE_S)
    closer, _ = in_thread(bench.engine.close)
    waiter.join(PATIENCE_S)
    assert stored == [[False]]
    bench.mover.append_allowed[DISK].set()
    closer.join(PATIENCE_S)
    bench.engine.handle([ev.Needed(HOST, NBYTES)])  # after close: nothing is started any more
    bench.engine.settle()


def test_the_journal_lists_added_and_removed_blocks(make) -> None:
    bench = make(slots=2)
    bench.store(1, 2, 3)
    assert bench.engine.journal == {key_of(1): False, key_of(2): True, key_of(3): True}


def test_many_threads_store_and_touch_at_once(make) -> None:
    bench = make(DISK, slots=4, segments=3)
    gate = threading.Barrier(4)

    def work(first: int) -> list[bool]:
        gate.wait(PATIENCE_S)
        stored = []
        for number in range(first, first + 60):
            stored += bench.store(number)
            bench.engine.handle([ev.Used([key_of(number - 2)], 0.0), ev.Used([key_of(number)], 0.0)])
        return stored

    threads = [in_thread(work, first) for first in (100, 200, 300, 400)]
    for thread, _ in threads:
        thread.join(PATIENCE_S)
    assert all(len(answers) == 1 for _, answers in threads)
    bench.engine.settle()
    assert len(bench.mover.taken[HOST]) <= 4


def test_blocks_used_again_are_promoted_to_the_device_and_evict_others(make) -> None:
    bench = make(DEVICE, slots=2)
    bench.store(1, 2)
    bench.touch(1)
    bench.touch(2)
    assert bench.tier(1) is bench.tier(2) is DEVICE
    bench.store(3)
    bench.touch(3)
    assert (bench.tier(1), bench.tier(2), bench.tier(3)) == (HOST, DEVICE, HOST), "1 was on the device alone, and had to go to memory first"
    bench.touch(3)
    assert (bench.tier(1), bench.tier(2), bench.tier(3)) == (HOST, DEVICE, DEVICE)


def test_beyond_the_queue_of_a_slow_disk_blocks_are_dropped_and_the_store_does_not_wait(make) -> None:
    bench = make(DISK, slots=4, queue_bytes=2 * NBYTES)
    bench.mover.append_allowed[DISK].clear()
    bench.store(1, 2, 3, 4)
    assert bench.engine.reserve(NBYTES, [key_of(number) for number in (5, 6, 7)], None, PATIENCE_S) == [2]
    bench.mover.free(Location(HOST, 0, 0, 2, NBYTES, NBYTES))
    assert bench.engine.leaving_bytes == {"host": 2 * NBYTES}
    assert bench.engine.machine.counts["dropped_under_pressure"] == 1
    assert [bench.tier(number) for number in (1, 2, 3, 4)] == [HOST, HOST, None, HOST]


def test_a_hanging_disk_does_not_stop_promotions_from_other_tiers(make) -> None:
    bench = make(DISK, slots=3, io_threads=1)
    bench.store(1, 2, 3, 4)
    bench.engine.settle()
    assert bench.tier(1) is DISK
    bench.mover.append_allowed[DISK].clear()
    bench.store(5, wait_s=0)
    bench.engine.handle([ev.Crowded(1)])
    bench.index.touched = [key_of(1)]
    bench.engine.drain_touches()
    with bench.engine.lock:
        assert bench.engine.freed.wait_for(lambda: bench.tier(1) is HOST, PATIENCE_S)


def test_a_request_waits_for_blocks_from_objects(make) -> None:
    bench = make(OBJECTS, slots=2)
    bench.store(1, 2, 3)
    bench.engine.settle()
    assert bench.tier(1) is OBJECTS
    bench.mover.fill_allowed.clear()
    bench.engine.bring([key_of(1)], 0)
    assert bench.tier(1) is OBJECTS, "no time to wait"
    waiting, _ = in_thread(bench.engine.bring, [key_of(1), key_of(9)], PATIENCE_S)
    bench.mover.fill_allowed.set()
    waiting.join(PATIENCE_S)
    assert bench.tier(1) is HOST


def test_blocks_about_to_leave_the_disk_are_copied_to_objects_in_time(make) -> None:
    bench = make(DISK, OBJECTS, slots=1, segments=3)
    bench.mover.ages = True
    for number in range(1, 7):
        bench.store(number)
        bench.engine.settle()
        assert number < 2 or bench.engine.machine.has(key_of(1), OBJECTS), "long before its segment goes"
    assert [bench.tier(number) for number in range(1, 7)] == [OBJECTS] * 2 + [DISK] * 3 + [HOST]
    assert bench.engine.machine.counts["lost"] == 0


def test_a_slow_object_store_does_not_delay_stores(make, monkeypatch) -> None:
    monkeypatch.setattr(engine, "RECLAIM_WAIT_S", 0.0)
    bench = make(DISK, OBJECTS, slots=1, segments=2)
    bench.mover.ages = True
    bench.mover.append_allowed[OBJECTS].clear()
    assert bench.store(1, 2, 3, 4, 5) == [True] * 5
    assert bench.tier(1) is None
    with bench.engine.lock:
        bench.engine.freed.wait_for(lambda: not bench.engine.leaving_bytes.get("host"), PATIENCE_S)
    assert bench.engine.machine.counts["dropped_under_pressure"] == 1


def test_a_block_used_since_it_was_written_survives_its_segment(make) -> None:
    bench = make(DISK, slots=1, segments=2)
    bench.store(1, 2)
    bench.engine.settle()
    bench.mover.outcome = FillOutcome.LATER  # it is used, and stays on disk
    bench.touch(1)
    bench.mover.outcome = None
    bench.store(3, 4)
    bench.engine.settle()
    assert bench.mover.reinserted == [key_of(1)]
    assert bench.tier(1) is DISK
    assert bench.engine.machine.counts["reinserted"] == 1
