"""The disk tier compared with a dict, with faults, restarts and crashes: no wrong or lost block, and never above the cap."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.tiers.records import KIB, OVERHEAD_BYTES, assert_holds, key_of, record_of
from tiered_kv.blocks import Location
from tiered_kv.tiers.disk.segments import segments_in
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.faulty import FaultPlan, Faulty, fails, short
from tiered_kv.tiers.log import Refusal

CAPACITY, SEGMENT = 160 * KIB, 16 * KIB
FRAME_SIZES = st.integers(OVERHEAD_BYTES + 1, 4 * KIB) | st.integers(4 * KIB, CAPACITY + 4 * KIB)
FAULTS = st.sampled_from([None, fails(errno.ENOSPC), fails(errno.EIO), short(1), short(3000)])


class WatchedFiles:
    """System calls that check the folder's size after each call that can enlarge it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.unlink, self.truncate, self.preadv = os.unlink, os.truncate, os.preadv
        self.fdatasync, self.fadvise = os.fdatasync, os.posix_fadvise

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
    """The state machine of the test. `held` has the blocks that the tier must have, and `forgotten` those that a restart may recover."""

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name) / "disk"
        self.held: dict[int, Location] = {}
        self.forgotten: set[int] = set()
        self.numbers = 0
        self.plan = FaultPlan()
        self.tier = self.opened()

    def opened(self) -> DiskTier:
        return DiskTier(self.folder, CAPACITY, SEGMENT, owner="model", files=Faulty(WatchedFiles(self.folder), self.plan))

    def planned(self, **faults) -> None:
        """Make the next call of an operation fail with the fault, if one is given."""
        self.plan.__init__(**{name: {1: fault} for name, fault in faults.items() if fault})

    @rule(sizes=st.lists(FRAME_SIZES, min_size=1, max_size=6), make_room=st.booleans(), write=FAULTS, sync=FAULTS)
    def append(self, sizes: list[int], make_room: bool, write, sync) -> None:
        if make_room:
            while (segment := self.tier.needs_reclaim(sum(sizes), len(sizes))) is not None:
                self.reclaim(segment)
        self.planned(pwritev=write, fdatasync=fails(errno.EIO) if sync else None)
        numbers = range(self.numbers, self.numbers + len(sizes))
        self.numbers += len(sizes)
        answers = self.tier.append([record_of(number, size) for number, size in zip(numbers, sizes, strict=True)])
        self.planned()
        for number, size, (location, refused) in zip(numbers, sizes, answers, strict=True):
            assert (location is None) != (refused is None)
            assert (refused is Refusal.TOO_LARGE) <= (size > self.tier.max_frame_bytes)
            if location:
                assert location.stored_bytes == size
                self.held[number] = location
        if make_room and write is None and sum(sizes) < CAPACITY // 2:
            assert all(answer.location for answer in answers)

    def reclaim(self, segment: int) -> None:
        gone = {number for number, location in self.held.items() if location.segment == segment}
        assert set(self.tier.keys_in(segment)) == {key_of(number) for number in gone}
        self.tier.reclaim(segment)
        self.held = {number: location for number, location in self.held.items() if number not in gone}

    @rule(data=st.data())
    def reinsert(self, data: st.DataObject) -> None:
        segment = self.tier.oldest_sealed()
        there = [number for number, location in self.held.items() if location.segment == segment]
        if not there:
            return
        wanted = data.draw(st.sets(st.sampled_from(there)))
        moved = dict(self.tier.reinsert(segment, {key_of(number) for number in wanted}))
        self.tier.check()
        if self.tier.segment_bytes >= segments_in(self.folder)[segment]:
            assert moved.keys() == {key_of(number) for number in wanted}
        self.tier.reclaim(segment)
        for number in there:
            location = moved.get(key_of(number))
            if location is None:
                del self.held[number]
            else:
                self.held[number] = location

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        assert self.tier.forget(self.held.pop(number))
        self.forgotten.add(number)

    @rule(is_crash=st.booleans())
    def restart(self, is_crash: bool) -> None:
        """Restart the tier. For a crash, the new tier gets a copy of the files made before the old one closes."""
        if is_crash:
            shutil.copytree(self.folder, self.folder.with_name("copy"))
        self.tier.close(remove=is_crash)
        if is_crash:
            self.folder.with_name("copy").rename(self.folder)
        self.tier = self.opened()
        self.tier.check()
        recovered = {block.key: block.location for block in self.tier.recovered()}
        assert recovered.items() >= {(key_of(number), location) for number, location in self.held.items()}
        back = recovered.keys() - {key_of(number) for number in self.held}
        assert back <= {key_of(number) for number in self.forgotten}
        assert all(self.tier.forget(recovered[key]) for key in back)

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
