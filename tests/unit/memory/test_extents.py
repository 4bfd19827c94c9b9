"""The allocator, compared with a plain map of bytes, and its contract."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.extents import ExtentAllocator

UNIT = 16
UNITS = 64
KIB = 1024


def refused(call, *arguments) -> None:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    assert caught.value.kind is Kind.MEMORY


class AgainstByteMap(RuleBasedStateMachine):
    """Compares the allocator with a map of bytes: each byte has at most one owner, and None means that the map has no room."""

    def __init__(self):
        super().__init__()
        self.allocator = ExtentAllocator(UNIT * UNITS + 5, UNIT)
        self.owner = [None] * UNITS
        self.live = {}

    def _own(self, offset, nbytes):
        units = -(-nbytes // UNIT)
        first = offset // UNIT
        assert offset % UNIT == 0 and first + units <= UNITS
        assert self.owner[first : first + units] == [None] * units
        self.owner[first : first + units] = [offset] * units
        self.live[offset] = units
        assert self.allocator.size_of(offset) == units * UNIT

    def _longest_free(self):
        text = "".join("." if owner is None else "x" for owner in self.owner)
        return max(len(run) for run in text.split("x"))

    @rule(nbytes=st.integers(1, UNIT * UNITS + 100))
    def allocate(self, nbytes):
        room = self._longest_free() * UNIT
        offset = self.allocator.allocate(nbytes)
        assert (offset is None) == (nbytes > room)
        if offset is not None:
            self._own(offset, nbytes)

    @rule(nbytes=st.integers(1, UNIT * 9), count=st.integers(0, 12))
    def allocate_run(self, nbytes, count):
        stride = -(-nbytes // UNIT) * UNIT
        whole = self._longest_free() * UNIT >= stride * count
        offsets = self.allocator.allocate_run(nbytes, count)
        for offset in offsets:
            self._own(offset, nbytes)
        if whole:
            assert offsets == [offsets[0] + stride * place for place in range(count)] if count else offsets == []
        elif len(offsets) < count:
            assert self._longest_free() * UNIT < stride

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        offset = data.draw(st.sampled_from(sorted(self.live)))
        self.allocator.free(offset)
        units = self.live.pop(offset)
        self.owner[offset // UNIT : offset // UNIT + units] = [None] * units

    @rule(first=st.integers(0, UNITS), nbytes=st.integers(1, UNIT * 8), skew=st.sampled_from([0, 0, 0, 1]))
    def claim(self, first, nbytes, skew):
        units = -(-nbytes // UNIT)
        offset = first * UNIT + skew
        if skew or first + units > UNITS or any(owner is not None for owner in self.owner[first : first + units]):
            refused(self.allocator.claim, offset, nbytes)
        else:
            self.allocator.claim(offset, nbytes)
            self._own(offset, nbytes)

    @invariant()
    def agrees(self):
        self.allocator.check()
        assert self.allocator.used_bytes == UNIT * sum(self.live.values())
        assert self.allocator.free_bytes == UNIT * self.owner.count(None)
        assert self.allocator.largest_free == UNIT * self._longest_free()
        assert len(self.allocator) == len(self.live)
        assert sum(nbytes for _, nbytes in self.allocator.free_ranges()) == self.allocator.free_bytes


TestAgainstByteMap = AgainstByteMap.TestCase
TestAgainstByteMap.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_free_offset_cannot_be_freed_or_measured():
    allocator = ExtentAllocator(4096)
    offset = allocator.allocate(700)
    allocator.free(offset)
    refused(allocator.free, offset)
    refused(allocator.size_of, offset)
    refused(allocator.allocate, 0)
    refused(ExtentAllocator, 100, 512)


def test_a_run_is_contiguous_if_it_fits_and_otherwise_uses_the_free_pieces():
    allocator = ExtentAllocator(10 * 512)
    assert allocator.allocate_run(500, 4) == [0, 512, 1024, 1536]
    allocator.free(512)
    assert allocator.allocate_run(1000, 9) == [2048, 3072, 4096]
    assert allocator.allocate_run(1000, 1) == []
    assert allocator.allocate(1) == 512
    allocator.check()


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
@settings(deadline=None, max_examples=50)
def test_claims_of_a_rebuilt_arena_repeat_the_allocations(sizes):
    first, second = ExtentAllocator(1 << 16), ExtentAllocator(1 << 16)
    extents = [(offset, nbytes) for nbytes in sizes if (offset := first.allocate(nbytes)) is not None]
    for offset, nbytes in extents:
        second.claim(offset, nbytes)
    second.check()
    assert second.free_ranges() == first.free_ranges()


def test_small_extents_are_allocated_from_the_end(checked) -> None:
    extents = checked(ExtentAllocator(64 * KIB))
    large = extents.allocate_run(8 * KIB, 2)
    assert large == [0, 8 * KIB]
    assert [extents.allocate_apart(4 * KIB, 0) for _ in range(2)] == [60 * KIB, 56 * KIB]


def test_small_extents_leave_the_start_to_others(checked) -> None:
    extents = checked(ExtentAllocator(64 * KIB))
    given = [extents.allocate_apart(8 * KIB, 32 * KIB) for _ in range(5)]
    assert given == [56 * KIB, 48 * KIB, 40 * KIB, 32 * KIB, None]
    assert extents.free_bytes == 32 * KIB


def test_a_gap_of_about_the_same_size_is_used_first(checked) -> None:
    extents = checked(ExtentAllocator(64 * KIB))
    first, second, third = (extents.allocate_apart(8 * KIB, 0) for _ in range(3))
    extents.free(second)
    assert extents.allocate_apart(8 * KIB - 512, 0) == second
    extents.free(second)
    assert extents.allocate_apart(1 * KIB, 0) == first - 1 * KIB, "a much smaller one lies at the end of the last gap"
    assert extents.allocate_apart(8 * KIB, 0) == third - 8 * KIB


def test_extents_below_a_ceiling_are_the_first_that_fit(checked) -> None:
    extents = checked(ExtentAllocator(64 * KIB))
    assert extents.allocate_below(8 * KIB, 3, 20 * KIB) == [0, 8 * KIB]
    extents.free(0)
    assert extents.allocate_below(8 * KIB, 3, 20 * KIB) == [0]
    assert extents.allocate_below(4 * KIB, 3, 20 * KIB) == [16 * KIB]
    assert extents.allocate_below(4 * KIB, 1, 20 * KIB) == []
