"""A node's files: sizes and permissions, errors that name the setting, clean-up, and removal of dead nodes' files."""

import fcntl
import os
import struct
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory import shared
from tiered_kv.memory import words as w
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.shared import NodeFiles, node_directory, reclaim_stale
from tiered_kv.memory.view import NodeView

HOST_BYTES = 1 << 20
MINUTE_NS = 60 * 10**9


def error_of(call, *arguments, **options) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments, **options)
    return caught.value


@pytest.fixture
def files(tmp_path):
    made = NodeFiles.create(tmp_path, "c", "n", HOST_BYTES)
    yield made
    made.close()


def set_word(directory: Path, word: int, value: int) -> None:
    with (directory / "index").open("r+b") as file:
        file.seek(word * 8)
        file.write(struct.pack("@Q", value))


@given(st.integers(16 << 10, 1 << 45))
@settings(deadline=None)
def test_index_and_arena_together_never_exceed_the_cap(host_bytes):
    slots, arena_bytes = w.plan(host_bytes)
    assert slots >= 64 and slots & slots - 1 == 0
    assert slots == 64 or slots <= host_bytes // 4096 < 2 * slots
    assert arena_bytes > 0 and arena_bytes % 4096 == 0
    assert w.index_bytes(slots) % 4096 == 0
    assert host_bytes - 4096 < w.index_bytes(slots) + arena_bytes <= host_bytes


def test_a_cap_without_room_for_the_arena_is_rejected():
    error = error_of(w.plan, 8192)
    assert error.kind is Kind.CONFIG and "host" in str(error)


def test_files_have_the_planned_sizes_and_only_the_owner_may_use_them(files, tmp_path):
    slots, arena_bytes = w.plan(HOST_BYTES)
    assert (files.slots, files.arena_bytes) == (slots, arena_bytes)
    assert files.directory == tmp_path / "tkv-c-n" == node_directory(tmp_path, "c", "n")
    assert files.directory.stat().st_mode & 0o777 == 0o700
    for path, size in ((files.index_path, w.index_bytes(slots)), (files.arena_path, arena_bytes), (files.lock_path, 0)):
        assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_size == size
        assert path.stat().st_blocks * 512 >= size
    assert files.sock_path == files.directory / "sock"
    assert len(files.arena.tensor()) == arena_bytes


@pytest.mark.parametrize("name", ["", "a/b", "x" * 101, "ä"])
def test_names_that_cannot_be_paths_are_rejected(tmp_path, name):
    assert error_of(node_directory, tmp_path, name, "n").kind is Kind.CONFIG


def test_the_error_for_too_little_shared_memory_names_the_setting_and_leaves_no_files():
    facts = os.statvfs("/dev/shm")
    host_bytes = facts.f_bavail * facts.f_frsize + (1 << 30)
    error = error_of(NodeFiles.create, "/dev/shm", "small", f"n{os.getpid()}", host_bytes)
    assert error.kind is Kind.MEMORY and error.context["setting"] == "host"
    assert "host" in str(error) and "shm_path" in str(error)
    assert error.context["needed_bytes"] > error.context["available_bytes"] >= 0
    assert f"{error.context['needed_bytes'] / 2**20:.1f} MiB" in str(error)
    assert not node_directory("/dev/shm", "small", f"n{os.getpid()}").exists()


def test_running_out_of_memory_while_allocating_is_the_same_error(tmp_path, monkeypatch):
    def full(fd, start, nbytes):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    error = error_of(NodeFiles.create, tmp_path, "c", "n", HOST_BYTES)
    assert error.kind is Kind.MEMORY and error.context["setting"] == "host"
    assert list(tmp_path.iterdir()) == []


def test_the_error_for_an_unwritable_path_names_the_setting(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file", Path("/proc")):
        error = error_of(NodeFiles.create, path, "c", "n", HOST_BYTES)
        assert error.kind is Kind.MEMORY and error.context["setting"] == "shm_path"
        assert "shm_path" in str(error) and str(path) in str(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_the_error_for_a_read_only_path_names_the_setting(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert error_of(NodeFiles.create, tmp_path, "c", "n", HOST_BYTES).context["setting"] == "shm_path"
    finally:
        tmp_path.chmod(0o700)


def test_a_node_has_one_writer_and_many_readers(files):
    error = error_of(NodeFiles.attach, files.directory, writer=True)
    assert error.kind is Kind.MEMORY and "writer" in str(error)
    readers = [NodeFiles.attach(files.directory) for _ in range(2)]
    assert "not open for writing" in str(error_of(IndexWriter, readers[0]))
    files.close()
    NodeFiles.attach(files.directory, writer=True, cluster_id="c", node_id="n").close()
    for reader in readers:
        reader.close()


def test_creating_twice_is_rejected_and_harms_nothing(files, tmp_path):
    assert "exists" in str(error_of(NodeFiles.create, tmp_path, "c", "n", HOST_BYTES))
    assert files.index_path.exists()


def test_readers_reject_files_of_another_version(files):
    set_word(files.directory, w.VERSION, 9)
    error = error_of(NodeView.open, files.directory)
    assert error.kind is Kind.MEMORY and "version 9" in str(error) and f"version {w.FORMAT_VERSION}" in str(error)


@pytest.mark.parametrize(
    ("word", "value", "says"),
    [
        (w.MAGIC, 5, "not an index of tiered_kv"),
        (w.MAGIC, 0, "unfinished"),
        (w.CLUSTER, 5, "another cluster"),
        (w.NODE, 5, "another cluster or node"),
        (w.SLOTS, 128, "slots"),
        (w.SLOTS, 3, "slots"),
        (w.ARENA_BYTES, 4096, "arena"),
    ],
)
def test_foreign_or_damaged_files_are_rejected(files, word, value, says):
    set_word(files.directory, word, value)
    error = error_of(NodeFiles.attach, files.directory, cluster_id="c", node_id="n")
    assert error.kind is Kind.MEMORY and says in str(error)


def test_a_truncated_file_is_rejected(files):
    os.truncate(files.arena_path, 4096)
    assert "arena" in str(error_of(NodeFiles.attach, files.directory))
    os.truncate(files.index_path, 100)
    assert "unfinished" in str(error_of(NodeFiles.attach, files.directory))


def test_a_directory_that_others_may_write_to_is_rejected(files):
    files.directory.chmod(0o777)
    assert error_of(NodeFiles.attach, files.directory).context["setting"] == "shm_path"
    files.directory.chmod(0o700)


def test_a_missing_node_is_a_clear_error(tmp_path):
    error = error_of(NodeView.open, tmp_path / "tkv-c-n")
    assert error.kind is Kind.MEMORY and "no node's files" in str(error)


def test_a_start_after_a_clean_or_unclean_end_finds_the_files(tmp_path):
    for was_there in (False, True, True):
        files, found = NodeFiles.open_or_create(tmp_path, "c", "n", HOST_BYTES)
        assert found is was_there
        files.close()


def test_another_size_replaces_the_files_and_readers_of_the_old_ones_notice(tmp_path):
    files, _ = NodeFiles.open_or_create(tmp_path, "c", "n", HOST_BYTES)
    index = IndexWriter(files)
    view = NodeView.open(files.directory)
    index.close()
    files.close()
    larger, found = NodeFiles.open_or_create(tmp_path, "c", "n", 2 * HOST_BYTES)
    assert not found and larger.arena_bytes > files.arena_bytes
    assert not view.live
    view.arena.fill_(1)
    view.close()
    larger.close()


def test_a_node_that_died_while_it_was_created_can_start_again(tmp_path):
    directory = node_directory(tmp_path, "c", "n")
    for made in ([], ["lock"], ["lock", "index"]):
        directory.mkdir(0o700)
        for name in made:
            (directory / name).touch()
        files, found = NodeFiles.open_or_create(tmp_path, "c", "n", HOST_BYTES)
        assert not found
        files.remove()


def test_unused_files_of_another_version_are_replaced(files, tmp_path):
    reader = NodeFiles.attach(files.directory)
    files.close()
    set_word(reader.directory, w.VERSION, 9)
    assert "version 9" in str(error_of(NodeFiles.open_or_create, tmp_path, "c", "n", HOST_BYTES))
    reader.close()
    again, found = NodeFiles.open_or_create(tmp_path, "c", "n", HOST_BYTES)
    assert not found
    again.close()


def test_remove_deletes_all_of_its_own_files_and_no_others(files, tmp_path):
    view = NodeView.open(files.directory)
    files.remove()
    files.remove()
    assert list(tmp_path.iterdir()) == [] and not view.live
    view.close()
    successor = NodeFiles.create(tmp_path, "c", "n", HOST_BYTES)
    files.remove()
    assert successor.index_path.exists()
    successor.remove()


def test_closing_keeps_the_memory_of_tensors_in_use(files):
    tensor = files.arena.tensor()[:10]
    files.close()
    files.close()
    tensor.fill_(7)
    assert error_of(files.arena.tensor).kind is Kind.CLOSED


def test_a_node_waits_while_others_look_whether_its_directory_is_in_use(tmp_path, files, monkeypatch):
    """Who cleans up takes the lock for a moment, also while a node begins to use the directory."""
    files.close()
    with open(files.lock_path) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(0.05, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        timer.start()
        NodeFiles.attach(files.directory).close()
        timer.join()
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(shared, "LOOKED_AT_S", 0.01)
        with pytest.raises(TieredKVError, match="is being removed"):
            NodeFiles.attach(files.directory)


def test_only_dead_and_old_directories_are_reclaimed(tmp_path):
    names = ("dead", "young", "read", "alive")
    nodes = {name: NodeFiles.create(tmp_path, "c", name, HOST_BYTES) for name in names}
    now_ns = 10 * MINUTE_NS
    for name, files in nodes.items():
        index = IndexWriter(files)
        index.beat(now_ns - (MINUTE_NS // 2 if name == "young" else 2 * MINUTE_NS))
        index.close()
    view = NodeView.open(nodes["read"].directory)
    for name in ("dead", "young", "read"):
        nodes[name].close()
    (tmp_path / "tkv-file").touch()
    (tmp_path / "other").mkdir()
    assert reclaim_stale(tmp_path, now_ns) == [nodes["dead"].directory]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "tkv-c-alive", "tkv-c-read", "tkv-c-young", "tkv-file"]
    view.close()
    assert reclaim_stale(tmp_path, now_ns) == [nodes["read"].directory]
    assert reclaim_stale(tmp_path, now_ns + MINUTE_NS) == [nodes["young"].directory]
    nodes["alive"].close()


def test_a_heartbeat_from_before_a_reboot_is_stale(files, tmp_path):
    index = IndexWriter(files)
    index.beat(10**18)
    index.close()
    files.close()
    assert reclaim_stale(tmp_path, MINUTE_NS) == [files.directory]


def test_unfinished_directories_are_removed_by_age(tmp_path):
    directory = tmp_path / "tkv-c-n"
    directory.mkdir()
    assert reclaim_stale(tmp_path, 0) == []
    old_s = time.time() - 61
    os.utime(directory, (old_s, old_s))
    assert reclaim_stale(tmp_path, 0) == [directory]


def test_links_are_not_followed(files, tmp_path):
    other = tmp_path / "below"
    other.mkdir()
    (other / "tkv-c-link").symlink_to(files.directory)
    files.close()
    reclaim_stale(other, 10**18)
    assert files.index_path.exists()
    assert error_of(NodeFiles.attach, other / "tkv-c-link").kind is Kind.MEMORY


def test_a_directory_of_another_user_is_left_alone(files, tmp_path, monkeypatch):
    files.close()
    monkeypatch.setattr(shared.os, "geteuid", lambda: os.getuid() + 1)
    assert reclaim_stale(tmp_path, 10**18) == []
    assert error_of(NodeFiles.attach, files.directory).context["setting"] == "shm_path"


def test_the_index_has_slots_for_the_disk_tier_within_an_eighth_of_host():
    alone, _ = w.plan(2 << 20)
    slots, arena_bytes = w.plan(2 << 20, 64 << 20)
    assert slots == 2048 > alone
    assert w.index_bytes(slots) <= (2 << 20) // 8 + w.HEADER_BYTES + w.PAGE_BYTES
    assert w.index_bytes(slots) + arena_bytes <= 2 << 20
    assert w.plan(1 << 30, 1 << 50)[0] * w.BYTES_OF_SLOT <= (1 << 30) // 8
    assert w.plan(1 << 30, 1 << 20) == w.plan(1 << 30)


@pytest.mark.parametrize(("host_bytes", "lower_bytes"), [(64 << 20, 512 << 20), (16 << 30, 200 << 30), (1 << 30, 12 << 30)])
def test_blocks_of_64_kib_fill_host_and_disk_before_the_index(host_bytes, lower_bytes):
    slots, _ = w.plan(host_bytes, lower_bytes)
    assert slots // 2 * 9 // 10 >= (host_bytes + lower_bytes) // (64 << 10)
