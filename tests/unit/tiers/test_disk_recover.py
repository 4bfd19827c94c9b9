"""Recovery at a restart: from footers, and by scanning after a crash or damage. It never finds anything else."""

import errno
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.tiers.records import KIB, QUARTER, ROOT, assert_holds, flip, key_of, put, record_of
from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk import footer
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, ROW_BYTES, TRAILER_BYTES, Entry, footer_bytes, store_tag
from tiered_kv.tiers.disk.recover import frames_in
from tiered_kv.tiers.disk.segments import Files, segment_path, segments_in
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.faulty import FaultPlan, Faulty, fails
from tiered_kv.tiers.log import RecoveredBlock

CAPACITY, SEGMENT = 256 * KIB, 16 * KIB
PIECE = ENTRY_BYTES + QUARTER
FULL = 4 * PIECE + footer_bytes(4)


def disk(folder: Path, capacity: int = CAPACITY, files: Files | None = None) -> DiskTier:
    return DiskTier(folder, capacity, SEGMENT, owner="me", files=files)


@pytest.fixture
def left(tmp_path: Path) -> tuple[Path, dict[int, Location]]:
    """A folder of a closed tier, and its blocks, in segments of 4, 4 and 2."""
    with disk(tmp_path / "disk") as tier:
        held = put(tier, range(10), QUARTER)
        tier.close(remove=False)
    return tmp_path / "disk", held


def found_in(folder: Path, **options) -> set[int]:
    """Returns the numbers of the blocks that a new tier recovers. Reads each of them, and checks the tier."""
    with disk(folder, **options) as tier:
        recovered = {block.key: block.location for block in tier.recovered()}
        tier.check()
        numbers = {number for number in range(100) if key_of(number) in recovered}
        assert len(numbers) == len(recovered)
        for number in numbers:
            assert_holds(tier, number, recovered[key_of(number)])
        tier.close(remove=False)
    return numbers


def reads_of(folder: Path) -> int:
    """Returns how many reads opening the folder takes: two for each segment if all have footers."""
    plan = FaultPlan()
    with disk(folder, files=Faulty(Files(), plan)) as tier:
        tier.close(remove=False)
    return plan.calls["preadv"]


def test_every_block_is_recovered_at_its_location_with_its_parents(left) -> None:
    folder, held = left
    assert segments_in(folder) == {1: FULL, 2: FULL, 3: 2 * PIECE + footer_bytes(2)}
    assert reads_of(folder) == 6
    with disk(folder) as tier:
        expected = [RecoveredBlock(BlockInfo(key_of(n), key_of(n - 1) if n else None, ROOT), location) for n, location in held.items()]
        assert tier.recovered() == expected
        assert tier.recovered() == []
        assert tier.keys_in(2) == [key_of(number) for number in range(4, 8)]
        assert tier.forget(held[9])
        tier.check()


def test_blocks_appended_after_a_restart_are_recovered_with_the_old_ones(left) -> None:
    folder, _ = left
    for turn in range(3):
        with disk(folder) as tier:
            put(tier, [20 + turn], QUARTER)
            tier.close(remove=False)
    assert found_in(folder) == {*range(10), 20, 21, 22}


def test_a_reader_with_its_own_files_reads_recovered_blocks(left) -> None:
    folder, held = left
    with disk(folder) as tier:
        for number, location in held.items():
            assert_holds(tier, number, location)
        assert held[0].tier is Tier.DISK


def crashed(tmp_path: Path, count: int = 6) -> Path:
    """A folder as a killed process leaves it."""
    with disk(tmp_path / "disk") as tier:
        put(tier, range(count), QUARTER)
        shutil.copytree(tier.folder, tmp_path / "crashed")
    return tmp_path / "crashed"


def test_a_crash_loses_nothing_and_is_scanned_once(tmp_path: Path) -> None:
    folder = crashed(tmp_path)
    assert segments_in(folder) == {1: FULL, 2: 2 * PIECE}
    assert found_in(folder) == set(range(6))
    assert segments_in(folder) == {1: FULL, 2: 2 * PIECE + footer_bytes(2)}
    assert reads_of(folder) == 4
    with disk(folder) as tier:
        assert tier.recovered()[5].info == (key_of(5), key_of(4), ROOT, None)


HOLD = """
import sys
from tests.unit.tiers.records import put
from tiered_kv.tiers.disk.tier import DiskTier
tier = DiskTier(sys.argv[1], 256 << 10, 16 << 10, owner="killed")
print(len(put(tier, range(11), 3584)), flush=True)
sys.stdin.read()
"""


def test_blocks_written_by_a_killed_process_are_recovered(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "disk")]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"11\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert found_in(tmp_path / "disk") == set(range(11))


CUTS = [0, 1, ENTRY_BYTES - 1, ENTRY_BYTES, ENTRY_BYTES + 1, ENTRY_BYTES + 300, PIECE - 16, PIECE - 1]


@pytest.mark.parametrize("at", [*(frames * PIECE + cut for frames in range(4) for cut in CUTS)])
def test_a_tail_torn_anywhere_loses_only_the_torn_frame(tmp_path: Path, at: int) -> None:
    folder = crashed(tmp_path, 4)
    with segment_path(folder, 1).open("r+b") as file:
        file.truncate(at)
    whole = at // PIECE
    assert found_in(folder) == set(range(whole))
    assert segments_in(folder) == ({1: whole * PIECE + footer_bytes(whole)} if whole else {})


FOOTER_CUTS = [1, TRAILER_BYTES - 1, TRAILER_BYTES, TRAILER_BYTES + 1, TRAILER_BYTES + ROW_BYTES, footer_bytes(4) - 1, footer_bytes(4)]


@pytest.mark.parametrize("missing", FOOTER_CUTS)
def test_a_torn_footer_loses_nothing(left, missing: int) -> None:
    folder, _ = left
    with segment_path(folder, 1).open("r+b") as file:
        file.truncate(FULL - missing)
    assert found_in(folder) == set(range(10))
    assert segments_in(folder)[1] == FULL


@pytest.mark.parametrize("at", [*range(-1, -TRAILER_BYTES - 1, -5), -TRAILER_BYTES - 1, -TRAILER_BYTES - ROW_BYTES, -footer_bytes(4)])
def test_a_flipped_byte_in_the_footer_only_requires_a_scan(left, at: int) -> None:
    folder, _ = left
    flip(segment_path(folder, 1), at)
    assert found_in(folder) == set(range(10))
    assert reads_of(folder) == 6


@pytest.mark.parametrize("at", [0, 40, 127, ENTRY_BYTES, ENTRY_BYTES + 9, ENTRY_BYTES + 500, PIECE - 1])
def test_a_flipped_byte_in_a_frame_loses_only_its_block(left, at: int) -> None:
    folder, held = left
    flip(segment_path(folder, 1), PIECE + at)
    with disk(folder) as tier:
        assert len(tier.recovered()) == 10
        if at >= ENTRY_BYTES:
            with pytest.raises(TieredKVError) as caught:
                tier.read(held[1], key_of(1))
            assert caught.value.kind is Kind.CORRUPT
        for number in (0, 2, 3):
            assert_holds(tier, number, held[number])
        moved = [key for key, _ in tier.reinsert(1, tier.keys_in(1))]
        assert moved == [key_of(number) for number in range(4) if number != 1 or at < ENTRY_BYTES]


@pytest.mark.parametrize(("at", "left_over"), [(ENTRY_BYTES + 500, {0, 2, 3}), (PIECE - 1, {0, 2, 3}), (3, {0}), (20, {0})])
def test_a_scan_continues_after_a_damaged_frame_and_ends_at_a_damaged_entry(tmp_path: Path, at: int, left_over: set[int]) -> None:
    folder = crashed(tmp_path, 4)
    flip(segment_path(folder, 1), PIECE + at)
    assert found_in(folder) == left_over


def test_a_scan_ignores_frames_of_another_place_or_secret(tmp_path: Path) -> None:
    folder = crashed(tmp_path)
    shutil.copy(segment_path(folder, 2), segment_path(folder, 7))
    assert len(frames_in(folder, 2, store_tag(""), Files()).entries) == 2
    assert frames_in(folder, 7, store_tag(""), Files()).entries == []
    assert frames_in(folder, 2, store_tag("another"), Files()).entries == []


def test_a_block_stored_twice_is_recovered_once_at_its_last_location(tmp_path: Path) -> None:
    with disk(tmp_path / "disk") as tier:
        put(tier, range(8), QUARTER)
        moved = dict(tier.reinsert(1, tier.keys_in(1)[:2]))
        tier.forget(tier.append([record_of(5, QUARTER)])[0].location)
        shutil.copytree(tier.folder, tmp_path / "crashed")  # before the segment was reclaimed
    with disk(tmp_path / "crashed") as tier:
        recovered = {block.key: block.location for block in tier.recovered()}
        assert len(recovered) == 8
        assert {key: recovered[key] for key in moved} == moved
        assert tier.keys_in(1) == [key_of(2), key_of(3)]
        tier.check()


def test_a_segment_whose_blocks_were_all_reinserted_is_removed(tmp_path: Path) -> None:
    with disk(tmp_path / "disk") as tier:
        put(tier, range(5), QUARTER)
        tier.reinsert(1, tier.keys_in(1))
        shutil.copytree(tier.folder, tmp_path / "crashed")
    assert found_in(tmp_path / "crashed") == set(range(5))
    assert 1 not in segments_in(tmp_path / "crashed")


def test_blocks_removed_before_their_segment_was_sealed_are_not_recovered(tmp_path: Path) -> None:
    with disk(tmp_path / "disk") as tier:
        held = put(tier, range(3), QUARTER)
        tier.forget(held[1])
        tier.close(remove=False)
    assert found_in(tmp_path / "disk") == {0, 2}


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_an_unreadable_segment_counts_and_is_recovered_once_readable(left, call: str) -> None:
    folder, _ = left
    with disk(folder, files=Faulty(Files(), FaultPlan(**{call: {1: fails(errno.EIO)}}))) as tier:
        assert {block.location.segment for block in tier.recovered()} == {2, 3}
        assert tier.used_bytes == 8 * KIB + 16 * KIB + 16 * KIB + 8 * KIB
        tier.check()
        assert put(tier, [20], QUARTER)[20].segment == 4
        tier.close(remove=False)
    assert found_in(folder) == {*range(10), 20}


def test_a_scan_with_a_read_error_loses_no_later_blocks(tmp_path: Path) -> None:
    folder = crashed(tmp_path, 3)
    # footer: 1; then entry and frame in turn: the second frame cannot be read
    with disk(folder, files=Faulty(Files(), FaultPlan(preadv={5: fails(errno.EIO)}))) as tier:
        assert [block.key for block in tier.recovered()] == [key_of(0)]
        tier.check()
        tier.close(remove=False)
    assert found_in(folder) == {0, 1, 2}


@pytest.mark.parametrize("call", ["truncate", "pwritev"])
def test_a_tail_that_can_be_neither_truncated_nor_sealed_counts(tmp_path: Path, call: str) -> None:
    folder = crashed(tmp_path, 3)
    with segment_path(folder, 1).open("r+b") as file:
        file.truncate(3 * PIECE - 5)
    with disk(folder, files=Faulty(Files(), FaultPlan(**{call: {1: fails(errno.EIO)}}))) as tier:
        assert len(tier.recovered()) == 2
        tier.check()
        tier.close(remove=False)
    assert found_in(folder) == {0, 1}


def test_a_footer_without_room_below_the_cap_is_not_written(tmp_path: Path) -> None:
    with DiskTier(tmp_path / "disk", 1 << 20, 128 * KIB, owner="me") as tier:
        size = 7 * 4 * KIB - ENTRY_BYTES
        put(tier, range(2), size)
        shutil.copytree(tier.folder, tmp_path / "crashed")
    with disk(tmp_path / "crashed", capacity=64 * KIB) as tier:
        assert len(tier.recovered()) == 2
        assert tier.used_bytes == 64 * KIB
        tier.check()


def test_a_footer_with_invalid_surroundings_is_rejected() -> None:
    rows = footer.pack_row(Entry(key_of(1), None, None, 3, ENTRY_BYTES, 700, 900))
    trailer = memoryview(footer.pack_trailer(rows, store_tag(""), 1, 828))
    assert footer.unpack_rows(memoryview(rows)) == [Entry(key_of(1), None, None, 3, ENTRY_BYTES, 700, 900)]
    assert footer.is_footer(trailer, memoryview(rows))
    assert not footer.is_footer(trailer, memoryview(rows[:-1]))
    assert footer.unpack_trailer(trailer[1:]) is None
    assert footer.unpack_trailer(memoryview(bytes(TRAILER_BYTES))) is None
    assert len(trailer) == TRAILER_BYTES
    assert len(rows) == ROW_BYTES
