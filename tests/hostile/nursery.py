"""A process that has imported everything and forks others. A node starts in a tenth of the time of a new interpreter.

It reads one JSON object a line from its standard input, `{"run": NAME, "arguments": {...}}`, forks a child that calls the function
of that name in this module's `ROLES`, and answers with the child's pid. It ends, and its children with it, when its input ends.
"""

import ctypes
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
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
        self._has_ended = False  # from then on its pid may be another process's

    def signal(self, number: int) -> None:
        """Sends a signal to it and to what it has forked; those that have ended are left alone."""
        if not self._has_ended:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def is_alive(self) -> bool:
        """Whether any of its threads still runs or is stopped; the nursery never leaves a zombie."""
        self._has_ended = self._has_ended or not os.path.exists(f"/proc/{self.pid}")
        return not self._has_ended

    def kill(self, within_s: float = 10.0) -> None:
        """Kill the process, and wait until it has ended."""
        self.signal(signal.SIGKILL)
        self.wait(within_s)

    def wait(self, within_s: float) -> None:
        """Waits for its end; raises `TimeoutError` if it has not ended by then."""
        wait_until(lambda: not self.is_alive(), within_s, f"the end of process {self.pid}")


class Program:
    """A Python module run as a program in a child, with its standard input and output as pipes.

    It is used as `subprocess.Popen`. It begins at once, while a new interpreter imports torch for two seconds.
    """

    def __init__(self, nursery: "Nursery", module: str, *arguments: str) -> None:
        (stdin, ours_in), (ours_out, stdout), (self._status, status) = os.pipe(), os.pipe(), os.pipe()
        files = [f"/proc/{os.getpid()}/fd/{fd}" for fd in (stdin, stdout, status)]
        self._child = nursery.start("program", module=module, arguments=arguments, files=files)
        self.pid = self._child.pid
        self.stdin, self.stdout = os.fdopen(ours_in, "w"), os.fdopen(ours_out)
        self.returncode: int | None = None
        if select.select([self._status], [], [], 30)[0]:
            os.read(self._status, 1)  # the child has opened the pipes
        for fd in (stdin, stdout, status):
            os.close(fd)

    def poll(self) -> int | None:
        """Returns its exit status if it has ended, else None."""
        return self._ended_within(0)

    def wait(self, within_s: float = 30.0) -> int:
        """Waits for its end. Returns its exit status, which is -9 if a signal has ended it."""
        if self._ended_within(within_s) is None:
            raise TimeoutError(f"program {self.pid} has not ended within {within_s} s")
        self._child.wait(within_s)
        return self.returncode

    def _ended_within(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], seconds)[0]:
            self.returncode = int(os.read(self._status, 10) or -signal.SIGKILL)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to it, unless it has ended."""
        self._child.signal(number)

    def kill(self) -> None:
        """Sends SIGKILL, unless it has ended."""
        self._child.signal(signal.SIGKILL)

    def wait_until_stopped(self) -> None:
        """Waits until a SIGSTOP has stopped it."""
        stat = Path(f"/proc/{self.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", 10.0, f"the stop of process {self.pid}")

    def close(self) -> None:
        """Waits for its end and closes the pipes."""
        if not self.stdin.closed:
            self.stdin.close()
        try:
            self.wait()
        finally:
            self.stdout.close()
            if self._status >= 0:
                os.close(self._status)
                self._status = -1


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
        self._process.wait(60)
        self._process.stdout.close()
        for child in self.children:
            child.wait(10)


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends. Each process forked later must call this itself."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _roles() -> dict[str, Callable[..., None]]:
    from tests.hostile.node import run_node
    from tests.hostile.worker import run_worker

    return {"node": run_node, "worker": run_worker, "program": _run_program}


def _run_program(module: str, arguments: list[str], files: list[str]) -> None:
    """Runs a module as `python -m` does, with files for standard input, standard output, and its exit status."""
    for fd, (path, flags) in enumerate(zip(files[:2], (os.O_RDONLY, os.O_WRONLY), strict=True)):
        opened = os.open(path, flags)
        os.dup2(opened, fd)
        os.close(opened)
    status = os.open(files[2], os.O_WRONLY)
    os.write(status, b"+")
    sys.stdin, sys.stdout, sys.argv = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False), [module, *arguments]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os.write(status, str(code).encode())


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
