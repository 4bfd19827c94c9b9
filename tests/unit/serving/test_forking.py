"""Processes that fork after they have used a client: parent and children continue at the same time, and every byte is right."""

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import tiered_kv
from tests.unit.serving.processes import NodeProcess
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv.blocks import Stored
from tiered_kv.client.connect import client_of
from tiered_kv.memory.locks import locked_ranges

pytestmark = pytest.mark.usefixtures("nursery")

CHILDREN = 3
ROUNDS = 60
PATIENCE_S = 60.0


def in_child(work: Callable[[], None]) -> int:
    """Fork a child that runs `work`, and return its pid. The child exits with status 0, or with 1 after printing the error."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        faulthandler.dump_traceback_later(PATIENCE_S, exit=True)  # one that hangs says where
        work()
        status = 0
    except BaseException:  # noqa: BLE001  # the test's own process must not go on in the child
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ends_well(*pids: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S + 5
    waiting = set(pids)
    while waiting and time.monotonic() < deadline_s:
        for pid in list(waiting):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                waiting.discard(pid)
                assert status == 0, f"child {pid} ended with {os.waitstatus_to_exitcode(status)}"
        time.sleep(0.01)
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not waiting, "children that hang"


def store_and_fetch(client, mark: int, shared: list) -> None:
    """Store and fetch private chains and shared ones. The KV depends on the tokens, so any wrong byte is detected."""
    answered = 0
    for turn in range(ROUNDS):
        path = (mark * 1000 + turn, turn % 3, 1)
        stored = client.store(tokens_of(path), kv_of(path))
        answered += stored.refused == 0
        assert_is_prefix(client.fetch(tokens_of(path)), path)
        other = shared[(turn * 7 + mark) % len(shared)]
        assert_is_prefix(client.fetch(tokens_of(other)), other)
        client.store(tokens_of(other), kv_of(other))
        assert_is_prefix(client.fetch(tokens_of(other)), other)
    assert answered > ROUNDS * 0.8, f"{mark}: only {answered} of {ROUNDS} stores went to the node"
    assert client.stats()["node"]["node"] == "bench"


@pytest.mark.parametrize("settings", [{}, {"host": "1MiB", "disk": "8MiB"}], ids=["in memory", "with eviction and a disk"])
def test_parent_and_children_use_one_client_at_the_same_time(tmp_path: Path, settings: dict) -> None:
    shared = [(number, 2, 3) for number in range(20)]
    if "disk" in settings:
        settings = settings | {"disk_path": str(tmp_path)}
    with NodeProcess(**settings) as node, client_of(node.info, LAYOUT, NAMESPACE) as client:
        for path in shared:
            client.store(tokens_of(path), kv_of(path))
            client.fetch(tokens_of(path))
        children = [in_child(lambda mark=mark: store_and_fetch(client, mark, shared)) for mark in range(1, CHILDREN + 1)]
        try:
            store_and_fetch(client, 0, shared)
        finally:
            ends_well(*children)
        with client_of(node.info, LAYOUT, NAMESPACE) as fresh:
            for path in shared + [(mark * 1000 + turn, turn % 3, 1) for mark in range(CHILDREN + 1) for turn in range(ROUNDS)]:
                assert_is_prefix(fresh.fetch(tokens_of(path)), path)
            assert fresh.stats()["node"]["reserved_bytes"] == 0


def test_a_child_that_closes_its_client_does_not_affect_its_parent() -> None:
    path = (1, 2, 3)
    with NodeProcess() as node, client_of(node.info, LAYOUT, NAMESPACE) as client:
        client.store(tokens_of(path), kv_of(path))
        sessions = client.stats()["node"]["sessions"]
        ends_well(in_child(client.close))
        assert client.stats()["node"]["sessions"] == sessions
        assert client.store(tokens_of((4,)), kv_of((4,))) == Stored(1, 0, 0)


def test_a_child_does_not_own_the_locks_of_its_packing_parent(node_factory) -> None:
    """The child does not release the locks, and does not keep them after the parent's death."""
    from tiered_kv.memory.view import NodeView

    node = node_factory(host="1MiB")
    ranges = [(4096, 8192)]
    with NodeView.open(node.directory) as view, NodeView.open(node.directory) as other:
        with view.guard(ranges, view.generation):
            read, write = os.pipe()
            ends_well(in_child(view.close), in_child(lambda: _guard(view, ranges)))
            assert locked_ranges(other._files.arena_fd, ranges) == ranges, "released by the child"
            child = in_child(lambda: os.read(read, 1))
        assert not locked_ranges(other._files.arena_fd, ranges), "kept by the child"
        os.write(write, b"x")
        ends_well(child)
        os.close(read)
        os.close(write)


def _guard(view, ranges) -> None:
    with view.guard(ranges, view.generation) as ours:
        assert ours


# A node in the process itself


def test_a_child_of_an_embedded_cache_reads_stores_and_removes_nothing(tmp_path: Path) -> None:
    paths = [(number, 1, 2) for number in range(30)]
    config = {"host": "1MiB", "disk": "4MiB", "shm_path": str(tmp_path)}
    with tiered_kv.open(config, layout=LAYOUT, namespace=NAMESPACE) as client:
        for path in paths:
            client.store(tokens_of(path), kv_of(path))
        directory, new = Path(client._source._view.directory), (99, 1)
        hit = sum(client.fetch(tokens_of(path)).tokens for path in paths)

        def use() -> None:
            assert sum(assert_is_prefix(client.fetch(tokens_of(path)), path) for path in paths[-5:])
            for path in paths:
                assert_is_prefix(client.fetch(tokens_of(path)), path)
            assert client.store(tokens_of(new), kv_of(new)) == Stored(0, 0, 2)
            assert client.stats()["node"] is None
            client.close()

        children = [in_child(use) for _ in range(CHILDREN)]
        for path in paths:
            assert_is_prefix(client.fetch(tokens_of(path)), path)
        ends_well(*children)
        assert directory.is_dir()
        assert sum(assert_is_prefix(client.fetch(tokens_of(path)), path) for path in paths) * LAYOUT.block_tokens == hit
        assert client.store(tokens_of(new), kv_of(new)) == Stored(2, 0, 0)
    assert not directory.exists()


def test_a_child_that_exits_normally_does_not_affect_its_parents_cache(tmp_path: Path) -> None:
    """The child runs the functions registered with atexit."""
    import subprocess

    script = """
import os, sys, torch, tiered_kv
from pathlib import Path
layout = tiered_kv.KVLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
client = tiered_kv.open({"host": "2MiB", "disk": "2MiB"}, layout=layout, namespace=tiered_kv.Namespace(weights="fork"))
kv = torch.randn(layout.kv_shape(8))
client.store(range(8), kv)
places = [Path(client._source._view.directory), Path(client._source._disk._segments._folder)]
pid = os.fork()
if not pid:
    assert torch.equal(client.fetch(range(8)).kv, kv)
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert all(place.is_dir() for place in places), places
assert torch.equal(client.fetch(range(8)).kv, kv)
client.close()
assert not any(place.exists() for place in places), places
"""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
