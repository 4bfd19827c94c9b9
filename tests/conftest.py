"""For every test: what it started has ended and what it opened is closed; and makers of nodes and clients that end checked.

Every process that tests start inherits two marks in its environment: one of the run, and one of the pytest process that
started it. So nothing that others do on this machine at the same time (their clusters are in the same /dev/shm) is taken
for a leak of ours. `make test` runs several pytest processes side by side (pytest-xdist); each looks for its own leaks.
"""

import gc
import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, settings

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory import words

SHM = Path("/dev/shm")
RUN, WORKER = "TIERED_KV_TEST_RUN", "TIERED_KV_TEST_WORKER"
"""The variables with the marks of the run and of the pytest process, which is a worker of pytest-xdist or the only one."""
SETTLE_S = 3.0
# Files that a library opens once and keeps: devices, its own files, the kernel's tables.
KEPT_FILES = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/nvidia", "/proc/", "/sys/", "/usr/", "/etc/")
KEPT_IN_PATHS = ("site-packages", "/.pytest_cache/")
KEPT_THREADS = ("tqdm",)
VLLM_TESTS = Path(__file__).parent / "vllm"
FAILED = pytest.StashKey[bool]()
RAY_FIXTURES = {"ray_cluster", "running_cluster"}
UNTIMED = ("tests/cluster_tests/test_checkpoints.py", "tests/cluster_tests/test_demo.py", "tests/test_examples.py::test_an_example_runs")
WITH_RAY = {"untimed tests with Ray": UNTIMED, "timed tests with Ray": ("tests/cluster_tests/",)}
"""Two groups of tests that start Ray, which keeps both cores of a small machine busy: one process runs all tests of a group.

So at most two clusters run at once, of which one is in tests that measure times. They wait for other processes for a third of the
time. So there are more workers of pytest-xdist than cores, and those without timed tests give way to the one with them (`NICER`).
"""
TIMED = "timed tests with Ray"
NICER = 5
"""By how much the niceness of a worker is raised that does not begin with timed tests with Ray: a core is shared 3 to 1."""
GIVES_WAY = pytest.StashKey[bool]()


class Held(NamedTuple):
    """What this process holds, and what processes of this run hold, at one moment; each item as people would name it.

    `pids`: all processes of the machine. What ran already at `since` is not described again: reading /proc takes milliseconds.
    """

    threads: Counter[str]
    files: Counter[str]
    processes: Counter[str]
    shared_memory: Counter[str]
    pids: frozenset[str]

    @classmethod
    def now(cls, since: "Held | None" = None) -> "Held":
        pids = frozenset(filter(str.isdigit, os.listdir("/proc")))
        new = pids - since.pids if since else frozenset()
        return cls(Counter(_threads()), Counter(_files()), Counter(_processes(new)), Counter(_shared_memory()), pids)

    def beyond(self, before: "Held", kinds: tuple[str, ...]) -> dict[str, list[str]]:
        """By kind what is here and was not before."""
        more = {kind: sorted((getattr(self, kind) - getattr(before, kind)).elements()) for kind in kinds}
        return {kind: items for kind, items in more.items() if items}


KINDS = ("threads", "files", "processes", "shared_memory")


def _threads() -> Iterator[str]:
    for thread in threading.enumerate():
        if (thread.name.startswith("tkv-") or not thread.daemon) and not thread.name.startswith(KEPT_THREADS):
            yield f"{thread.name} ({thread.ident})"


def _files() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them is gone by now
            target = os.readlink(f"/proc/self/fd/{fd}")
            if not target.startswith(KEPT_FILES) and not any(part in target for part in KEPT_IN_PATHS):
                yield target


def _processes(pids: Iterable[str]) -> Iterator[str]:
    """Of these processes, the children of this one, and those started by it or its children that have another parent by now."""
    for pid in pids:
        if int(pid) != os.getpid():
            with suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == os.getpid() or _marked(pid, started=fields[19]):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if "resource_tracker" not in command:  # Python's own; it ends with the process
                        yield f"{pid} {command[:100] or 'ended, not waited for'}"


UNMARKED: set[tuple[str, str]] = set()
"""Pid and start time of processes that had no mark: they never get one, and reading an environment is slow."""


def _marked(pid: str | int, mark: str = WORKER, started: str | None = None) -> bool:
    if (pid, started) in UNMARKED:
        return False
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except (PermissionError, ProcessLookupError, FileNotFoundError):  # somebody else's, or it ended just now
        return False
    is_ours = f"{mark}={os.environ[mark]}".encode() in environment
    if started and not is_ours and environment != [b""]:
        UNMARKED.add((str(pid), started))
    return is_ours


def _shared_memory() -> Iterator[str]:
    """Nodes' directories that this process or its children have made: their writer is one of them.

    Those whose writer has ended are added only where no other pytest process runs tests: a test there may be about to
    restart its node. Where one does, `AfterAllWorkers` looks for them at the end.
    """
    for directory in SHM.glob("tkv-*"):
        pid = _writer(directory)
        if pid is not None and os.path.exists(f"/proc/{pid}") and (pid == os.getpid() or _marked(pid)):
            yield str(directory)
    if os.environ[WORKER] == os.environ[RUN]:
        yield from _abandoned()


def _abandoned() -> Iterator[str]:
    """Nodes' directories whose writer has ended. They may be anybody's: none is ours where another Python runs than our run's."""
    found = [directory for directory in SHM.glob("tkv-*") if not os.path.exists(f"/proc/{_writer(directory) or 'none'}")]
    if found and _alone():
        yield from map(str, found)


def _alone() -> bool:
    """Whether all Python processes on this machine are of this run."""
    first = os.environ[RUN].partition("-")[0]  # the process that set the mark does not have it in /proc
    for name in os.listdir("/proc"):
        if name.isdigit() and name != first:
            with suppress(OSError):
                if "python" in os.readlink(f"/proc/{name}/exe") and not _marked(name, RUN):
                    return False
    return True


def _writer(directory: Path) -> int | None:
    with suppress(OSError), (directory / "index").open("rb") as file:
        header = memoryview(file.read(words.HEADER_BYTES).ljust(words.HEADER_BYTES, b"\0")).cast("Q")
        return header[words.WRITER_PID] or None
    return None


# Property tests run the same examples on every machine and in every run. `make fuzz` runs them with fresh seeds.
settings.register_profile("steady", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("steady"), derandomize=False, print_blob=True)
settings.load_profile("steady")


SEEN: dict[str, str] = {}
"""Directories whose writer has ended, and the first test after which this process saw each."""


class AfterAllWorkers:
    """A plugin of the process that leads the workers of pytest-xdist: looks for directories whose writer has ended.

    One that is left when all workers have ended is an error of the run.
    """

    def __init__(self) -> None:
        self._before = set(_abandoned())
        self._seen: dict[str, list[str]] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Collects what each worker saw."""
        for directory, test in getattr(node, "workeroutput", {}).get("seen", {}).items():
            self._seen.setdefault(directory, []).append(test)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Reports what is left as an error, as if the last test had made it."""
        left = [f"{found}, first seen after {self._seen.get(found, 'no test')}" for found in set(_abandoned()) - self._before]
        if left:
            where = ("tests", None, "the run")
            report = pytest.TestReport("tests", where, {}, "failed", f"left behind by the run: {left}", "teardown")
            session.config.hook.pytest_runtest_logreport(report=report)
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that runs one simulation again."""
    parser.addoption("--sim-seed", type=int, default=None, help="simulate only the cluster of this seed (tests/simulation)")


def pytest_configure(config: pytest.Config) -> None:
    """Set the marks, of which a worker of pytest-xdist has inherited that of its run; and give torch one thread.

    This holds for all programs that tests start. Their tensors are small and the cores are few: while other processes use
    these, a second thread costs several times the processor time, because each thread spins while it waits for the other.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[WORKER] = f"{os.getpid()}-{uuid.uuid4().hex}"
    if hasattr(config, "workerinput"):
        config.workeroutput["seen"] = SEEN
        return
    os.environ[RUN] = os.environ[WORKER]
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(AfterAllWorkers())


HAS_VLLM = find_spec("vllm") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the tests of vLLM's connector out where vLLM is not installed."""
    return True if not HAS_VLLM and collection_path.is_relative_to(VLLM_TESTS) else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say that the tests of vLLM's connector were left out."""
    if not HAS_VLLM:
        terminalreporter.write_line("tests/vllm was not run, because vLLM is not installed here; make test-vllm runs it")


def ray_group(nodeid: str) -> str | None:
    """Returns the group of a test in `WITH_RAY`, or None if it starts no Ray."""
    return next((group for group, begins in WITH_RAY.items() if nodeid.startswith(begins)), None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile` a worker takes a whole file at a time. The first two workers begin with the groups of `WITH_RAY`."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ray_group(nodeid) or super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who uses a Ray cluster is marked `ray`; who is marked `gpu` is skipped where there is none (torch is imported only then)."""
    items.sort(key=lambda item: [TIMED, *(group for group in WITH_RAY if group != TIMED), None].index(ray_group(item.nodeid)))
    for item in items:
        if RAY_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ray)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_collection_finish() -> None:
    """Set the million objects of imported modules and collected tests aside: each `gc.collect()` of a test took 0.6 s to look at them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before its first test, let a worker of pytest-xdist give way to the one that runs the timed tests with Ray."""
    if hasattr(item.config, "workerinput") and GIVES_WAY not in item.config.stash:
        item.config.stash[GIVES_WAY] = ray_group(item.nodeid) != TIMED
        os.nice(NICER if item.config.stash[GIVES_WAY] else 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember whether the test failed: the traceback of a failure keeps alive what its frames held."""
    report = yield
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    return report


def leaks_since(before: Held, kinds: tuple[str, ...]) -> dict[str, list[str]]:
    """What is held beyond `before` for longer than what is ending by itself needs."""
    deadline_s = time.monotonic() + SETTLE_S
    leaked = Held.now(before).beyond(before, kinds)
    while leaked and time.monotonic() < deadline_s:
        gc.collect()
        time.sleep(0.02)  # polls for an end, orders nothing
        leaked = Held.now(before).beyond(before, kinds)
    return leaked


INTERRUPTED = threading.Event()


def pytest_keyboard_interrupt() -> None:
    """Note that the run was interrupted: the test that was running could not clean up, so nothing more is checked for leaks."""
    INTERRUPTED.set()


@pytest.fixture(scope="session", autouse=True)
def run_leaves_nothing() -> Iterator[None]:
    """At the end of the run, after all clusters of fixtures: no process and no shared memory of ours is left."""
    before = Held.now()
    yield
    if INTERRUPTED.is_set():
        return
    assert not (leaked := leaks_since(before, ("processes", "shared_memory"))), f"left behind by the run: {leaked}"


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: threads, open files, processes and shared memory are those of before.

    Fixtures of a wider scope have begun before this one and end after it. Ray, while this process has joined it, opens
    files and starts workers whenever it likes: tests marked `ray` are held to shared memory only. After a failure open
    files are not looked at, for its traceback keeps them.
    """
    before = Held.now()
    yield
    if INTERRUPTED.is_set():
        return
    failed = request.node.stash.get(FAILED, False)
    kinds = ("shared_memory",) if request.node.get_closest_marker("ray") else tuple(k for k in KINDS if not (failed and k == "files"))
    SEEN.update((directory, request.node.nodeid) for directory in _abandoned() if directory not in SEEN)
    assert not (leaked := leaks_since(before, kinds)), f"leaked: {leaked}"


@pytest.fixture
def checked() -> Iterator[Callable]:
    """Call it with anything that has `check()`: when the test ends, after `before()`, it is checked; and closed if it has `close()`.

    The last one comes first; all are closed even where a check fails. What the test closed itself is not checked again.
    """
    with ExitStack() as ending:

        def register(thing: Any, before: Callable[[], None] = lambda: None) -> Any:
            if hasattr(thing, "close"):
                ending.callback(thing.close)
            if hasattr(thing, "check"):
                ending.callback(_check_unless_closed, thing)
                ending.callback(before)
            return thing

        yield register


def _check_unless_closed(thing: Any) -> None:
    try:
        thing.check()
    except TieredKVError as error:
        if error.kind is not Kind.CLOSED:
            raise


@pytest.fixture
def node_factory(checked: Callable) -> Callable:
    """`node_factory(host="64MiB", …)` is a started node of its own cluster; checked, closed and removed at the end."""

    def make(*, link: Any = None, node_id: str = "n0", cluster_id: str | None = None, clock: Any = None, **settings: Any) -> Any:
        from tiered_kv.config import Config
        from tiered_kv.node.node import Node

        config = Config.of({"host": "64MiB", **settings})
        node = Node(config, cluster_id or uuid.uuid4().hex[:8], node_id, link, clock=clock)
        return checked(node, before=lambda: _settle(node))

    return make


def _settle(node: Any) -> None:
    """Let the node use the last touches and finish its copies; extents on their way belong to nobody that `check` knows."""
    with suppress(TieredKVError):  # closed by the test
        node.engine.drain_touches()
        node.engine.settle()


@pytest.fixture(scope="session")
def nursery() -> Iterator[Any]:
    """A process that has imported everything: programs of tests are forked from it. `NodeProcess` uses it."""
    from tests.hostile.nursery import Nursery
    from tests.unit.serving.processes import NodeProcess

    with Nursery() as NodeProcess.nursery:
        yield NodeProcess.nursery


@pytest.fixture
def client_factory(checked: Callable) -> Callable:
    """`client_factory(node, layout, namespace)` is a client of a node by direct calls; closed before its node."""

    def make(node: Any, layout: Any, namespace: Any) -> Any:
        from tiered_kv.client.connect import client_of

        return checked(client_of(node.info(), layout, namespace, connect=node.open_session))

    return make
