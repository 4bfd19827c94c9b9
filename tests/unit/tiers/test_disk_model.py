"""The disk tier against a dict, with faults and restarts: never wrong bytes, never above the cap at any moment."""

import errno
import os
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.tiers.records import KIB, OVERHEAD_BYTES, assert_holds, key_of, record_of
from tiered_kv.blocks import Location
from tiered_kv.tiers.disk import DiskTier, Refused
from tiered_kv.tiers.faulty import Faulty, Plan, fails, short

CAPACITY, SEGMENT = 96 * KIB, 8 * KIB
FRAME_SIZES = st.integers(OVERHEAD_BYTES + 1, 4 * KIB) | st.integers(4 * KIB, CAPACITY + 4 * KIB)
FAULTS = st.sampled_from([None, fails(errno.ENOSPC), fails(errno.EIO), short(1), short(3000)])


class WatchedFiles:
    """System calls that look at the whole folder after every one that can make it larger."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.unlink, self.truncate, self.preadv = os.unlink, os.truncate, os.preadv

    def open(self, *arguments) -> int:
        fd = os.open(*arguments)
        self.look()
        return fd

    def pwritev(self, *arguments) -> int:
        count = os.pwritev(*arguments)
        self.look()
        return count

    def look(self) -> None:
        assert sum(-(-entry.stat().st_size // 4096) * 4096 for entry in os.scandir(self._folder)) + 4096 <= CAPACITY


class DiskModel(RuleBasedStateMachine):
    """Blocks by number are in `held` exactly while the tier must have them."""

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name) / "disk"
        self.held: dict[int, Location] = {}
        self.numbers = 0
        self.plan = Plan()
        self.tier = self.opened()

    def opened(self) -> DiskTier:
        return DiskTier(self.folder, CAPACITY, SEGMENT, owner="model", files=Faulty(WatchedFiles(self.folder), self.plan))

    def planned(self, **faults) -> None:
        """From now on the next call of an operation meets the fault, if one is given."""
        self.plan.__init__(**{name: {1: fault} for name, fault in faults.items() if fault})

    @rule(sizes=st.lists(FRAME_SIZES, min_size=1, max_size=6), make_room=st.booleans(), write=FAULTS)
    def append(self, sizes: list[int], make_room: bool, write) -> None:
        if make_room:
            self.make_room(sum(sizes))
        self.planned(pwritev=write)
        numbers = range(self.numbers, self.numbers + len(sizes))
        self.numbers += len(sizes)
        answers = self.tier.append([record_of(number, size) for number, size in zip(numbers, sizes, strict=True)])
        self.planned()
        for number, size, (location, refused) in zip(numbers, sizes, answers, strict=True):
            assert (location is None) != (refused is None)
            assert (refused is Refused.TOO_LARGE) <= (size > self.tier.max_frame_bytes)
            if location:
                assert location.stored_bytes == size
                self.held[number] = location
        if make_room and write is None and sum(sizes) < CAPACITY // 2:
            assert all(answer.location for answer in answers)

    def make_room(self, nbytes: int) -> None:
        while (segment := self.tier.needs_reclaim(nbytes)) is not None:
            self.reclaim(segment)

    def reclaim(self, segment: int) -> None:
        gone = {number for number, location in self.held.items() if location.segment == segment}
        assert set(self.tier.keys_in(segment)) == {key_of(number) for number in gone}
        self.tier.reclaim(segment)
        self.held = {number: location for number, location in self.held.items() if number not in gone}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        assert self.tier.forget(self.held.pop(number))

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        self.tier.close(remove=False)
        self.tier = self.opened()
        self.tier.check()
        known = data.draw(st.sets(st.sampled_from(sorted(self.held)))) if self.held else set()
        self.held = {number: self.held[number] for number in known}
        assert self.tier.adopt({key_of(number): location for number, location in self.held.items()}) == []

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        assert_holds(self.tier, number, self.held[number])

    @invariant()
    def books_agree(self) -> None:
        self.tier.check()

    def teardown(self) -> None:
        for number, location in self.held.items():
            assert_holds(self.tier, number, location)
        self.tier.close()
        assert not self.folder.exists()
        self._temporary.cleanup()


TestDiskModel = DiskModel.TestCase
TestDiskModel.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
