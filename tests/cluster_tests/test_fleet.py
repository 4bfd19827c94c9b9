"""A fleet on a real Ray of several nodes: `up` again, nodes that join, leave, come back and are drained, and a killed coordinator.

One cluster serves all tests, in the order of the file: each test leaves it complete for the next one.
"""

import io
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import torch

import tiered_kv
from tiered_kv.actors.names import NAMESPACE, coordinator_name
from tiered_kv.client.connect import client_of
from tiered_kv.cluster import raylocal, start, state
from tiered_kv.cluster.attach import join
from tiered_kv.cluster.commands import cli
from tiered_kv.cluster.processes import session_members

pytestmark = pytest.mark.ray

LAYOUT = tiered_kv.KVLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32", block_tokens=16)
NAME = "fleet-test"
PATIENCE_S = 90.0
JOINS_WITHIN_S = 15.0


def run(*arguments: str, status: int | None = 0) -> str:
    """Run a command in this process, which has joined Ray already. Returns what it prints to standard output."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        code = cli.main([*arguments, "--name", NAME])
    assert status is None or code == status, out.getvalue() + errors.getvalue()
    return out.getvalue()


def seen() -> dict:
    """Returns the JSON of `status`."""
    return json.loads(run("status", "--json", status=None))


def members() -> dict[str, str]:
    """Returns the state of each node, as the keeper sees it."""
    return {member["node"]: member["state"] for member in start.describe(NAME)["fleet"]["members"]}


def until(condition: Callable[[], bool], what: str) -> float:
    """Wait until a condition that other processes bring about is true. Returns the seconds that it took."""
    begun_s = time.monotonic()
    while not condition():
        assert time.monotonic() < begun_s + PATIENCE_S, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - begun_s


def all_serve(*nodes: str) -> bool:
    found = members()
    return set(found) == set(nodes) and set(found.values()) == {"serving"}


def prompt(seed: int) -> tuple[list[int], torch.Tensor]:
    kv = torch.randn(LAYOUT.kv_shape(128), generator=torch.Generator().manual_seed(seed))
    return list(range(seed * 10_000, seed * 10_000 + 128)), kv


def client(node: str) -> tiered_kv.Client:
    until(lambda: node in {each["node"] for each in start.describe(NAME)["nodes"]}, f"{node} has reported")
    [info] = [each for each in start.describe(NAME)["nodes"] if each["node"] == node]
    return client_of(info, LAYOUT, tiered_kv.Namespace(weights="fleet"))


@pytest.fixture(scope="module", autouse=True)
def joined_s(tmp_path_factory: pytest.TempPathFactory) -> Iterator[float]:
    """Two Ray nodes, and a third that joins later. Yields how long it took until its cache node served. This process is a driver."""
    if ray.is_initialized():
        raylocal.leave_ray()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERED_KV_STATE", str(tmp_path_factory.mktemp("state")))
        for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
            patch.delenv(variable, raising=False)
        try:
            run("up", "--nodes", "2", "--host", "16MiB", "--block-tokens", "16")
            join(NAME)
            add_ray_node()
            yield until(lambda: all_serve("node-0", "node-1", "node-2"), "the node that joined serves")
        finally:
            raylocal.leave_ray()
            known = state.load(NAME)
            run("down")
            assert not list(Path("/dev/shm").glob(f"tkv-{known.cluster_id}-*"))
            assert not known.alive()


def add_ray_node() -> None:
    """Start a third Ray node, of which the keeper is not told. The state file is told, so that `down` and `up` look after it."""
    known = state.load(NAME)
    processes = raylocal.RayProcesses(known.address, known.node_ips, known.token_path, known.temp_dir, known.processes)
    started = raylocal.add_nodes([2], processes, raylocal.OBJECT_STORE_BYTES_MIN, directory=state.cluster_dir(NAME))
    replace(known, processes=(*known.processes, *started), node_ips=(*known.node_ips, raylocal.local_ip(2))).save()


def test_a_ray_node_that_joins_gets_a_cache_node(joined_s: float) -> None:
    assert joined_s < 2 * JOINS_WITHIN_S, "the bar is 15 s on an idle machine"
    found = seen()
    assert [node["node"] for node in found["nodes"]] == found["expected_nodes"] == ["node-0", "node-1", "node-2"]
    assert (found["degraded"], found["answering_nodes"], found["source"]) == ([], 3, "coordinator")


def test_a_second_up_changes_nothing_and_names_settings_that_differ() -> None:
    before = {node["node"]: node["uptime_s"] for node in seen()["nodes"]}
    assert "nothing was missing" in run("up")
    assert "nothing was missing" in run("up", "--host", "16MiB", "--nodes", "3")
    after = {node["node"]: node["uptime_s"] for node in seen()["nodes"]}
    assert all(after[node] > before[node] for node in ("node-0", "node-1", "node-2")), "no node was restarted"
    refused = run("up", "--host", "32MiB", "--policy", "lru", "--block-tokens", "16", status=2)
    assert "host: the cluster has 16777216, got 33554432" in refused
    assert "policy: the cluster has 'adaptive', got 'lru'" in refused
    assert "block_tokens" not in refused
    assert "--nodes" in run("up", "--nodes", "1", status=2)
    assert "--address" in run("up", "--address", "10.9.9.9:6379", status=2)
    assert "nodes-with" in run("up", "--nodes-with", "GPU", status=2)


def test_a_killed_coordinator_keeps_its_members() -> None:
    ids, kv = prompt(1)
    with client("node-0") as worker:
        worker.store(ids, kv)
        before = {node["node"]: node["uptime_s"] for node in seen()["nodes"]}
        for no_restart in (False, True):
            ray.kill(ray.get_actor(coordinator_name(NAME), NAMESPACE), no_restart=no_restart)
            assert torch.equal(worker.fetch(ids).kv, kv), "a hit on the same machine needs no coordinator"
            if no_restart:
                assert seen()["degraded"], "it is gone for good"
                assert "starting the coordinator" in run("up")
            until(lambda: len(start.describe(NAME)["nodes"]) == 3, "the nodes have reported again")
            until(lambda: all_serve("node-0", "node-1", "node-2"), "the members are the same")
    found = seen()
    assert found["degraded"] == []
    assert found["coordinator"]["restarts"] == 2
    assert all(node["uptime_s"] > before[node["node"]] for node in found["nodes"]), "no node was started again"


def test_a_ray_node_that_is_killed_is_named_and_has_its_node_again_when_it_comes_back() -> None:
    ids, kv = prompt(2)
    with client("node-2") as worker:
        worker.store(ids, kv)
    known = state.load(NAME)
    for process in session_members(known.processes[2], Path(known.temp_dir)):
        os.kill(process.pid, signal.SIGKILL)
    until(lambda: members()["node-2"] == "lost", "the keeper has seen that the Ray node is gone")
    until(lambda: "node-2" not in start.nodes_of(NAME), "its actor is removed")
    out = run("status", status=1)
    assert "node-2 at 127.0.0.4 is lost: its Ray node left" in out
    assert "nodes: 2 of 3 expected nodes answer" in out
    found = seen()
    assert (found["lost_nodes"], found["answering_nodes"]) == (["node-2"], 2)
    assert "starting Ray nodes at 127.0.0.4" in run("up")
    assert all_serve("node-0", "node-1", "node-2")
    with client("node-2") as worker:
        assert torch.equal(worker.fetch(ids).kv, kv), "it has found its files"
    [node] = [node for node in seen()["nodes"] if node["node"] == "node-2"]
    assert node["restarts"] == 1


def test_a_drained_node_hands_its_blocks_over_and_stays_away_until_it_is_undone() -> None:
    ids, kv = prompt(3)
    with client("node-1") as worker:
        worker.store(ids, kv)
    drained = json.loads(run("drain", "node-1", "--json"))
    assert sum(drained["taken"].values()) >= 8
    assert drained["left"] == 0
    with client("node-0") as worker:
        fetched = worker.fetch(ids)
        assert torch.equal(fetched.kv, kv), "its blocks are hits elsewhere"
    assert "node-1" not in {node["node"] for node in start.describe(NAME)["nodes"]}
    rounds = start.describe(NAME)["fleet"]["rounds"]
    until(lambda: start.describe(NAME)["fleet"]["rounds"] >= rounds + 3, "three rounds of the keeper")
    assert members()["node-1"] == "drained"
    out = run("status")
    assert "node-1 at 127.0.0.3 is drained" in out
    assert "node-1 is drained; start it again with" in run("up")
    assert "there are: node-0, node-1, node-2" in run("drain", "node-7", status=1)
    assert "node-1 serves again" in run("drain", "node-1", "--undo")
    assert all_serve("node-0", "node-1", "node-2")


def test_up_on_another_machine_joins_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if from another machine: there is no state file of the cluster, and Ray's token is in the environment."""
    known = state.load(NAME)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", known.token_path)
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path))
    assert "policy: the cluster has 'adaptive', got 'lru'" in run("up", "--address", known.address, "--policy", "lru", status=2)
    assert state.find(NAME) is None
    assert "joins it" in run("up", "--address", known.address)
    joined = state.load(NAME)
    assert (joined.cluster_id, joined.config, joined.owns_ray) == (known.cluster_id, known.config, False)
    assert all_serve("node-0", "node-1", "node-2")


def test_status_shows_this_machines_nodes_while_rays_head_is_gone() -> None:
    known = state.load(NAME)
    raylocal.leave_ray()
    for process in session_members(known.processes[0], Path(known.temp_dir)):
        os.kill(process.pid, signal.SIGKILL)
    out = run("status", status=1)
    assert "shown are only the nodes on this machine" in out
    found = seen()
    assert found["source"] == "machine"
    assert found["expected_nodes"] == ["node-0", "node-1", "node-2"]
    assert {node["node"] for node in found["nodes"]} == {"node-1", "node-2"}
    assert any(text.startswith("node-0 does not answer") for text in found["degraded"])
