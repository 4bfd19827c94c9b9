"""Sums of files: every byte counts, and what was read once is read again only if it may have changed."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.unit.model_files.files import SHARDS, as_a_new_process, error_of
from tiered_kv import file_sums
from tiered_kv.checkpoint_files import weights_digest

# --- content


def test_every_byte_counts_whatever_the_pieces(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    content = bytearray(os.urandom(1000))
    path.write_bytes(content)
    monkeypatch.setattr(file_sums, "PIECE_BYTES", 256)
    before = weights_digest(tmp_path)
    monkeypatch.setattr(file_sums, "READ_BYTES", 100)
    as_a_new_process()
    (tmp_path / "cache" / "file_sums" / "sums.json").unlink()
    assert weights_digest(tmp_path) == before
    seen = {before}
    for at in (0, 99, 100, 255, 256, 511, 999):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        seen.add(weights_digest(tmp_path))
    path.write_bytes(content[256:512] + content[:256] + content[512:])
    seen.add(weights_digest(tmp_path))
    path.write_bytes(content + b"\0")
    seen.add(weights_digest(tmp_path))
    path.write_bytes(b"")
    seen.add(weights_digest(tmp_path))
    assert len(seen) == 11


@pytest.mark.parametrize("in_place", [True, False])
def test_a_byte_changed_under_equal_size_and_time(model, in_place, tmp_path):
    path = model / SHARDS[0]
    before, facts = weights_digest(model), path.stat()
    content = b"X" + path.read_bytes()[1:]
    target = path if in_place else tmp_path / "fresh"
    target.write_bytes(content)
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    target.rename(path)
    assert path.stat()[6:9:2] == facts[6:9:2]  # size and modification time
    assert weights_digest(model) != before


# --- remembered sums


def test_a_later_process_reads_nothing(model, reads):
    before = weights_digest(model)
    assert sorted(reads) == sorted([*SHARDS, "model.safetensors.index.json"])
    reads.clear()
    as_a_new_process()
    assert weights_digest(model) == before
    (model / SHARDS[1]).touch()
    as_a_new_process()
    assert weights_digest(model) == before
    assert reads == [SHARDS[1]]


def test_a_file_that_changed_just_now_is_not_remembered(model, reads, monkeypatch):
    monkeypatch.setattr(file_sums, "SETTLED_S", 3600)
    before = weights_digest(model)
    assert weights_digest(model) == before
    assert len(reads) == 6


def test_a_modification_time_in_the_future_does_not_matter(model, reads):
    for path in model.iterdir():
        os.utime(path, (2**33, 2**33))
    weights_digest(model)
    weights_digest(model)
    assert len(reads) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(os.urandom(1000)),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text('{"format": 1}'),
        lambda path: path.write_text('{"format": 1, "sums": 7}'),
        lambda path: path.write_text('{"format": 1, "sums": [7, [], ["x", false, 1, 2, 3, 4, 5, 6], [1, false, 1, 2, 3, 4, 5, "x"]]}'),
        lambda path: path.write_text(path.read_text().replace('"format": 1', '"format": 0')),
        lambda path: path.write_text("[" * 100000),
        lambda path: path.write_bytes(b" " * (file_sums.SUMS_BYTES_MAX + 1)),
        lambda path: path.chmod(0o666),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_memory_is_ignored_and_replaced(model, own_cache, reads, damage):
    before = weights_digest(model)
    damage(own_cache / "sums.json")
    for expected in (6, 6):
        as_a_new_process()
        assert weights_digest(model) == before
        assert len(reads) == expected


@pytest.mark.parametrize("name", ["", "sums.json", "sums.lock", "reading"])
def test_without_a_usable_folder_files_are_read(model, own_cache, reads, name, caplog):
    own_cache.parent.mkdir()
    if not name:
        own_cache.write_text("a file where the folder should be")
    elif name == "reading":
        for number in range(file_sums.LOCKS):
            (own_cache / f"reading-{number:02}.lock").mkdir(parents=True)
    else:
        (own_cache / name).mkdir(parents=True)
    before = weights_digest(model)
    assert weights_digest(model) == before
    assert len(reads) == 3
    assert ("cannot be remembered" in caplog.text) == (name in ("", "sums.json"))


def test_few_sums_are_remembered(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(file_sums, "SUMS_MAX", 3)
    paths = [tmp_path / f"{number}.gguf" for number in range(5)]
    for path in paths:
        path.write_text(path.name)
        weights_digest(path)
        assert len(file_sums._known) <= 3
    assert [Path(state.path) for state in file_sums.SumStore(own_cache).load()] == paths[2:]
    monkeypatch.setattr(file_sums, "SUMS_BYTES_MAX", 400)
    weights_digest(tmp_path)
    as_a_new_process()
    assert len(file_sums.SumStore(own_cache).load()) <= 3
    assert (own_cache / "sums.json").stat().st_size <= 400


@pytest.mark.parametrize("save_s", [0, 5])
def test_sums_are_saved_while_others_are_read_and_after_an_error(model, monkeypatch, own_cache, save_s):
    monkeypatch.setattr(file_sums, "SAVE_S", save_s)
    plain, saved = file_sums._piece_sum, []

    def spy(state, start, nbytes):
        if Path(state.path).name == SHARDS[1]:
            saved.extend(file_sums.SumStore(own_cache).load())
            raise OSError(5, "Input/output error")
        return plain(state, start, nbytes)

    monkeypatch.setattr(file_sums, "_piece_sum", spy)
    assert error_of(weights_digest, model) == f"{model / SHARDS[1]}: cannot be read (Input/output error)"
    assert len(saved) == (0 if save_s else 1)
    assert [Path(state.path).name for state in file_sums.SumStore(own_cache).load()] == [SHARDS[0]]


def test_a_folder_of_ones_own(model, tmp_path, own_cache):
    assert weights_digest(model, cache=tmp_path / "mine") == weights_digest(model)
    assert (tmp_path / "mine" / "sums.json").stat().st_mode & 0o777 == 0o600
    assert not own_cache.exists()


READER = """
import sys, time
from pathlib import Path
from tiered_kv import checkpoint_files, file_sums
model, events, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
file_sums.SETTLED_S = 0
plain = file_sums._piece_sum

def until(event):
    deadline_s = time.monotonic() + 60
    while not (events / event).exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)

def spy(state, start, nbytes):
    with (events / "reads").open("a") as file:
        file.write(name)
    (events / "reading").touch()
    until("waiting")
    return plain(state, start, nbytes)

def progress(line):
    assert line.startswith("waiting for another process"), line
    (events / "waiting").touch()

file_sums._piece_sum = spy
if name == "b":
    until("reading")
print(checkpoint_files.weights_digest(model, progress=progress))
"""


def test_of_two_processes_one_reads(model, tmp_path):
    events = tmp_path / "events"
    events.mkdir()
    both = [
        subprocess.Popen([sys.executable, "-c", READER, str(model), str(events), name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs == [weights_digest(model) + "\n"] * 2
    assert (events / "reads").read_text() == "aaa"


def test_waiting_has_an_end(model, own_cache, monkeypatch):
    monkeypatch.setattr(file_sums, "READ_WAIT_S", 0)
    monkeypatch.setattr(file_sums, "WRITE_WAIT_S", 0)
    own_cache.mkdir(parents=True)
    before = weights_digest(model)
    (own_cache / "sums.json").unlink()
    as_a_new_process()
    with file_sums._locked(own_cache / "sums.lock", 0):
        for number in range(file_sums.LOCKS):
            (own_cache / f"reading-{number:02}.lock").touch()
        names = (*SHARDS, "model.safetensors.index.json")
        states = [file_sums.state_of(str(model / name), False) for name in names]
        with file_sums.SumStore(own_cache).turn(min(states), print):
            assert weights_digest(model) == before


def test_lines_tell_how_far_reading_is(model, monkeypatch):
    """The last piece is read only when a line says that the ones before it are done."""
    monkeypatch.setattr(file_sums, "REPORT_S", 0.01)
    monkeypatch.setattr(file_sums, "PIECE_BYTES", 1000)
    monkeypatch.setattr(file_sums, "THREADS_MAX", 1)
    path, plain, is_told, lines = model / SHARDS[0], file_sums._piece_sum, threading.Event(), []
    path.write_bytes(bytes(4000))

    def hold(state, start, nbytes):
        assert start < 3000 or is_told.wait(60)
        return plain(state, start, nbytes)

    def progress(line):
        lines.append(line)
        if line.startswith("reading the model's files: 3.0 of 7.2 GB"):
            is_told.set()

    monkeypatch.setattr(file_sums, "GB", 1000)
    monkeypatch.setattr(file_sums, "_piece_sum", hold)
    weights_digest(path, progress=progress)
    assert is_told.is_set(), lines


def test_a_file_that_changes_while_it_is_read(model, monkeypatch):
    plain, path = file_sums._piece_sum, model / SHARDS[0]
    times = [1]

    def change(state, start, nbytes):
        found = plain(state, start, nbytes)
        if Path(state.path) == path and times[0]:
            times[0] -= 1
            with path.open("ab") as file:
                file.write(b"more")
        return found

    monkeypatch.setattr(file_sums, "_piece_sum", change)
    once = weights_digest(model)
    as_a_new_process()
    assert weights_digest(model) == once
    path.write_bytes(b"other")
    times[0] = 100
    assert error_of(weights_digest, model) == f"{path}: changed while it was read, 3 times"
