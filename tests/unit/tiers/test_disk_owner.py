"""Whose folder it is: locks, stale folders, restarts of the same owner, and folders that cannot be used."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.tiers.records import KIB, assert_holds, key_of, put
from tiered_kv.blocks import Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk import DiskTier
from tiered_kv.tiers.faulty import EVERY, Faulty, Plan, fails
from tiered_kv.tiers.segments import Files, segments_in

CAPACITY, SEGMENT = 256 * KIB, 16 * KIB


def disk(folder: Path, owner: str = "me", capacity: int = CAPACITY, files: Files | None = None) -> DiskTier:
    return DiskTier(folder, capacity, SEGMENT, owner=owner, files=files)


def assert_refused(folder: Path, match: str, owner: str = "me") -> None:
    with pytest.raises(TieredKVError, match=f"disk_path.*{match}") as caught:
        disk(folder, owner)
    assert caught.value.kind is Kind.STORAGE
    assert caught.value.context["setting"] == "disk_path"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


def left_behind(folder: Path, count: int = 10) -> dict[int, Location]:
    """What is found after an owner called "me" was killed."""
    tier = disk(folder)
    held = put(tier, range(count), 4 * KIB)
    tier.close(remove=False)
    return held


@pytest.mark.parametrize("owner", ["me", "another"])
def test_a_live_owners_folder_is_refused(folder: Path, owner: str) -> None:
    with disk(folder) as tier:
        held = put(tier, [1], KIB)
        assert_refused(folder, "in use by a live cluster .me.", owner)
        assert_holds(tier, 1, held[1])


HOLD = """
import sys
from tiered_kv.tiers.disk import DiskTier
tier = DiskTier(sys.argv[1], 1 << 20, 1 << 16, owner="the other process")
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free(folder: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert_refused(folder, "the other process")
        holder.kill()
        holder.wait()
    disk(folder).close()


def test_a_restarted_owner_adopts_what_it_knows(folder: Path) -> None:
    held = left_behind(folder)
    known = {key_of(number): held[number] for number in (0, 2, 9)}
    with disk(folder) as tier:
        assert tier.adopt(known) == []
        assert set(segments_in(folder)) == {1, 3}
        assert tier.keys_in(1) == [key_of(0), key_of(2)]
        tier.check()
        for number in (0, 2, 9):
            assert_holds(tier, number, held[number])
        new = put(tier, [20], 4 * KIB)[20]
        assert new.segment == 4
        assert tier.forget(held[9])
        assert set(segments_in(folder)) == {1, 4}


def test_a_restarted_owner_that_knows_nothing_starts_empty(folder: Path) -> None:
    left_behind(folder)
    with disk(folder) as tier:
        tier.check()
        new = put(tier, [20], 4 * KIB)[20]
        assert tier.adopt({}) == []
        assert list(segments_in(folder)) == [new.segment]
        assert_holds(tier, 20, new)
        tier.check()


def test_what_cannot_be_where_it_is_said_to_be_is_not_adopted(folder: Path) -> None:
    held = left_behind(folder)
    good = held[1]
    wrong = [
        good._replace(offset=good.offset + 1),
        good._replace(offset=13 * KIB),
        good._replace(segment=9),
        good._replace(tier=Tier.HOST),
        good._replace(stored_bytes=0),
    ]
    with disk(folder) as tier:
        known = {key_of(1): good} | {key_of(100 + i): location for i, location in enumerate(wrong)}
        assert sorted(tier.adopt(known)) == sorted(key_of(100 + i) for i in range(len(wrong)))
        tier.check()
        assert tier.adopt({key_of(2): held[2]}) == [key_of(2)]  # once and for all


def test_a_dead_owners_segments_are_removed(folder: Path) -> None:
    held = left_behind(folder)
    (folder / "notes.txt").write_text("mine")
    with disk(folder, owner="another") as tier:
        assert segments_in(folder) == {}
        assert tier.used_bytes == 8 * KIB
        assert tier.adopt({key_of(1): held[1]}) == [key_of(1)]
    assert os.listdir(folder) == ["notes.txt"]


@pytest.mark.parametrize("owner_file", [b"", b"\xff\xfe", b"[]", b'{"format": 99, "owner": "me"}', b'{"owner": "me"}', None])
def test_segments_of_an_unknown_owner_or_format_are_removed(folder: Path, owner_file: bytes | None) -> None:
    left_behind(folder)
    (folder / "owner").unlink()
    if owner_file is not None:
        (folder / "owner").write_bytes(owner_file)
    with disk(folder):
        assert segments_in(folder) == {}


def test_a_smaller_cap_holds_from_the_start(folder: Path) -> None:
    left_behind(folder, 50)
    with disk(folder, capacity=64 * KIB) as tier:
        tier.check()
        assert tier.used_bytes <= 64 * KIB
        assert max(segments_in(folder)) == 13


def test_what_cannot_be_brought_below_the_cap_is_refused(folder: Path) -> None:
    left_behind(folder, 50)
    files = Faulty(Files(), Plan(truncate={EVERY: fails(errno.EIO)}))
    with pytest.raises(TieredKVError, match="disk_path") as caught:
        disk(folder, capacity=64 * KIB, files=files)
    assert caught.value.kind is Kind.STORAGE
    disk(folder).close()


def test_stale_segments_that_cannot_be_removed_are_said_to_be(folder: Path) -> None:
    left_behind(folder)
    with pytest.raises(TieredKVError, match="disk_path"):
        disk(folder, owner="another", files=Faulty(Files(), Plan(unlink={EVERY: fails(errno.EACCES)})))
    disk(folder).close()


def test_a_missing_parent_is_said_to_be(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no" / "disk", "does not exist")


def test_a_file_in_the_place_of_the_folder_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("")
    assert_refused(tmp_path / "disk", "cannot be used")
    assert_refused(tmp_path / "disk" / "below", "cannot be used")


def test_a_folder_that_cannot_be_written_is_said_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert_refused(folder, "not writable")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_said_to_be(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    assert_refused(folder, "Permission denied")


def test_files_are_for_their_owner_alone(folder: Path) -> None:
    with disk(folder) as tier:
        put(tier, [1], KIB)
        assert folder.stat().st_mode & 0o077 == 0
        assert all(entry.stat().st_mode & 0o077 == 0 for entry in os.scandir(folder) if entry.name != "owner")
