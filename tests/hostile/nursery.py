"""A process that has imported everything and forks others. A node starts in a tenth of the time of a new interpreter.

It reads one JSON object a line from its standard input, `{"run": NAME, "arguments": {...}}`, forks a child that calls the function
of that name in this module's `ROLES`, and answers with the child's pid. It ends, and its children with it, when its input ends.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from tests.sources import ROOT

PR_SET_PDEATHSIG = 1


def wait_until(condition: Callable[[], bool], within_s: float, what: str) -> None:
    """Waits until the condition holds; raises `TimeoutError` that names what was waited for."""
    end_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError(f"{what} has not happened within {within_s} s")
        time.sleep(0.005)


class Child:
    """A process of the nursery, by its pid, which is also the id of its group: of all that it forks."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def signal(self, number: int) -> None:
        """Sends a signal to it and to what it has forked; those that have ended are left alone."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def is_alive(self) -> bool:
        """Whether any of its threads still runs or is stopped; the nursery never leaves a zombie."""
        return os.path.exists(f"/proc/{self.pid}")

    def kill(self, within_s: float = 10.0) -> None:
        """Kill the process, and wait until it has ended."""
        self.signal(signal.SIGKILL)
        self.wait(within_s)

    def wait(self, within_s: float) -> None:
        """Waits for its end; raises `TimeoutError` if it has not ended by then."""
        wait_until(lambda: not self.is_alive(), within_s, f"the end of process {self.pid}")


class Nursery:
    """The parent's end. A context manager: leaving it ends all children."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.hostile.nursery"]
        self._process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.children: list[Child] = []

    def start(self, role: str, **arguments: Any) -> Child:
        """Forks a child that plays a role."""
        self._process.stdin.write(json.dumps({"run": role, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the nursery has ended; its error output says why")
        self.children.append(Child(int(line)))
        return self.children[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.signal(signal.SIGKILL)
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        for child in self.children:
            child.wait(10)


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends. Each process forked later must call this itself."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _roles() -> dict[str, Callable[..., None]]:
    from tests.hostile.node import run_node
    from tests.hostile.worker import run_worker

    return {"node": run_node, "worker": run_worker}


def _be_a_child(role: Callable[..., None], arguments: dict[str, Any], parent: int) -> None:
    """Boundary of the child: whatever ends it is printed, and it never returns into the nursery's loop."""
    status = 1
    try:
        os.setpgid(0, 0)
        end_with_parent()
        if os.getppid() != parent:
            return
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        role(**arguments)
        status = 0
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    """Fork the requested children until the input ends."""
    roles = _roles()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children here
    me = os.getpid()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            _be_a_child(roles[order["run"]], order["arguments"], me)
        with suppress(OSError):  # the child does it as well; whoever comes second finds it done
            os.setpgid(pid, pid)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
