"""The leak fixtures of conftest.py find what they are for: a run of its own, with tests that leak on purpose."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest
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
"""
ON_GPU = """
import pytest

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


MEETING = """
import os, time
from pathlib import Path

def meet(word, other):
    Path(word).touch()
    deadline_s = time.monotonic() + 60
    while not Path(other).exists():
        assert time.monotonic() < deadline_s, f"{other} has not come"
        time.sleep(0.01)
"""
HOLDING = (
    MEETING
    + """
import struct, subprocess
from tiered_kv.memory import words

def directory_of(pid, name):
    folder = Path(f"/dev/shm/tkv-leaktest{os.getpid()}-{name}")
    folder.mkdir()
    (folder / "index").write_bytes(b"".join(struct.pack("@Q", pid * (word == words.WRITER_PID)) for word in range(512)))
    return folder

def test_holds_while_the_other_worker_begins_and_ends_a_test(request):
    ended = subprocess.Popen(["true"])
    ended.wait()
    child = subprocess.Popen(["sleep", "100"])
    folders = [directory_of(pid, name) for pid, name in ((os.getpid(), "own"), (child.pid, "child"), (ended.pid, "ended"))]
    try:
        meet("held", "begun")
        meet("go on", "done")
    finally:
        child.kill()
        child.wait()
        for folder in folders[:-1]:
            (folder / "index").unlink()
            folder.rmdir()
"""
)
BESIDE = (
    MEETING
    + """
def test_runs_beside_it():
    meet("begun", "held")

def test_begins_and_ends_beside_it():
    meet("done", "go on")
"""
)
INTERRUPTING = """
import os, signal, subprocess, threading

def test_is_interrupted_and_cannot_clean_up():
    subprocess.Popen(["sleep", "2"])
    threading.Thread(target=threading.Event().wait, args=(2,), name="tkv-lost", daemon=True).start()
    signal.raise_signal(signal.SIGINT)

def test_is_not_run(): pass
"""


def run(folder: Path, tests: dict[str, str], *options: str) -> str:
    """Runs tests as `completed`. Returns what pytest says."""
    return completed(folder, tests, *options).stdout


def completed(folder: Path, tests: dict[str, str], *options: str) -> subprocess.CompletedProcess[str]:
    """Runs tests with a copy of conftest.py. Returns the ended pytest process.

    The copy does not wait long for what is ending. It takes the machine for its own, but sees only the directories of these tests.
    """
    source = (ROOT / "tests" / "conftest.py").read_text()
    changes = ("SETTLE_S = 3.0", "SETTLE_S = 0.05"), ('glob("tkv-*")', 'glob("tkv-leaktest*")'), ("if found and _alone()", "if found")
    for before, after in changes:
        assert before in source
        source = source.replace(before, after)
    (folder / "conftest.py").write_text(source)
    for name, test in tests.items():
        (folder / f"test_{name}.py").write_text(test)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n  gpu\n  ray\n")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--tb=short", "--rootdir", str(folder), str(folder)]
    return subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=folder)


@pytest.fixture(scope="module", params=[(), ("-n", "2", "--dist", "loadfile")], ids=["one process", "two workers"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What pytest says about the leaking tests."""
    return run(tmp_path_factory.mktemp("leaking"), {"leaking": LEAKING}, *request.param)


@pytest.mark.parametrize("leak", FOUND)
def test_a_leak_is_an_error_that_says_what(report, leak):
    (line,) = [line for line in report.splitlines() if line.startswith("ERROR") and f"::test_{leak} " in line]
    section = report.partition(f"ERROR at teardown of test_{leak} ")[2].partition("ERROR at teardown")[0]
    assert re.search(FOUND[leak], section), line


def test_what_does_not_leak_is_no_error(report):
    errors = {line.split("::test_")[1].split(" ")[0] for line in report.splitlines() if line.startswith("ERROR ") and "::test_" in line}
    assert errors - {"closed"} == set(FOUND)
    assert "FAILED" not in report


def test_the_end_of_the_run_is_held_to_it_too(report):
    assert "left behind by the run" in report


def test_a_gpu_test_is_skipped_where_there_is_none(tmp_path):
    import torch

    assert ("needs a GPU" in run(tmp_path, {"on_gpu": ON_GPU})) is not torch.cuda.is_available()


def test_a_process_that_has_ended_has_no_mark():
    """It may end between being listed and being looked at."""
    with subprocess.Popen(["true"]) as ended:
        pass
    assert not conftest._marked(ended.pid)


def test_what_another_worker_holds_is_no_leak_and_what_is_left_at_the_end_is(tmp_path):
    """A worker holds a process and shared memory of that, of itself, and of an ended process: a node it may be about to restart.

    The last it leaves behind. Only at the end of the run is that known; the error names the tests after which it was seen.
    """
    try:
        said = run(tmp_path, {"holding": HOLDING, "beside": BESIDE}, "-n", "2", "--dist", "loadfile")
    finally:
        for folder in Path("/dev/shm").glob("tkv-leaktest*-ended"):
            shutil.rmtree(folder)
    assert "3 passed, 1 error" in said, said
    assert re.search("left behind by the run: .*leaktest.*-ended, first seen after .*test_", said)


def test_an_interrupted_run_ends_with_status_2_and_reports_no_leak(tmp_path):
    """An interrupted test cannot clean up. What it still holds is no failure: that would change the status of the run to 1."""
    ended = completed(tmp_path, {"interrupting": INTERRUPTING})
    assert ended.returncode == pytest.ExitCode.INTERRUPTED, ended.stdout
    said = ended.stdout + ended.stderr
    assert "KeyboardInterrupt" in said
    assert not re.search("leaked|left behind|ERROR|passed", said), said


NICENESS = """
import os
from pathlib import Path

def test_niceness(): print("niceness of", Path(__file__).stem, os.nice(0), os.environ["PYTEST_XDIST_WORKER"])
"""


def test_other_workers_give_way_to_the_one_that_runs_timed_tests_with_ray(tmp_path):
    """Each group of tests with Ray has a worker of its own from the beginning."""
    for place in ("tests/cluster_tests/test_fleet.py", "tests/cluster_tests/test_demo.py", "test_other.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(NICENESS)
    said = run(tmp_path, {}, "-n", "3", "--dist", "loadfile")
    found = dict(re.findall(r"niceness of (\w+) (\d+ \w+)", said))
    nice = os.nice(0)
    assert found.keys() == {"test_fleet", "test_demo", "test_other"}, said
    assert {name: int(text.split()[0]) - nice for name, text in found.items()} == {"test_fleet": 0, "test_demo": 5, "test_other": 5}
    assert len({text.split()[1] for text in found.values()}) == 3, "three workers"


def test_all_tests_with_ray_are_in_a_group():
    for path in (ROOT / "tests").rglob("test_*.py"):
        place, text = str(path.relative_to(ROOT)), path.read_text()
        if "mark.ray" in text and path != Path(__file__) and not place.startswith("tests/vllm/"):  # those have a run of their own
            marked = re.findall(r"mark\.ray\n(?:@.*\n)*def (\w+)", text)
            assert conftest.ray_group(place) or (marked and len(marked) == text.count("mark.ray")), place
            assert conftest.ray_group(place) or all(conftest.ray_group(f"{place}::{name}") for name in marked), place
