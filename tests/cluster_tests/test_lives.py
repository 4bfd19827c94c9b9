"""A worker that attached goes on through all that can happen to its cluster: `down`, the death of everything, and `up` again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiered_kv.cluster import state

pytestmark = pytest.mark.ray

NAME = "lives"
PATIENCE_S = 60.0
HIT_WITHIN_S = 10.0

WORKER = """
import json, sys, torch, tiered_kv
layout = tiered_kv.KVLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32", block_tokens=16)
def kv_of(seed):
    return torch.randn(layout.kv_shape(64), generator=torch.Generator().manual_seed(seed))
def tokens_of(seed):
    return range(seed * 1000, seed * 1000 + 64)
with tiered_kv.attach(namespace=tiered_kv.Namespace(weights="lives"), layout=layout, cluster="lives") as client:
    for line in sys.stdin:
        seed = int(line)
        before = client.fetch(tokens_of(seed))
        stored = client.store(tokens_of(seed), kv_of(seed))
        after = client.fetch(tokens_of(seed))
        for fetched in (before, after):
            assert torch.equal(fetched.kv, kv_of(seed)[..., :fetched.tokens, :]), "wrong KV"
        print(json.dumps([before.tokens, stored.refused, after.tokens, "ray" in sys.modules]), flush=True)
"""


def run(*arguments: str) -> None:
    command = [sys.executable, "-m", "tiered_kv.cluster.commands.cli", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "state"))
    for variable in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    yield
    if state.find(NAME) is not None:
        run("down", "--name", NAME)


class Worker:
    """A process that attached, and does one prompt at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def prompt(self, seed: int) -> tuple[int, int, int]:
        """Tokens that were hit, blocks whose storing was refused, tokens that were hit afterwards."""
        self.process.stdin.write(f"{seed}\n")
        self.process.stdin.flush()
        before, refused, after, has_ray = json.loads(self.process.stdout.readline())
        assert not has_ray, "a process that is no part of Ray does not end with it"
        return before, refused, after

    def hits_again(self, seed: int) -> None:
        deadline_s = time.monotonic() + HIT_WITHIN_S
        while self.prompt(seed)[1:] != (0, 64):
            assert time.monotonic() < deadline_s, f"no hit within {HIT_WITHIN_S} s"
            time.sleep(0.05)
        assert self.prompt(seed) == (64, 0, 64)

    def close(self) -> int:
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait(PATIENCE_S)


def sessions_of(leaders: set[int]) -> list[int]:
    """All processes of these sessions that have not ended."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) in leaders and fields[0] != "Z":
            found.append(int(name))
    return found


def left_of(cluster: state.ClusterState) -> list[str]:
    """Returns what is left of a cluster on this machine: its processes, its shared memory, and Ray's folder."""
    processes = [f"process {pid}" for pid in sessions_of({process.pid for process in cluster.processes})]
    folders = [str(path) for path in [*Path("/dev/shm").glob(f"tkv-{cluster.cluster_id}*"), Path(cluster.temp_dir)] if path.exists()]
    return processes + folders


def directory_of(cluster_id: str) -> Path:
    [directory] = Path("/dev/shm").glob(f"tkv-{cluster_id}-*")
    return directory


def test_a_worker_lives_through_down_and_the_death_of_everything(own_state: None) -> None:
    run("up", "--name", NAME, "--host", "16MiB")
    worker = Worker()
    try:
        assert worker.prompt(1) == (0, 0, 64)

        directory = directory_of(state.load(NAME).cluster_id)
        inode = directory.stat().st_ino
        shutil.rmtree(directory)  # under a node that runs: it ends, and Ray makes it again
        deadline_s = time.monotonic() + PATIENCE_S
        while not (directory / "node.json").exists() or directory.stat().st_ino == inode:
            assert time.monotonic() < deadline_s, "the node has no new files"
            worker.prompt(2)
            time.sleep(0.1)
        worker.hits_again(3)

        stopped = state.load(NAME)
        run("down", "--name", NAME)
        assert left_of(stopped) == []
        assert state.find(NAME) is None
        assert worker.prompt(3) == (0, 4, 0)
        run("up", "--name", NAME, "--host", "24MiB", "--block-tokens", "32")
        worker.hits_again(4)

        cluster = state.load(NAME)
        pids = sessions_of({process.pid for process in cluster.processes})
        assert len(pids) > 3
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        before, refused, after = worker.prompt(4)
        assert (before, refused, after) == (64, 0, 64), "what is in memory is read on"
        assert worker.prompt(5) == (0, 4, 0)
        run("up", "--name", NAME, "--host", "16MiB")
        assert left_of(cluster) == [], "of a cluster that was killed, nothing is left once `up` has started the next"
        worker.hits_again(6)
    finally:
        status = worker.close()
    assert status == 0
