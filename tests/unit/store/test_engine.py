"""The engine: the machine's instructions on a mover of dictionaries whose every step a test can hold or break."""

import threading
from collections.abc import Iterator

import pytest

from tests.unit.store.world import key_of
from tiered_kv.blocks import Location, Tier
from tiered_kv.clock import SystemClock
from tiered_kv.policy import LRUPolicy
from tiered_kv.store import events as ev
from tiered_kv.store.engine import Engine
from tiered_kv.store.machine import StoreMachine

PATIENCE_S = 30.0
NBYTES = 100


class Index(dict):
    """The index as a dictionary; `touched` is what the next harvest tells."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[bytes] = []

    def put(self, key: bytes, location: Location) -> None:
        self[key] = location

    def remove(self, key: bytes) -> None:
        del self[key]

    def harvest(self) -> list[tuple[bytes, int, int]]:
        touched, self.touched = self.touched, []
        return [(key, 1, 1) for key in touched]


class Mover:
    """`slots` host extents of NBYTES; segments of two blocks each, at most `segments` of them."""

    def __init__(self, slots: int, segments: int) -> None:
        self.free_slots = list(range(slots))
        self.taken: set[int] = set()
        self.segments_max = segments
        self.segments: dict[int, list[bytes]] = {}
        self.to_disk_allowed, self.to_host_allowed = threading.Event(), threading.Event()
        self.to_disk_allowed.set()
        self.to_host_allowed.set()
        self.entered = threading.Event()
        self.failure: Exception | None = None
        self.refused = False
        self.next_segment = 0

    def fits(self, nbytes: int) -> bool:
        return nbytes <= NBYTES

    def reserve(self, nbytes: int, count: int) -> list[int]:
        assert nbytes <= NBYTES
        taken, self.free_slots = self.free_slots[:count], self.free_slots[count:]
        self.taken.update(taken)
        return taken

    def free(self, location: Location) -> None:
        if location.tier is Tier.HOST:
            self.taken.remove(location.offset)
            self.free_slots.append(location.offset)
        elif location.segment in self.segments:
            self.segments[location.segment].remove(self._key_at(location))

    def _key_at(self, location: Location) -> bytes:
        return location.offset.to_bytes(32, "big")

    def _enter(self, allowed: threading.Event) -> None:
        self.entered.set()
        assert allowed.wait(PATIENCE_S)
        if self.failure:
            raise self.failure

    def to_disk(self, copies: list[ev.Copy]) -> list[Location | None]:
        self._enter(self.to_disk_allowed)
        if self.refused:
            return [None] * len(copies)
        self.next_segment += 1
        self.segments[self.next_segment] = [copy.key for copy in copies]
        return [Location(Tier.DISK, 0, self.next_segment, int.from_bytes(copy.key, "big"), NBYTES, NBYTES) for copy in copies]

    def to_host(self, copy: ev.Copy, location: Location) -> bool:
        self._enter(self.to_host_allowed)
        return copy.key in self.segments.get(copy.source.segment, ()) and not self.refused

    def disk_room(self, copies: list[ev.Copy]) -> tuple[int, list[bytes]] | None:
        if len(self.segments) < self.segments_max:
            return None
        segment = min(self.segments)
        return segment, list(self.segments[segment])

    def drop_segment(self, segment: int) -> None:
        del self.segments[segment]


class Bench:
    """An engine on fakes, and short ways to say what a test does."""

    def __init__(self, slots: int = 4, segments: int = 8, has_disk: bool = True, io_threads: int = 2) -> None:
        self.index, self.mover = Index(), Mover(slots, segments)
        self.engine = Engine(StoreMachine(LRUPolicy(), has_disk), self.index, self.mover, SystemClock(), io_threads)

    def store(self, *numbers: int, wait_s: float = PATIENCE_S) -> list[bool]:
        """Blocks of no chain, one by one; whether there was room for each."""
        stored = []
        for number in numbers:
            offsets = self.engine.reserve(NBYTES, 1, None, wait_s)
            for offset in offsets:
                self.engine.handle([ev.Committed(key_of(number), None, None, Location(Tier.HOST, 0, 0, offset, NBYTES, NBYTES))])
            stored.append(bool(offsets))
        return stored

    def tier(self, number: int) -> Tier | None:
        location = self.index.get(key_of(number))
        return location and location.tier

    def check(self) -> None:
        machine = self.engine.machine
        machine.check()
        assert self.index == {key: block.best for key, block in machine.blocks.items()}
        host = [block.copies[Tier.HOST].offset for block in machine.blocks.values() if Tier.HOST in block.copies]
        assert sorted(host) == sorted(self.mover.taken), "a host extent leaked"


@pytest.fixture
def make() -> Iterator:
    benches = []

    def maker(**options) -> Bench:
        benches.append(Bench(**options))
        return benches[-1]

    yield maker
    for bench in benches:
        bench.mover.to_disk_allowed.set()
        bench.mover.to_host_allowed.set()
        bench.engine.settle()
        bench.check()
        bench.engine.close()


def in_thread(function, *arguments) -> tuple[threading.Thread, list]:
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(function(*arguments)))
    thread.start()
    return thread, answers


def test_a_store_waits_for_room_that_a_demotion_makes(make) -> None:
    bench = make(slots=1)
    bench.mover.to_disk_allowed.clear()
    bench.store(1)
    thread, stored = in_thread(bench.store, 2)
    assert bench.mover.entered.wait(PATIENCE_S)
    assert bench.tier(1) is Tier.HOST, "readable while it is being demoted"
    bench.mover.to_disk_allowed.set()
    thread.join(PATIENCE_S)
    assert stored == [[True]]
    assert (bench.tier(1), bench.tier(2)) == (Tier.DISK, Tier.HOST)


def test_without_waiting_it_is_refused_and_room_is_made_for_the_next(make) -> None:
    bench = make(slots=1)
    bench.store(1)
    bench.mover.to_disk_allowed.clear()
    assert bench.store(2, wait_s=0) == [False]
    bench.mover.to_disk_allowed.set()
    bench.engine.settle()
    assert bench.store(2, wait_s=0) == [True]


def test_stores_that_wait_for_the_same_demotion_do_not_evict_for_each_other(make) -> None:
    bench = make(slots=4)
    bench.store(1, 2, 3, 4)
    bench.mover.to_disk_allowed.clear()
    assert bench.store(5, 6, wait_s=0) == [False, False]
    bench.mover.to_disk_allowed.set()
    bench.engine.settle()
    assert [bench.tier(number) for number in (1, 2, 3, 4)] == [Tier.DISK, Tier.HOST, Tier.HOST, Tier.HOST]


def test_a_block_that_never_fits_drives_nobody_out(make) -> None:
    bench = make(slots=2, has_disk=False)
    bench.store(1, 2)
    assert bench.engine.reserve(NBYTES + 1, 1, None, PATIENCE_S) == []
    assert bench.tier(1) is bench.tier(2) is Tier.HOST


def test_a_failing_disk_keeps_the_source_and_the_store_goes_on(make) -> None:
    bench = make(slots=1)
    bench.store(1)
    bench.mover.failure = OSError("the disk is gone")
    bench.mover.to_disk_allowed.clear()
    assert bench.store(2, wait_s=0) == [False]
    bench.mover.to_disk_allowed.set()
    bench.engine.settle()
    assert bench.tier(1) is Tier.HOST
    assert bench.store(2) == [True]
    assert bench.tier(1) is None, "dropped, for the disk did not want it"


def test_a_full_disk_gives_up_its_oldest_segment(make) -> None:
    bench = make(slots=1, segments=2)
    bench.store(1, 2, 3, 4)
    bench.engine.settle()
    assert [bench.tier(number) for number in (1, 2, 3, 4)] == [None, Tier.DISK, Tier.DISK, Tier.HOST]


def on_disk_with_room(make) -> Bench:
    """Block 1 on disk only, and a free host extent."""
    bench = make(slots=2)
    bench.store(1, 2)
    bench.store(3)
    bench.engine.settle()
    bench.engine.handle([ev.Crowded(1)])
    bench.check()
    assert bench.tier(1) is Tier.DISK
    assert bench.mover.free_slots
    return bench


def test_a_touched_block_comes_back_from_disk(make) -> None:
    bench = on_disk_with_room(make)
    bench.index.touched = [key_of(1)]
    bench.engine.drain_touches()
    bench.engine.settle()
    assert bench.tier(1) is Tier.HOST
    assert bench.engine.machine.has(key_of(1), Tier.DISK)


@pytest.mark.parametrize("failure", [None, RuntimeError("no frame at all")])
def test_a_promotion_that_fails_gives_its_extent_back_and_gives_the_disk_copy_up(make, failure: Exception | None) -> None:
    bench = on_disk_with_room(make)
    free = sorted(bench.mover.free_slots)
    bench.mover.failure, bench.mover.refused = failure, True
    bench.index.touched = [key_of(1)]
    bench.engine.drain_touches()
    bench.engine.settle()
    assert sorted(bench.mover.free_slots) == free
    assert bench.tier(1) is None


def test_a_promotion_that_comes_late_does_no_harm(make) -> None:
    bench = on_disk_with_room(make)
    bench.mover.to_host_allowed.clear()
    bench.index.touched = [key_of(1)]
    bench.engine.drain_touches()
    assert bench.mover.entered.wait(PATIENCE_S)
    bench.engine.handle([ev.Lost(key_of(1))])
    assert bench.store(1) == [True]
    bench.mover.to_host_allowed.set()
    bench.engine.settle()
    assert bench.tier(1) is Tier.HOST


def test_closing_ends_a_wait_for_room(make) -> None:
    bench = make(slots=1, io_threads=1)
    bench.store(1)
    bench.mover.to_disk_allowed.clear()
    waiter, stored = in_thread(bench.store, 2)
    assert bench.mover.entered.wait(PATIENCE_S)
    closer, _ = in_thread(bench.engine.close)
    waiter.join(PATIENCE_S)
    assert stored == [[False]]
    bench.mover.to_disk_allowed.set()
    closer.join(PATIENCE_S)
    bench.engine.handle([ev.Needed(Tier.HOST, NBYTES)])  # after close: nothing is started any more
    bench.engine.settle()


def test_the_journal_tells_what_came_and_went(make) -> None:
    bench = make(slots=2, has_disk=False)
    bench.store(1, 2, 3)
    assert bench.engine.journal == {key_of(1): False, key_of(2): True, key_of(3): True}


def test_many_threads_store_and_touch_at_once(make) -> None:
    bench = make(slots=4, segments=3)
    gate = threading.Barrier(4)

    def work(first: int) -> list[bool]:
        gate.wait(PATIENCE_S)
        stored = []
        for number in range(first, first + 60):
            stored += bench.store(number)
            bench.engine.handle([ev.Touched(key_of(number - 2)), ev.Touched(key_of(number))])
        return stored

    threads = [in_thread(work, first) for first in (100, 200, 300, 400)]
    for thread, _ in threads:
        thread.join(PATIENCE_S)
    assert all(len(answers) == 1 for _, answers in threads)
    bench.engine.settle()
    assert len(bench.mover.taken) <= 4
