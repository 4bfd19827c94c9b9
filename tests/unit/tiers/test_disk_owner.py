"""The owner of a folder: locks, other stores' segments, claiming folders, and unusable folders."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.tiers.records import KIB, QUARTER, assert_holds, key_of, put
from tiered_kv.blocks import Location
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.folder import claim_folder, unused_below
from tiered_kv.tiers.disk.segments import Files, segment_path, segments_in
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.faulty import EVERY, FaultPlan, Faulty, fails

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
    """Creates a folder with blocks of an owner called "me"."""
    tier = disk(folder)
    held = put(tier, range(count), QUARTER)
    tier.close(remove=False)
    return held


@pytest.mark.parametrize("owner", ["me", "another"])
def test_a_live_owners_folder_is_rejected(folder: Path, owner: str) -> None:
    with disk(folder) as tier:
        held = put(tier, [1], KIB)
        assert_refused(folder, "in use by a live cluster .me.", owner)
        assert_holds(tier, 1, held[1])


HOLD = """
import sys
from tiered_kv.tiers.disk.tier import DiskTier
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


@pytest.mark.parametrize("owner", ["me", "another"])
def test_the_next_owner_has_the_content(folder: Path, owner: str) -> None:
    held = left_behind(folder)
    (folder / "notes.txt").write_text("mine")
    with disk(folder, owner) as tier:
        assert [block.key for block in tier.recovered()] == [key_of(number) for number in held]
        for number, location in held.items():
            assert_holds(tier, number, location)
        assert put(tier, [20], QUARTER)[20].segment == 4
        assert_refused(folder, f"in use by a live cluster .{owner}.")
    assert os.listdir(folder) == ["notes.txt"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_segments_of_another_secret_are_rejected_and_left_unchanged(folder: Path) -> None:
    with DiskTier(folder, CAPACITY, SEGMENT, owner="me", secret="a") as tier:
        held = put(tier, range(5), QUARTER)
        tier.close(remove=False)
    before = contents(folder)
    for secret in ("b", ""):
        with pytest.raises(TieredKVError, match=r"disk_path: .* holds segments of another secret; remove them or name another") as caught:
            DiskTier(folder, CAPACITY, SEGMENT, owner="me", secret=secret)
        assert caught.value.context["setting"] == "disk_path"
    assert contents(folder) == before
    assert not any(b"secret" in content for content in before.values())
    with DiskTier(folder, CAPACITY, SEGMENT, owner="me", secret="a") as tier:
        assert len(tier.recovered()) == len(held)


def test_a_segment_copied_from_another_store_is_rejected(folder: Path, tmp_path: Path) -> None:
    left_behind(folder)
    with DiskTier(tmp_path / "other", CAPACITY, SEGMENT, owner="me", secret="a") as other:
        put(other, range(5), QUARTER)
        (folder / "segment-0000000009.tkv").write_bytes((other.folder / "segment-0000000001.tkv").read_bytes())
    assert_refused(folder, "another secret")
    assert 9 in segments_in(folder)


@pytest.mark.parametrize(
    ("owner_file", "what"),
    [
        (b"", "unknown origin"),
        (b"\xff\xfe", "unknown origin"),
        (b"[]", "unknown origin"),
        (b'{"owner": "me"}', "unknown origin"),
        (None, "unknown origin"),
        (b'{"format": 1, "owner": "me"}', "another version"),
        (b'{"format": 99, "owner": "me", "store": ""}', "another version"),
        (b'{"format": 2, "owner": "me", "store": "00"}', "another secret"),
    ],
)
def test_segments_of_unknown_origin_or_version_are_rejected_and_left_unchanged(folder: Path, owner_file: bytes | None, what: str) -> None:
    left_behind(folder)
    (folder / "owner").unlink()
    if owner_file is not None:
        (folder / "owner").write_bytes(owner_file)
    before = contents(folder)
    assert_refused(folder, what)
    assert contents(folder) == before
    for segment in segments_in(folder):
        segment_path(folder, segment).unlink()
    disk(folder).close()  # without segments the folder is anybody's


@pytest.mark.parametrize("capacity", [64 * KIB, 100 * KIB, 200 * KIB])
def test_a_smaller_cap_holds_from_the_start(folder: Path, capacity: int) -> None:
    held = left_behind(folder, 50)
    with disk(folder, capacity=capacity) as tier:
        tier.check()
        assert capacity - 2 * SEGMENT < tier.used_bytes <= capacity
        left = [block.location.segment for block in tier.recovered()]
        assert sorted(set(left)) == list(range(left[0], held[49].segment + 1))  # the newest


def test_a_folder_that_cannot_be_shrunk_below_the_cap_is_rejected(folder: Path) -> None:
    left_behind(folder, 50)
    files = Faulty(Files(), FaultPlan(truncate={EVERY: fails(errno.EIO)}))
    with pytest.raises(TieredKVError, match="disk_path") as caught:
        disk(folder, capacity=64 * KIB, files=files)
    assert caught.value.kind is Kind.STORAGE
    disk(folder).close()


def test_a_full_disk_does_not_stop_the_next_owner(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = left_behind(folder)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with disk(folder, "another") as tier:
        assert len(tier.recovered()) == len(held)
    assert_refused(folder, "No space left")  # a new folder has no heir


def claim(root: Path, owner: str, secret: str = "") -> DiskTier:
    return claim_folder(root, owner, lambda path: DiskTier(path, CAPACITY, SEGMENT, owner=owner, secret=secret))


def test_a_new_cluster_claims_the_folders_of_the_last_one(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    with claim(tmp_path, "one") as first:
        assert first.folder.name == "node-0"
        put(first, [1], KIB)
        first.close(remove=False)
    with claim(tmp_path, "two") as second:
        assert [block.key for block in second.recovered()] == [key_of(1)]
        with claim(tmp_path, "three") as third:
            assert (second.folder.name, third.folder.name) == ("node-0", "node-1")


def test_a_restarted_node_claims_its_own_folder_again(tmp_path: Path) -> None:
    tiers = [claim(tmp_path, owner) for owner in ("a", "b", "c")]
    for tier in tiers:
        tier.close(remove=False)
    with claim(tmp_path, "c") as tier:
        assert tier.folder.name == "node-2"
        with pytest.raises(TieredKVError, match=r"in use by a live cluster .c."):
            claim(tmp_path, "c")


def test_a_folder_of_another_secret_is_an_error_and_not_claimed(tmp_path: Path) -> None:
    with claim(tmp_path, "one", secret="a") as tier:
        put(tier, [1], KIB)
        claim(tmp_path, "two", secret="b").close()  # a live one is none of ours
        tier.close(remove=False)
    with pytest.raises(TieredKVError, match=r"disk_path: .*node-0 holds segments of another secret"):
        claim(tmp_path, "two", secret="b")


def test_folders_claimed_by_others_meanwhile_are_skipped(tmp_path: Path) -> None:
    asked: list[str] = []

    def make(path: Path) -> str:
        asked.append(path.name)
        if path.name != "node-2":
            raise TieredKVError(Kind.STORAGE, "disk_path: taken", in_use=True)
        return path.name

    assert claim_folder(tmp_path, "me", make) == "node-2"
    assert asked == ["node-0", "node-1", "node-2"]


def test_unused_folders_are_listed_with_their_bytes(tmp_path: Path) -> None:
    with claim(tmp_path, "one") as one, claim(tmp_path, "two") as two:
        for tier in (one, two):
            put(tier, [1], KIB)
        assert unused_below(tmp_path) == {}
        two.close(remove=False)
        (tmp_path / "tkv-old-n0").mkdir()
        (tmp_path / "tkv-old-n0" / "segment").write_bytes(bytes(5000))
        (tmp_path / "others").mkdir()
        unused = unused_below(tmp_path)
        assert list(unused) == ["node-1", "tkv-old-n0"]
        assert unused["tkv-old-n0"] == 5000
        assert unused["node-1"] > KIB


def test_an_error_is_raised_if_every_folder_is_in_use(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        raise TieredKVError(Kind.STORAGE, "disk_path: taken", in_use=True)

    with pytest.raises(TieredKVError, match="disk_path: all folders"):
        claim_folder(tmp_path, "me", make)


def test_the_error_names_a_missing_parent(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no" / "disk", "does not exist")


def test_the_error_names_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("")
    assert_refused(tmp_path / "disk", "cannot be used")
    assert_refused(tmp_path / "disk" / "below", "cannot be used")


def test_the_error_names_an_unwritable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert_refused(folder, "not writable")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_the_error_names_a_read_only_folder(folder: Path) -> None:
    folder.mkdir(mode=0o500)
    assert_refused(folder, "Permission denied")


def test_only_their_owner_may_read_the_files(folder: Path) -> None:
    with disk(folder) as tier:
        put(tier, [1], KIB)
        assert folder.stat().st_mode & 0o077 == 0
        assert all(entry.stat().st_mode & 0o077 == 0 for entry in os.scandir(folder))
