"""The disk tier with a failing disk: no space, errors, torn writes, flipped bytes; and readers while segments are removed."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.unit.tiers.records import KIB, QUARTER, assert_holds, key_of, put, record_of
from tiered_kv.blocks import Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, footer_bytes
from tiered_kv.tiers.disk.segments import Files, SegmentReader, segment_path, segments_in
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.faulty import EVERY, FaultPlan, Faulty, fails, raises, refuses, short, waits
from tiered_kv.tiers.log import Refusal

CAPACITY, SEGMENT = 256 * KIB, 16 * KIB


@pytest.fixture
def make(tmp_path: Path):
    """A function that creates a tier whose system calls fail as planned."""
    tiers: list[DiskTier] = []

    def make_tier(**faults) -> DiskTier:
        tiers.append(DiskTier(tmp_path / "disk", CAPACITY, SEGMENT, owner="me", files=Faulty(Files(), FaultPlan(**faults))))
        return tiers[-1]

    yield make_tier
    for tier in tiers:
        tier.check()
        tier.close()


def assert_unreadable(reader, location, number: int, *kinds: Kind) -> None:
    with pytest.raises(TieredKVError) as caught:
        reader.read(location, key_of(number))
    assert caught.value.kind in kinds
    assert caught.value.context["segment"] == location.segment


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, Refusal.NO_SPACE), (errno.EDQUOT, Refusal.NO_SPACE), (errno.EIO, Refusal.IO_ERROR)]
)
def test_an_error_in_the_middle_of_a_batch_refuses_the_rest(make, code: int, reason: Refusal) -> None:
    tier = make(pwritev={3: fails(code)})  # the second is the first segment's footer
    answers = tier.append([record_of(number, QUARTER) for number in range(12)])
    assert [answer.refused for answer in answers] == [None] * 4 + [reason] * 8
    for number, answer in enumerate(answers[:4]):
        assert_holds(tier, number, answer.location)
    tier.check()
    assert list(segments_in(tier.folder)) == [1]
    assert len(put(tier, range(20, 24), QUARTER)) == 4


PIECE = ENTRY_BYTES + QUARTER


@pytest.mark.parametrize("torn_at", [1, ENTRY_BYTES, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE + ENTRY_BYTES, 3 * PIECE - 1])
def test_a_torn_write_keeps_whole_frames_only(make, torn_at: int) -> None:
    tier = make(pwritev={1: short(torn_at), 2: fails(errno.ENOSPC)})
    answers = tier.append([record_of(number, QUARTER) for number in range(3)])
    whole = torn_at // PIECE
    assert [answer.refused for answer in answers] == [None] * whole + [Refusal.NO_SPACE] * (3 - whole)
    assert segments_in(tier.folder) == ({1: whole * PIECE + footer_bytes(whole)} if whole else {})
    for number, answer in enumerate(answers[:whole]):
        assert_holds(tier, number, answer.location)


def test_a_segment_without_room_for_its_footer_is_read_and_recovered(make, tmp_path: Path) -> None:
    tier = make(pwritev={1: short(2 * PIECE + 9), 2: fails(errno.ENOSPC), 3: short(30), 4: fails(errno.ENOSPC)})
    answers = tier.append([record_of(number, QUARTER) for number in range(3)])
    assert segments_in(tier.folder) == {1: 2 * PIECE}
    for number, answer in enumerate(answers[:2]):
        assert_holds(tier, number, answer.location)
    tier.check()
    tier.close(remove=False)
    again = make()
    assert [block.location for block in again.recovered()] == [answer.location for answer in answers[:2]]


def test_a_footer_that_can_be_neither_written_nor_truncated_still_counts(make) -> None:
    tier = make(pwritev={2: short(100), 3: fails(errno.EIO)}, truncate={1: fails(errno.EIO)})
    held = put(tier, range(8), QUARTER)
    assert segments_in(tier.folder)[1] == 4 * PIECE + 100
    tier.check()
    for number, location in held.items():
        assert_holds(tier, number, location)


def test_a_segment_that_cannot_be_synced_is_used_and_recovered(make, caplog: pytest.LogCaptureFixture) -> None:
    tier = make(fdatasync={1: fails(errno.EIO)})
    held = put(tier, range(8), QUARTER)
    assert "segment 1 may be lost" in caplog.text
    for number, location in held.items():
        assert_holds(tier, number, location)
    tier.close(remove=False)
    assert {block.key for block in make().recovered()} == {key_of(number) for number in held}


def test_a_short_write_is_continued(make) -> None:
    tier = make(pwritev={1: short(5000), 2: short(1)})
    for number, location in put(tier, range(3), QUARTER).items():
        assert_holds(tier, number, location)


def test_a_write_of_zero_bytes_is_an_error_not_a_loop(make) -> None:
    tier = make(pwritev={EVERY: short(0)})
    assert tier.append([record_of(1, KIB)])[0].refused is Refusal.IO_ERROR


def test_a_torn_tail_that_cannot_be_truncated_still_counts(make) -> None:
    tier = make(pwritev={1: short(9 * KIB), 2: fails(errno.EIO)}, truncate={1: fails(errno.EIO)})
    answers = tier.append([record_of(number, QUARTER) for number in range(3)])
    assert [answer.refused for answer in answers] == [None, None, Refusal.IO_ERROR]
    assert segments_in(tier.folder) == {1: 9 * KIB + footer_bytes(2)}
    assert tier.used_bytes == 8 * KIB + 12 * KIB
    tier.close(remove=False)
    assert len(make().recovered()) == 2


def test_a_segment_that_cannot_be_created_is_a_refusal(make) -> None:
    tier = make(open={1: fails(errno.ENOSPC), 2: fails(errno.EMFILE)})
    assert tier.append([record_of(1, KIB)])[0].refused is Refusal.NO_SPACE
    assert tier.append([record_of(1, KIB)])[0].refused is Refusal.IO_ERROR
    assert put(tier, [1], KIB)


def test_a_segment_that_cannot_be_removed_still_counts(make) -> None:
    tier = make(truncate={1: fails(errno.EIO)}, unlink={1: fails(errno.EIO)})
    put(tier, range(12), QUARTER)
    before = tier.used_bytes
    assert tier.reclaim(1) == 0
    assert tier.used_bytes == before
    tier.check()
    assert tier.reclaim(2) == SEGMENT  # emptied, though its name stays
    assert segments_in(tier.folder)[2] == 0
    assert tier.oldest_sealed() is None


def test_segments_removed_by_others_are_misses(make) -> None:
    tier = make()
    held = put(tier, range(8), QUARTER)
    segment_path(tier.folder, 1).unlink()
    assert_unreadable(tier, held[0], 0, Kind.STORAGE)
    assert tier.reclaim(1) == SEGMENT


@pytest.mark.parametrize("at", [0, 8, 70, 100, 130, 3000, QUARTER - 1])
def test_a_flipped_byte_is_an_error_and_the_block_can_be_removed(make, at: int) -> None:
    tier = make()
    held = put(tier, range(3), QUARTER)
    with segment_path(tier.folder, 1).open("r+b") as file:
        file.seek(held[1].offset + at)
        byte = file.read(1)[0]
        file.seek(held[1].offset + at)
        file.write(bytes([byte ^ 0x10]))
    assert_unreadable(tier, held[1], 1, Kind.CORRUPT)
    assert_holds(tier, 0, held[0])
    assert_holds(tier, 2, held[2])
    assert tier.forget(held[1])


def test_a_file_truncated_by_others_is_an_error(make) -> None:
    tier = make()
    held = put(tier, range(5), QUARTER)
    os.truncate(segment_path(tier.folder, 1), 5 * KIB)
    assert_holds(tier, 0, held[0])
    assert_unreadable(tier, held[1], 1, Kind.CORRUPT)
    assert_unreadable(tier, held[3], 3, Kind.CORRUPT)
    tier.reclaim(1)


def test_read_errors_and_short_reads(make) -> None:
    tier = make(preadv={1: fails(errno.EIO), 2: short(100), 3: short(1000)})
    location = put(tier, [1], QUARTER)[1]
    assert_unreadable(tier, location, 1, Kind.STORAGE)
    assert_holds(tier, 1, location)  # in three pieces


def test_a_location_that_does_not_match_its_frame_is_an_error(make) -> None:
    tier = make()
    first, second = put(tier, range(2), QUARTER).values()
    wrong = [first._replace(offset=1), first._replace(offset=second.offset), first._replace(codec=9), first._replace(raw_bytes=1)]
    wrong += [
        first._replace(stored_bytes=8 * KIB),
        first._replace(stored_bytes=0),
        first._replace(tier=Tier.HOST),
        first._replace(offset=1 << 40),
    ]
    for location in wrong:
        assert_unreadable(tier, location, 0, Kind.CORRUPT)
    assert_unreadable(tier, first._replace(segment=5), 0, Kind.STORAGE)


def test_a_reader_keeps_few_files_open(make) -> None:
    tier = make()
    held = put(tier, range(20), QUARTER)
    reader = SegmentReader(tier.folder, max_open=2)
    before = len(os.listdir("/proc/self/fd"))
    for number, location in held.items():
        assert_holds(reader, number, location)
        reader.check()
    assert len(os.listdir("/proc/self/fd")) == before + 2
    reader.close()


def test_a_reader_closes_removed_files_when_it_opens_another(make) -> None:
    tier = make()
    held = put(tier, range(12), QUARTER)
    segments = sorted({location.segment for location in held.values()})
    first = {location.segment: number for number, location in reversed(held.items())}
    reader = SegmentReader(tier.folder)
    before = len(os.listdir("/proc/self/fd"))
    for segment in segments[:2]:
        assert_holds(reader, first[segment], held[first[segment]])
    assert len(os.listdir("/proc/self/fd")) == before + 2
    for segment in segments[:2]:
        tier.reclaim(segment)
    assert_holds(reader, first[segments[2]], held[first[segments[2]]])
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()


def test_room_is_freed_at_once_even_if_a_reader_has_the_file_open(make) -> None:
    tier = make()
    held = put(tier, range(8), QUARTER)
    fd = os.open(segment_path(tier.folder, 1), os.O_RDONLY)
    reader = SegmentReader(tier.folder)
    assert_holds(reader, 0, held[0])
    tier.reclaim(1)
    assert os.fstat(fd).st_blocks == 0
    assert_unreadable(reader, held[0], 0, Kind.STORAGE)
    os.close(fd)
    reader.close()


def test_a_reused_segment_number_is_not_read_from_the_old_file(tmp_path: Path) -> None:
    reader = SegmentReader(tmp_path / "disk")
    for number in range(3):
        with DiskTier(tmp_path / "disk", CAPACITY, SEGMENT, owner=f"owner {number}") as tier:
            location = put(tier, [number], QUARTER)[number]
            assert location.segment == 1
            assert_holds(reader, number, location)
    reader.close()


def test_reads_continue_during_a_slow_append(make) -> None:
    entered, gate = threading.Event(), threading.Event()
    tier = make(pwritev={3: waits(entered, gate)})
    held = put(tier, range(4), QUARTER)
    written: dict = {}
    writer = threading.Thread(target=lambda: written.update(put(tier, [9], QUARTER)))
    writer.start()
    assert entered.wait(60)
    assert_holds(tier, 0, held[0])
    assert tier.needs_reclaim(KIB) is None
    assert tier.keys_in(1) == [key_of(number) for number in range(4)]
    assert tier.reclaim(1) == SEGMENT
    gate.set()
    writer.join()
    assert_holds(tier, 9, written[9])


def test_a_read_of_a_segment_being_reclaimed_gives_the_block_or_an_error(make) -> None:
    entered, gate = threading.Event(), threading.Event()
    tier = make(preadv={1: short(1000), 2: waits(entered, gate)})
    held = put(tier, range(8), QUARTER)
    outcome: list = []

    def read() -> None:
        try:
            outcome.append(tier.read(held[0], key_of(0)))
        except TieredKVError as error:
            outcome.append(error.kind)

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.wait(60)
    tier.reclaim(1)
    gate.set()
    reader.join()
    assert outcome in ([Kind.CORRUPT], [Kind.STORAGE])


def test_many_readers_never_get_wrong_bytes_while_segments_are_replaced(make) -> None:
    tier = make()
    reader = SegmentReader(tier.folder, max_open=2)
    held = put(tier, range(40), QUARTER)
    done = threading.Event()
    wrong: list[object] = []
    reads = [0] * 3

    def read_all(turn: int) -> None:
        while not done.is_set():
            for number, location in list(held.items()):
                try:
                    assert_holds(reader, number, location)
                    reads[turn] += 1
                except TieredKVError as error:
                    if error.kind not in (Kind.STORAGE, Kind.CORRUPT):
                        wrong.append(error)
                except AssertionError as error:
                    wrong.append(error)

    threads = [threading.Thread(target=read_all, args=(turn,)) for turn in range(3)]
    for thread in threads:
        thread.start()
    for number in range(40, 160, 4):
        while (segment := tier.needs_reclaim(16 * KIB)) is not None:
            tier.reclaim(segment)
        held.update(put(tier, range(number, number + 4), QUARTER))
    done.set()
    for thread in threads:
        thread.join()
    reader.check()
    reader.close()
    assert not wrong
    assert all(reads)


READ_ELSEWHERE = """
import sys
from tests.unit.tiers.records import assert_holds
from tiered_kv.blocks import Location, Tier
from tiered_kv.tiers.disk.segments import SegmentReader
tier, *rest = map(int, sys.argv[2:])
assert_holds(SegmentReader(sys.argv[1]), 1, Location(Tier(tier), *rest))
print("the same bytes")
"""


def test_another_process_reads_with_folder_and_location_alone(make) -> None:
    tier = make()
    location = put(tier, range(3), QUARTER)[1]
    command = [sys.executable, "-c", READ_ELSEWHERE, str(tier.folder), *map(str, map(int, location))]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    assert done.stdout == "the same bytes\n", done.stderr


def test_a_tier_can_be_wrapped_in_faults(make) -> None:
    plan = FaultPlan(append={2: refuses(Refusal.IO_ERROR)}, read={1: raises(TieredKVError(Kind.CORRUPT, "planned"))})
    tier = Faulty(make(), plan)
    location = put(tier, [1], KIB)[1]
    assert tier.append([record_of(2, KIB)]) == [(None, Refusal.IO_ERROR)]
    with pytest.raises(TieredKVError, match="planned"):
        tier.read(location, key_of(1))
    assert_holds(tier, 1, location)
    assert (tier.name, tier.used_bytes) == ("disk", 12 * KIB)
    assert plan.calls == {"append": 2, "read": 2}
