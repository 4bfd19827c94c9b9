"""The disk tier: batches, the cap, reclaiming whole segments, and its bookkeeping."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from tests.contracts.tier import LogTierContract
from tests.unit.tiers.records import KIB, QUARTER, assert_holds, key_of, put, record_of
from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, footer_bytes
from tiered_kv.tiers.disk.segments import Files, segments_in
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.faulty import FaultPlan, Faulty, fails, short
from tiered_kv.tiers.log import Record, Refusal

CAPACITY, SEGMENT = 256 * KIB, 16 * KIB


class TestDiskTier(LogTierContract):
    def make(self, folder: Path) -> DiskTier:
        return DiskTier(folder / "disk", CAPACITY, SEGMENT, owner="contract")

    def record(self, number: int, nbytes: int) -> Record:
        return record_of(number, nbytes)

    def leave(self, tier: DiskTier) -> None:
        tier.close(remove=False)


@pytest.fixture
def make(tmp_path: Path):
    """A function that creates tiers in one folder. Each is checked and closed at the end."""
    tiers: list[DiskTier] = []

    def make_tier(capacity: int = CAPACITY, segment: int = SEGMENT, owner: str = "me", files: Files | None = None) -> DiskTier:
        tiers.append(DiskTier(tmp_path / "disk", capacity, segment, owner=owner, files=files))
        return tiers[-1]

    yield make_tier
    for tier in tiers:
        tier.check()
        tier.close()


def test_a_batch_is_one_write_per_segment(make) -> None:
    plan = FaultPlan()
    tier = make(files=Faulty(Files(), plan))
    held = put(tier, range(10), QUARTER)
    assert [location.segment for location in held.values()] == [1] * 4 + [2] * 4 + [3] * 2
    assert plan.calls["pwritev"] == 3 + 2  # and the footers
    assert plan.calls["fdatasync"] == 2
    assert held[0][:5] == (Tier.DISK, 0, 1, ENTRY_BYTES, QUARTER)
    for number, location in held.items():
        assert_holds(tier, number, location)


def test_appends_continue_where_the_last_one_ended(make) -> None:
    tier = make()
    first, second = put(tier, [1], 3 * KIB)[1], put(tier, [2], 3 * KIB)[2]
    assert (second.segment, second.offset) == (first.segment, 3 * KIB + 2 * ENTRY_BYTES)


def test_more_buffers_than_one_system_call_allows_are_written(make) -> None:
    tier = make()
    number = 1
    record = record_of(number, 5000)
    whole = np.frombuffer(b"".join(record.buffers), np.uint8)
    answer = tier.append([record._replace(buffers=[whole[i : i + 1] for i in range(whole.size)])])[0]
    assert_holds(tier, number, answer.location)


def test_large_frames_are_written_and_read_in_pieces(make) -> None:
    plan = FaultPlan(pwritev={2: short(100_001)}, preadv={2: short(77)}, fadvise={1: fails(errno.EINVAL)})
    tier = make(64 << 20, 8 << 20, files=Faulty(Files(), plan))
    held = put(tier, range(2), 3 << 20)
    assert plan.calls["pwritev"] == 4  # of 2 MiB each, one of which was cut short
    assert plan.calls["fadvise"] == 3  # the disk is told to begin at once; that it did not listen does not matter
    for number, location in held.items():
        assert_holds(tier, number, location)
    assert plan.calls["preadv"] == 2 * 12 + 1


def test_room_for_the_footer_is_reserved_while_the_segment_grows(make) -> None:
    tier = make()
    for number in range(30):
        put(tier, [number], 200)
        file_bytes = (number + 1) * (200 + ENTRY_BYTES) + footer_bytes(number + 1)
        assert tier.used_bytes == 8 * KIB + -(-file_bytes // 4096) * 4096
    before = tier.used_bytes
    assert tier.needs_reclaim(tier.max_frame_bytes) == 1
    assert tier.used_bytes == before


def test_segments_are_at_most_an_eighth_of_the_cap_and_whole_pages(make) -> None:
    tier = make(segment=1 << 30)
    assert tier.segment_bytes == CAPACITY // 8
    tier.close()
    assert make(segment=5000).segment_bytes == 4 * KIB


def test_a_frame_larger_than_a_segment_gets_its_own_segment(make) -> None:
    tier = make()
    held = put(tier, [0], KIB) | put(tier, [1], 2 * SEGMENT + 5) | put(tier, [2], KIB)
    assert held[0].segment == held[2].segment != held[1].segment
    assert tier.keys_in(held[1].segment) == [key_of(1)]
    for number, location in held.items():
        assert_holds(tier, number, location)
    tier.reclaim(held[1].segment)
    assert_holds(tier, 2, held[2])


def test_a_frame_larger_than_the_cap_is_refused_and_the_rest_written(make) -> None:
    tier = make()
    answers = tier.append([record_of(0, KIB), record_of(1, CAPACITY), record_of(2, KIB)])
    assert [answer.refused for answer in answers] == [None, Refusal.TOO_LARGE, None]
    assert put(make_empty(tier), [3], tier.max_frame_bytes)


def make_empty(tier: DiskTier) -> DiskTier:
    while (segment := tier.needs_reclaim(tier.capacity_bytes)) is not None:
        tier.reclaim(segment)
    return tier


@pytest.mark.parametrize(("frame_size", "fit"), [(4 * KIB - 248 - 13, 5), (4 * KIB - 248 - 12, 4)])
def test_a_batch_is_written_as_far_as_there_is_room(make, frame_size: int, fit: int) -> None:
    tier = make(segment=1 << 20)
    put(tier, [0], tier.max_frame_bytes - 20 * KIB)
    answers = tier.append([record_of(number, frame_size) for number in range(1, 8)])
    assert [answer.refused for answer in answers] == [None] * fit + [Refusal.FULL] * (7 - fit)


def test_an_empty_frame_is_an_error(make) -> None:
    with pytest.raises(ValueError, match="without bytes"):
        make().append([Record(BlockInfo(key_of(1), None, None), [b""], 0, 0)])


def test_appending_nothing_does_nothing(make) -> None:
    assert make().append([]) == []


def test_the_oldest_segments_are_reclaimed_first(make) -> None:
    tier = make()
    held: dict[int, Location] = {}
    for number in range(200):
        while (segment := tier.needs_reclaim(3 * KIB)) is not None:
            keys = tier.keys_in(segment)
            oldest = min(held)
            assert keys == [key_of(oldest + i) for i in range(len(keys))]
            held = {known: location for known, location in held.items() if location.segment != segment}
            assert tier.reclaim(segment) > 0
        held |= put(tier, [number], 3 * KIB)
        assert number in held
        tier.check()
    for number, location in held.items():
        assert_holds(tier, number, location)


def test_no_reclaim_is_needed_for_a_batch_that_fits(make) -> None:
    tier = make()
    for batch, size in enumerate([5000, 200] * 25):
        while (segment := tier.needs_reclaim(10 * size, 10)) is not None:
            tier.reclaim(segment)
        assert len(put(tier, range(10 * batch, 10 * batch + 10), size)) == 10


def test_all_blocks_of_the_open_segment_can_be_freed(make) -> None:
    tier = make()
    put(tier, [1], KIB)
    segment = tier.needs_reclaim(tier.max_frame_bytes)
    assert tier.keys_in(segment) == [key_of(1)]
    assert tier.reclaim(segment) == 4 * KIB
    assert tier.needs_reclaim(CAPACITY) is None


def test_the_open_segment_is_not_reclaimed(make) -> None:
    tier = make()
    location = put(tier, [1], KIB)[1]
    assert tier.oldest_sealed() is None
    with pytest.raises(ValueError, match="being written"):
        tier.reclaim(location.segment)


def test_reclaiming_a_removed_segment_does_nothing(make) -> None:
    tier = make()
    assert tier.reclaim(77) == 0
    assert tier.keys_in(77) == []


def test_a_segment_is_removed_with_its_last_block(make) -> None:
    tier = make()
    held = put(tier, range(8), QUARTER)
    first = [location for location in held.values() if location.segment == 1]
    assert len(first) == 4
    for location in first:
        assert 1 in segments_in(tier.folder)
        assert tier.forget(location)
        assert not tier.forget(location)
        tier.check()
    assert tier.keys_in(1) == []
    assert put(tier, [8], QUARTER)
    assert 1 not in segments_in(tier.folder), "but for those who forget, with the next one who writes"
    tier.check()


def test_a_segment_without_blocks_is_removed_when_it_is_full(make) -> None:
    tier = make()
    location = put(tier, [1], 12 * KIB)[1]
    tier.forget(location)
    assert location.segment in segments_in(tier.folder)
    put(tier, [2], 12 * KIB)
    assert location.segment not in segments_in(tier.folder)


def test_the_keys_of_a_segment_are_those_not_forgotten(make) -> None:
    tier = make()
    held = put(tier, range(4), KIB)
    tier.forget(held[1])
    assert tier.keys_in(held[0].segment) == [key_of(0), key_of(2), key_of(3)]


def test_blocks_in_use_are_reinserted_before_their_segment_is_removed(make) -> None:
    tier = make()
    held = put(tier, range(40), QUARTER)
    wanted = {key_of(number) for number in (0, 3, 39)}
    moved = dict(tier.reinsert(1, wanted))
    assert list(moved) == [key_of(0), key_of(3)]
    assert set(tier.keys_in(1)) >= {key_of(0), key_of(3)}
    for number in (0, 3):
        assert_holds(tier, number, held[number])
    tier.reclaim(1)
    for number in (0, 3):
        assert_holds(tier, number, moved[key_of(number)])
        assert moved[key_of(number)].segment > 9
    assert tier.reinserted_bytes == 2 * QUARTER
    assert tier.written_bytes / (40 * QUARTER) == tier.write_amplification > 42 / 40


def test_a_full_tier_has_room_to_reinsert_a_whole_segment(make) -> None:
    tier = make()
    held = put(tier, range(100), QUARTER)
    assert len(held) < 100
    for turn in range(2 * len(segments_in(tier.folder))):
        segment = tier.oldest_sealed()
        keys = tier.keys_in(segment)
        moved = dict(tier.reinsert(segment, keys))
        tier.check()
        assert list(moved) == keys, f"turn {turn}"
        tier.reclaim(segment)
        held |= {number: moved[key_of(number)] for number in held if key_of(number) in moved}
    for number, location in held.items():
        assert_holds(tier, number, location)


def test_reinserting_reads_only_what_fits_and_reports_the_rest(make) -> None:
    tier = make()
    put(tier, range(100), QUARTER)
    everything = [len(tier.reinsert(segment, tier.keys_in(segment))) for segment in (1, 2, 3)]
    assert everything[0] == 4
    assert everything[2] == 0
    tier.check()


def test_reinserting_skips_removed_blocks_and_rejects_the_open_segment(make) -> None:
    tier = make()
    held = put(tier, range(6), QUARTER)
    tier.forget(held[1])
    assert [key for key, _ in tier.reinsert(1, [key_of(1), key_of(2)])] == [key_of(2)]
    assert tier.reinsert(99, [key_of(1)]) == []
    assert tier.reinsert(1, []) == []
    with pytest.raises(ValueError, match="being written"):
        tier.reinsert(held[5].segment, [key_of(5)])


def test_the_write_amplification_without_writes_is_one(make) -> None:
    assert make().write_amplification == 1.0


def test_disk_usage_stays_below_the_cap_as_the_file_system_counts(make) -> None:
    tier = make()
    put(tier, range(500), 3001)
    os.sync()
    allocated = sum(512 * entry.stat().st_blocks for entry in os.scandir(tier.folder))
    assert allocated <= tier.used_bytes <= CAPACITY


def test_closing_removes_the_folder_and_nothing_else(make) -> None:
    tier = make()
    put(tier, range(20), 3 * KIB)
    tier.close()
    assert not tier.folder.exists()

    tier = make()
    (tier.folder / "notes.txt").write_text("mine")
    tier.close()
    assert os.listdir(tier.folder) == ["notes.txt"]


def test_appends_and_reads_after_closing_raise(make) -> None:
    tier = make()
    location = put(tier, [1], KIB)[1]
    tier.close()
    for use in (lambda: tier.append([record_of(2, KIB)]), lambda: tier.read(location, key_of(1))):
        with pytest.raises(TieredKVError) as caught:
            use()
        assert caught.value.kind is Kind.CLOSED


def test_a_too_small_cap_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TieredKVError, match="disk: ") as caught:
        DiskTier(tmp_path / "disk", 1000, 1000, owner="me")
    assert caught.value.kind is Kind.CONFIG
