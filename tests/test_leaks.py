"""The leak fixtures of conftest.py find what they are for: a run of its own, with tests that leak on purpose."""

import re
import subprocess
import sys

import pytest

from tests.sources import ROOT

LEAKING = """
import os, socket, struct, subprocess, threading
from pathlib import Path
import pytest
from tiered_kv.memory import words

KEPT = []
STOP = threading.Event()

def keep_thread(name, daemon):
    KEPT.append(threading.Thread(target=STOP.wait, args=(1,), name=name, daemon=daemon))
    KEPT[-1].start()

def test_clean(): KEPT.append(1)
def test_own_thread(): keep_thread("tkv-lost", True)
def test_thread(): keep_thread("lost", False)
def test_daemon_of_others(): keep_thread("not ours", True)
def test_file(tmp_path): KEPT.append(open(tmp_path / "lost", "w"))
def test_socket(): KEPT.append(socket.socket())
def test_process(): KEPT.append(subprocess.Popen(["sleep", "1"]))
def test_detached_process(): subprocess.run(["sh", "-c", "sleep 1 >/dev/null 2>&1 &"])

@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.ray), 2])
def test_shared_memory(number, request):
    folder = Path(f"/dev/shm/tkv-leaktest{os.getpid()}-n{number}")
    folder.mkdir()
    request.config.add_cleanup(lambda: [(folder / "index").unlink(), folder.rmdir()])
    (folder / "index").write_bytes(b"".join(struct.pack("@Q", os.getpid() * (word == words.WRITER_PID)) for word in range(512)))

class Broken:
    closed = []
    def check(self): assert not self.closed, "closed before it was checked"; raise AssertionError("found by check")
    def close(self): self.closed.append(1)

def test_check(checked): checked(Broken())
def test_closed(): assert Broken.closed == [1]

@pytest.mark.gpu
def test_gpu(): pass
"""
FOUND = {
    "own_thread": "threads.*tkv-lost",
    "thread": "threads.*lost",
    "file": "files.*/lost",
    "socket": "files.*socket:",
    "process": "processes.*sleep",
    "detached_process": "processes.*sleep",
    "shared_memory[1]": "shared_memory.*-n1",
    "shared_memory[2]": "shared_memory.*-n2",
    "check": "found by check",
}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says about the leaking tests."""
    folder = tmp_path_factory.mktemp("leaking")
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    (folder / "conftest.py").write_text(re.sub(r"^SETTLE_S = .*$", "SETTLE_S = 0.05", conftest, flags=re.MULTILINE))
    (folder / "test_leaking.py").write_text(LEAKING)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  ray\n")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(folder), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder).stdout


@pytest.mark.parametrize("leak", FOUND)
def test_a_leak_is_an_error_that_says_what(report, leak):
    (line,) = [line for line in report.splitlines() if line.startswith("ERROR") and f"::test_{leak} " in line]
    section = report.partition(f"ERROR at teardown of test_{leak} ")[2].partition("ERROR at teardown")[0]
    assert re.search(FOUND[leak], section), line


def test_what_does_not_leak_is_no_error(report):
    errors = {line.split("::test_")[1].split(" ")[0] for line in report.splitlines() if line.startswith("ERROR ") and "::test_" in line}
    assert errors - {"gpu", "closed"} == set(FOUND)
    assert "FAILED" not in report


def test_the_end_of_the_run_is_held_to_it_too(report):
    assert "left behind by the run" in report


def test_a_gpu_test_is_skipped_where_there_is_none(report):
    import torch

    assert ("needs a GPU" in report) is not torch.cuda.is_available()
