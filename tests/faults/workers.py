"""The workers of a run with faults, by name, and the history that all of them write."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.history import Operation, read

STOPS_WITHIN_S = 30.0
Start = Callable[..., subprocess.Popen]


def wait_until(condition: Callable[[], Any], within_s: float, what: str) -> float:
    """Waits until a condition holds. Returns the seconds that it took. Raises `AssertionError` if it takes longer than `within_s`."""
    begun_s = time.monotonic()
    while not condition():
        assert time.monotonic() - begun_s < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - begun_s


class Workers:
    """Processes of `tests.faults.worker` of one cluster. Their histories are files in `folder`."""

    def __init__(self, folder: Path, cluster: str) -> None:
        self._folder = folder
        self._cluster = cluster
        self._processes: dict[str, subprocess.Popen] = {}

    def start(
        self,
        name: str,
        *arguments: str,
        start: Start = subprocess.Popen,
        env: dict[str, str] | None = None,
        module: str = "tests.faults.worker",
        out: Path | None = None,
    ) -> None:
        """Starts a worker, and waits until it has attached. `start`: as `subprocess.Popen`."""
        out = out or self._folder / f"{name}.jsonl"
        command = [sys.executable, "-m", module, "--cluster", self._cluster, "--out", str(out), *arguments]
        worker = start(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes[name] = worker
        assert worker.stdout.readline() == "attached\n", "the worker has ended; its error output says why"

    def pid(self, name: str) -> int:
        """Returns the process id of a worker."""
        return self._processes[name].pid

    def history(self, since_ns: int = 0) -> list[Operation]:
        """Returns the operations of all workers from `since_ns`, on the monotonic clock, until now.

        Leaves out operations that end while the files are read: the store that explains them may be missing from a file read
        earlier.
        """
        now_ns = time.monotonic_ns()
        return [each for each in read(self._folder.glob("*.jsonl")) if each.begun_ns >= since_ns and each.ended_ns <= now_ns]

    def kill(self, name: str) -> None:
        """Kill a worker with `kill -9`."""
        worker = self._processes.pop(name)
        worker.kill()
        self._close(worker)

    def kill_all(self) -> None:
        """Kill (`kill -9`) each worker that has not ended."""
        for name in list(self._processes):
            self.kill(name)

    def end(self, name: str) -> int:
        """Lets a worker finish its operation and end. Returns its exit status."""
        worker = self._processes.pop(name)
        worker.stdin.close()
        return self._close(worker)

    def _close(self, worker: subprocess.Popen) -> int:
        status = worker.wait(STOPS_WITHIN_S)
        for pipe in (worker.stdin, worker.stdout):
            pipe.close()
        return status

    def end_all(self) -> dict[str, int]:
        """Ends all workers. Returns the exit status of each."""
        for worker in self._processes.values():
            worker.send_signal(signal.SIGCONT)
        return {name: self.end(name) for name in list(self._processes)}
