"""Object stores: their URLs, one contract for all, and folders with failures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects import folder_store as folderstore
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.open_store import open_store
from tiered_kv.tiers.objects.store import MemoryStore


def error_of(call, *arguments, **options) -> TieredKVError:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments, **options)
    return caught.value


@pytest.fixture(params=["memory", "folder"])
def store(request, tmp_path):
    with MemoryStore() if request.param == "memory" else FolderStore(tmp_path / "a" / "b") as store:
        yield store


def test_objects_are_read_whole_and_by_range(store):
    store.put("one", [b"abc", memoryview(b"def"), b""])
    assert bytes(store.get("one")) == b"abcdef"
    assert bytes(store.get_range("one", 2, 3)) == b"cde"
    assert bytes(store.get_range("one", 6, 0)) == b""
    store.put("one", [b"new"])
    assert bytes(store.get("one")) == b"new"


def test_objects_are_listed_by_name_with_their_bytes(store):
    assert store.sizes() == {}
    store.put("b", [b"12"])
    store.put("a", [])
    assert list(store.sizes().items()) == [("a", 0), ("b", 2)]


def test_a_missing_object_is_a_separate_error(store):
    for call, *arguments in ((store.get, "gone"), (store.get_range, "gone", 0, 1)):
        error = error_of(call, *arguments)
        assert error.kind is Kind.STORAGE
        assert error.context["missing"]
        assert error.context["setting"] == "objects"


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 4), (3, 1), (9, 1)])
def test_an_object_shorter_than_the_requested_range_is_corrupt(store, offset, nbytes):
    store.put("one", [b"abc"])
    assert error_of(store.get_range, "one", offset, nbytes).kind is Kind.CORRUPT


def test_deleting_a_missing_object_does_nothing(store):
    for name in ("a", "b", "c"):
        store.put(name, [b"1"])
    store.delete(["a", "gone", "b"])
    assert list(store.sizes()) == ["c"]


def test_listing_a_folder_leaves_out_deeper_folders(tmp_path):
    FolderStore(tmp_path / "deep").put("one", [b"1"])
    assert FolderStore(tmp_path).sizes() == {}


def test_many_buffers_and_short_writes_are_written_whole(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    really = os.writev
    monkeypatch.setattr(folderstore.os, "writev", lambda fd, views: really(fd, [views[0][:7]]))
    buffers = [bytes([number % 256]) * (number % 13) for number in range(300)]
    store.put("one", buffers)
    assert bytes(store.get("one")) == b"".join(buffers)


@pytest.mark.parametrize("call", ["writev", "fsync"])
def test_a_failed_put_keeps_the_old_object(tmp_path, monkeypatch, call):
    store = FolderStore(tmp_path)
    store.put("one", [b"old"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folderstore.os, call, full)
    error = error_of(store.put, "one", [b"new"])
    assert (error.kind, error.context["errno"]) == (Kind.STORAGE, 28)
    monkeypatch.undo()
    assert bytes(store.get("one")) == b"old"
    assert os.listdir(tmp_path) == ["one"]


KILLED_WHILE_WRITING = """
import os, sys
from tiered_kv.tiers.objects import folder_store as folderstore
folderstore.os.fsync = lambda fd: os.kill(os.getpid(), 9)
folderstore.FolderStore(sys.argv[1]).put("one", [b"half"])
"""


def test_the_remains_of_a_killed_writer_are_no_objects_and_are_removed(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert [name.endswith(".part") for name in os.listdir(tmp_path)] == [True]
    with FolderStore(tmp_path) as store:
        assert store.sizes() == {}
    assert os.listdir(tmp_path) == []


def test_opening_a_store_does_not_remove_objects_being_written(tmp_path, monkeypatch):
    store = FolderStore(tmp_path)
    monkeypatch.setattr(folderstore.os, "fsync", lambda fd: FolderStore(tmp_path))
    store.put("one", [b"whole"])
    assert bytes(store.get("one")) == b"whole"


@pytest.mark.parametrize("place", ["file/below", "file", "/proc/nothing"])
def test_the_error_for_an_unusable_folder_names_the_setting(tmp_path, place):
    (tmp_path / "file").touch()
    error = error_of(open_store, str(tmp_path / place))
    assert error.kind is Kind.STORAGE
    assert error.context["setting"] == "objects"


def test_urls_of_folders_and_memory(tmp_path):
    for url in (str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}", f"file://{tmp_path}/"):
        assert open_store(url, "node").folder == tmp_path / "node"
    with_space = open_store(f"file://{tmp_path}/a%20b")
    assert with_space.folder == tmp_path / "a b"
    assert open_store("memory://").url == "memory://"
    assert open_store("memory://").sizes() == {}


@pytest.mark.parametrize("url", ["", "s3://", "ftp://host/path", "file://host/path", "http://host/path", "gs:///nothing", "  "])
def test_the_error_for_an_invalid_url_names_the_setting(url):
    error = error_of(open_store, url)
    assert (error.kind, error.context["setting"]) == (Kind.CONFIG, "objects")


def test_without_the_library_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    error = error_of(open_store, "s3://bucket/prefix")
    assert error.kind is Kind.CONFIG
    assert "tiered-kv[objects]" in str(error)


def test_a_folder_needs_no_library():
    opens = "import sys; from tiered_kv.tiers.objects.open_store import open_store; open_store(sys.argv[1])"
    code = f"{opens}; assert 'obstore' not in sys.modules"
    here = str(Path(__file__).parent)
    assert subprocess.run([sys.executable, "-c", code, here], check=False).returncode == 0


@pytest.mark.parametrize(
    "url",
    ["s3:/x", "s3:bucket/x", "S3:x", "http://host/x", "https:/x", "file:x", "file:///a?b", "file:///a#b", "gs:b", "memory://", "C:x"],
)
def test_a_text_that_looks_like_a_url_is_never_used_as_a_folder(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = error_of(lambda: open_store(url, setting="url"))
    assert (error.kind, error.context["setting"]) == (Kind.CONFIG, "url")
    assert str(error).startswith(f"checkpoint: {url!r}")
    for possible in ("s3://bucket/prefix", "gs://bucket/prefix", "az://container/prefix", "file:///folder"):
        assert possible in str(error)
    assert os.listdir(tmp_path) == []


def test_credentials_in_a_url_are_rejected_and_not_shown():
    error = error_of(open_store, "s3://key:secret@bucket/prefix")
    assert error.kind is Kind.CONFIG
    assert "secret" not in str(error)


def test_a_stores_url_opens_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("~/a", "./b:c", "d e", "50%", "a%20b", "what?", "n#1", "ü"):
        store = open_store(name)
        assert open_store(store.url).folder == store.folder
        assert store.folder.is_relative_to(tmp_path)


def test_reading_creates_no_folder_and_needs_no_writable_one(tmp_path, monkeypatch):
    def read_only(place: str):
        return open_store(str(tmp_path / place), setting="url", create=False)

    error = error_of(read_only, "typo")
    assert (error.kind, error.context["setting"]) == (Kind.STORAGE, "url")
    assert str(error) == f"checkpoint: file://{tmp_path}/typo cannot be used: there is no such folder on this machine"
    assert not (tmp_path / "typo").exists()
    (tmp_path / "file").touch()
    assert "it is not a folder" in str(error_of(read_only, "file"))
    open_store(str(tmp_path / "there")).put("one", [b"1"])
    (tmp_path / "there" / "two.part").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # a test may run as root, whom no folder refuses
    assert "not writable" in str(error_of(open_store, str(tmp_path / "there")))
    assert bytes(read_only("there").get("one")) == b"1"
    assert (tmp_path / "there" / "two.part").exists(), "reading removes nothing"
    error = error_of(read_only("there").get, "gone")
    assert error.context["setting"] == "url"
    assert str(error).startswith("checkpoint: ")
