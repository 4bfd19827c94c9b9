"""A cluster of several Ray nodes at loopback addresses, started by `tiered-kv up`, with workers beside each cache node.

Tests find its processes by words of their command lines, to kill or stop them.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.faults.ray_machines import command_of
from tests.faults.workers import Workers
from tests.sources import ROOT
from tiered_kv.cluster import state
from tiered_kv.cluster.survey import survey
from tiered_kv.config import Config
from tiered_kv.errors import TieredKVError

VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
COORDINATOR, NODE, RAYLET, GCS = "ray::CoordinatorActor", "ray::NodeActor", "/raylet/raylet", "gcs_server"
UP_WITHIN_S = 180.0


class LocalCluster:
    """A running cluster. While it is used, the environment variable `TIERED_KV_STATE` must name a folder of this test run."""

    def __init__(self, name: str, scratch: Path, *settings: str, nodes: int = 2) -> None:
        """Starts the cluster. `settings`: arguments of `tiered-kv up`."""
        self.name = name
        self._up = ["up", "--name", name, "--nodes", str(nodes), "--block-tokens", "16", *settings]
        self.workers = Workers(scratch, name)
        self.up()

    def environment(self) -> dict[str, str]:
        """Returns the environment of the cluster's processes."""
        return {key: value for key, value in os.environ.items() if key not in VARIABLES} | {"PYTHONPATH": str(ROOT)}

    def run(self, *arguments: str) -> str:
        """Runs `tiered-kv`. Returns its output. If the command fails, raises `AssertionError` with the output."""
        command = [sys.executable, "-m", "tiered_kv.cluster.commands.cli", *arguments]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": UP_WITHIN_S, "text": True}
        ran = subprocess.run(command, env=self.environment(), stdin=subprocess.DEVNULL, check=False, **options)
        assert ran.returncode == 0, ran.stdout
        return ran.stdout

    def up(self) -> None:
        """Starts the cluster, or its missing parts."""
        self.run(*self._up)

    def down(self) -> None:
        """Stops the cluster."""
        self.run("down", "--name", self.name)

    def start_worker(self, node: int, name: str, *arguments: str) -> None:
        """Starts a worker that uses only the node of this number."""
        self.workers.start(name, "--node-id", f"node-{node}", *arguments, env=self.environment())

    def pids(self, what: str, node: int | None = None) -> list[int]:
        """Returns the pids of the processes of the cluster's Ray whose command line has these words, on one Ray node or on all."""
        leaders = [process.pid for process in state.load(self.name).processes]
        sessions = leaders if node is None else leaders[node : node + 1]
        return [pid for pid in processes_of(sessions) if what in command_of(pid)]

    def everything(self) -> list[int]:
        """Returns all processes of the cluster's Ray."""
        return processes_of([process.pid for process in state.load(self.name).processes])

    def directory(self, node: int) -> Path:
        """Returns the folder of a node in shared memory."""
        known = state.load(self.name)
        return Path(Config.of(known.config).shm_path) / f"tkv-{known.cluster_id}-node-{node}"

    def degraded(self) -> list[str]:
        """Returns what `tiered-kv status` finds wrong."""
        try:
            return survey(self.name)["degraded"]
        except TieredKVError as error:
            return [str(error)]


def processes_of(sessions: list[int]) -> list[int]:
    """Returns all processes of these sessions."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.getsid(int(name)) in sessions:
                found.append(int(name))
        except ProcessLookupError:
            continue  # it ended just now
    return found
