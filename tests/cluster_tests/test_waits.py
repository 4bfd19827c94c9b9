"""What hangs or is gone costs a fetch its deadline once; `status` says in words what it could not ask. On Ray, with real processes."""

# ruff: noqa: F401, F811 - fixtures are imported by name; this module has a cluster of its own

import json
import os
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from tests.cluster_tests.test_cluster import (
    NAMESPACE,
    clients,
    cluster,
    coordinator_name,
    prompt,
    run,
    space,
    until,
)
from tiered_kv.cluster import state
from tiered_kv.cluster.survey import survey

pytestmark = pytest.mark.ray

DEADLINE_MS = 200
IN_TIME_S = DEADLINE_MS / 1000 + 0.5
MISS_S = 0.1
"""Of a bar of 5 ms, on a machine that is busy; while each miss asked, it took the whole deadline."""


def pids(cluster: str, words: str) -> list[int]:
    """Processes of the cluster's own Ray whose command line has these words."""
    sessions = {process.pid for process in state.load(cluster).processes}
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if words in Path(f"/proc/{name}/cmdline").read_text(errors="replace") and os.getsid(int(name)) in sessions:
                    found.append(int(name))
            except OSError:
                continue  # it ended just now
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process does nothing inside."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def missing(client, seed: int) -> float:
    """How long a fetch of blocks that nobody has takes."""
    ids, _ = prompt(seed)
    begun_s = time.monotonic()
    assert client.fetch(ids, deadline_ms=DEADLINE_MS).tokens == 0
    return time.monotonic() - begun_s


def assert_misses_are_cheap(client, seed: int) -> None:
    """The first at its deadline at the latest; the others cost next to nothing."""
    first_s = missing(client, seed)
    others_s = [missing(client, seed + number) for number in range(1, 20)]
    print(f"first miss {first_s * 1e3:.1f} ms, then median {statistics.median(others_s) * 1e3:.2f} ms, max {max(others_s) * 1e3:.1f} ms")
    assert first_s < IN_TIME_S
    assert max(others_s) < IN_TIME_S
    assert statistics.median(others_s) < MISS_S


@pytest.mark.parametrize("what", ["stopped", "killed"])
def test_a_coordinator_that_does_not_answer_costs_one_deadline(cluster: str, what: str) -> None:
    ids, kv = prompt(20 if what == "stopped" else 21)
    first, second = clients(cluster, space(f"coordinator {what}"))
    with first, second:
        first.store(ids, kv)
        until(lambda: second.match(ids).tokens == len(ids), "the directory knows the blocks")
        if what == "stopped":
            [pid] = pids(cluster, "ray::CoordinatorActor")
            with stopped(pid):
                assert_misses_are_cheap(second, 100)
                assert second._source.peers == 0
        else:
            ray.kill(ray.get_actor(coordinator_name(cluster), NAMESPACE), no_restart=False)
            assert_misses_are_cheap(second, 200)
        begun_s = time.monotonic()
        until(lambda: second.fetch(ids).tokens == len(ids), "hits from peers again")
        print(f"{what}: hits again {time.monotonic() - begun_s:.2f} s after it was back")


def test_while_the_control_store_of_ray_hangs_misses_are_in_time(cluster: str) -> None:
    """Also where the node has to look an actor up, which blocks inside of Ray."""
    ids, kv = prompt(22)
    first, second = clients(cluster, space("control store"))
    with first, second:
        first.store(ids, kv)
        until(lambda: second.match(ids).tokens == len(ids), "the directory knows the blocks")
        [gcs] = pids(cluster, "gcs_server")
        [coordinator] = pids(cluster, "ray::CoordinatorActor")
        with stopped(gcs):
            assert_misses_are_cheap(second, 300)
            with stopped(coordinator):
                assert_misses_are_cheap(second, 400)
                assert_misses_are_cheap(first, 500)
        until(lambda: second.fetch(ids).tokens == len(ids), "hits from peers again")


def test_a_peer_that_hangs_costs_one_deadline(cluster: str) -> None:
    ids, kv = prompt(23)
    first, second = clients(cluster, space("peer hangs"))
    with first, second:
        first.store(ids, kv)
        until(lambda: second.match(ids).tokens == len(ids), "the directory knows the blocks")
        with stopped(first._source._view._head(10)):
            took_s = []
            for _ in range(20):
                begun_s = time.monotonic()
                second.fetch(ids, deadline_ms=DEADLINE_MS)
                took_s.append(time.monotonic() - begun_s)
            print(f"hung peer: first {took_s[0] * 1e3:.0f} ms, then median {statistics.median(took_s[1:]) * 1e3:.1f} ms")
            assert max(took_s) < IN_TIME_S
            assert statistics.median(took_s[1:]) < MISS_S
        until(lambda: second.fetch(ids).tokens == len(ids), "it is asked again")


def test_status_says_what_does_not_answer(cluster: str) -> None:
    until(lambda: run("status", "--name", cluster).returncode == 0, "all is well")
    [coordinator] = pids(cluster, "ray::CoordinatorActor")
    os.kill(coordinator, signal.SIGKILL)
    about = survey(cluster)
    assert about["degraded"], "it is being restarted, or knows no node yet"
    assert [node["node"] for node in about["nodes"]] == ["node-0", "node-1"]
    until(lambda: survey(cluster)["degraded"] == [], "all is well again")
    first = clients(cluster, space("status"))[0]
    with first:
        os.kill(first._source._view._head(10), signal.SIGKILL)
        about = survey(cluster)
        assert [text[:22] for text in about["degraded"]] == ["node-0 does not answer"]
        assert about["expected_nodes"] == ["node-0", "node-1"]
    until(lambda: survey(cluster)["degraded"] == [], "all is well again")


@pytest.mark.parametrize("what", ["ray::CoordinatorActor", "gcs_server"])
def test_status_is_told_in_time_while_something_hangs(cluster: str, what: str) -> None:
    [pid] = pids(cluster, what)
    with stopped(pid):
        begun_s = time.monotonic()
        ran = run("status", "--name", cluster, "--json")
        took_s = time.monotonic() - begun_s
    print(f"{what} hangs: status after {took_s:.1f} s")
    assert ran.returncode == 1, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert "the coordinator does not answer" in found["degraded"][0]
    assert [node["node"] for node in found["nodes"]] == ["node-0", "node-1"]
    assert took_s < 20.0
    until(lambda: run("status", "--name", cluster).returncode == 0, "all is well again")
