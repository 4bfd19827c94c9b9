"""A Ray node on each of several machines (`tests.faults.machines`), a cluster on them, and workers beside each node."""

import json
import subprocess
import sys
from pathlib import Path

from tests.faults.machines import Machines
from tests.faults.workers import Workers, wait_until
from tests.sources import ROOT
from tiered_kv.cluster import raylocal

PORT = 6379
START_WITHIN_S = 90.0


class RayMachines:
    """Ray on all machines, with its head on the first. `scratch`: a folder that all machines share; `own`: as `Machine.folder`."""

    def __init__(self, machines: Machines, scratch: Path, own: Path, cluster: str, **ray_settings: int) -> None:
        """`ray_settings`: Ray's own, as `health_check_period_ms`; for all machines."""
        self.machines = machines
        self.cluster = cluster
        self.address = f"{machines[0].address}:{PORT}"
        self._scratch = scratch
        self._own = own
        self._settings = {f"RAY_{name}": str(value) for name, value in ray_settings.items()}
        self._token = raylocal._write_token(scratch)
        self._surveyor: subprocess.Popen | None = None
        self.workers = Workers(scratch, cluster)
        for number in range(len(machines.machines)):
            self.start_ray(number)

    def environment(self, number: int) -> dict[str, str]:
        """Returns the environment of processes on a machine: Ray's settings, and a state directory that is this machine's."""
        state = {"TIERED_KV_STATE": f"{self._own}/state", "PYTHONPATH": str(ROOT)}
        return raylocal._ray_environment(self._token) | self._settings | state

    def start_ray(self, number: int) -> None:
        """Starts the Ray node of a machine, again if one has ended there, and waits until it has joined."""
        machine = self.machines[number]
        role = ["--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor"] if number == 0 else [f"--address={self.address}"]
        temp_dir = f"{self._own}/{number}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block", f"--node-ip-address={machine.address}"]
        command += ["--disable-usage-stats", "--include-log-monitor=false", "--num-cpus=1", f"--temp-dir={temp_dir}"]
        command += [f"--object-store-memory={raylocal.OBJECT_STORE_BYTES_MIN}"]
        ready = machine.path(f"{temp_dir}/ray_current_cluster")
        ready.unlink(missing_ok=True)
        log = (self._scratch / f"ray-{number}.log").open("a")
        ray = machine.start(command, env=self.environment(number), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        wait_until(lambda: ready.exists() or ray.poll() is not None, START_WITHIN_S, f"Ray on machine {number}")
        assert ready.exists(), (self._scratch / f"ray-{number}.log").read_text()[-2000:]

    def run(self, number: int, *arguments: str, within_s: float = 120.0) -> tuple[int, str]:
        """Runs `tiered-kv` on a machine. Returns its exit status and its output."""
        command = [sys.executable, "-m", "tiered_kv.cluster.commands.cli", *arguments]
        ran = self.machines[number].start(
            command, env=self.environment(number), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        output, _ = ran.communicate(timeout=within_s)
        return ran.returncode, output

    def up(self, *arguments: str) -> None:
        """Starts the cluster, one cache node on each machine."""
        status, output = self.run(0, "up", "--name", self.cluster, "--address", self.address, "--block-tokens", "16", *arguments)
        assert status == 0, output

    def degraded(self) -> list[str]:
        """Returns what `tiered-kv status` on the first machine finds wrong."""
        if self._surveyor is None:
            command = [sys.executable, "-m", "tests.faults.surveyor", self.cluster]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._surveyor = self.machines[0].start(command, env=self.environment(0), text=True, **pipes)
        self._surveyor.stdin.write("\n")
        self._surveyor.stdin.flush()
        lines = iter(self._surveyor.stdout.readline, "")
        return json.loads(next(line for line in lines if line.startswith("{")))["degraded"]  # Ray prints lines of its own

    def start_worker(self, number: int, name: str, *arguments: str) -> None:
        """Starts a worker on a machine, and waits until it has attached."""
        self.workers.start(name, *arguments, start=self.machines[number].start, env=self.environment(number))

    def pids(self, number: int, words: str) -> list[int]:
        """Returns the processes of a machine whose command line has these words."""
        return [pid for pid in self.machines[number].pids() if words in command_of(pid)]

    def is_dead(self, number: int) -> bool:
        """Returns whether Ray's head node has declared a machine's Ray node dead."""
        command = [sys.executable, "-c", _STATES, self.address]
        options = {"text": True, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        asked = self.machines[0].start(command, env=self.environment(0), **options)
        states = json.loads(asked.communicate(timeout=60)[0])
        return "ALIVE" not in states[self.machines[number].address]


_STATES = """
import collections, json, sys
from ray._raylet import GcsClient
states = collections.defaultdict(list)
for node in GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10).values():
    states[node.node_manager_address].append("ALIVE" if node.state == node.ALIVE else "DEAD")
print(json.dumps(states))
"""


def command_of(pid: int) -> str:
    """Returns the command line of a process, or "" if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
