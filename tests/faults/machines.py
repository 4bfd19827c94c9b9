"""Simulates several machines on one, each with its own network, address and `/dev/shm`. A switch connects them and can cut one off.

Each machine is a process, its holder, in unnamed Linux namespaces (network, mounts). When the last process in them ends, the
kernel removes the machine. Processes of the machines are started with `Machine.start`. Only root can do this
(`can_make_machines`).

    python -m tests.faults.machines hold FOLDER          # a holder: obeys lines of JSON, [function, argument, ...]
    python -m tests.faults.machines enter PID COMMAND    # runs a command on the machine of a holder
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from tests.faults import netlink
from tests.sources import ROOT

NEWNS, NEWNET = 0x20000, 0x40000000
MS_REC_PRIVATE = 0x44000
SWITCH, CARD = "switch0", "card0"
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def isolate(folder: str) -> None:
    """Move this process to a network and mounts of its own: an empty `/dev/shm`, and an empty `folder`."""
    _checked(_libc.unshare(NEWNS | NEWNET), "unshare")
    _checked(_libc.mount(b"none", b"/", None, MS_REC_PRIVATE, None), "mount /")
    for path in ("/dev/shm", folder):
        _checked(_libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, b"mode=1777"), f"mount {path}")
    netlink.turn_on("lo")


def enter(pid: int, command: Sequence[str]) -> None:
    """Replace this process by a program on the machine of the holder process `pid`."""
    _checked(_libc.setns(os.pidfd_open(pid), NEWNS | NEWNET), "setns")
    os.chdir("/")
    os.execvp(command[0], command)


def hold(folder: str) -> None:
    """Act as the holder of a machine: carry out each line of the input, and end when the input ends."""
    isolate(folder)
    commands: dict[str, Callable[..., None]] = {
        "add_bridge": netlink.add_bridge,
        "add_cable": netlink.add_cable,
        "add_address": netlink.add_address,
        "turn_on": netlink.turn_on,
        "forward": netlink.forward,
    }
    print("ready", flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        commands[name](*arguments)
        print("done", flush=True)


class Machine:
    """One machine. `address`: in the network of the switch. `folder`: a path at which each machine sees a folder of its own."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address = address
        self.folder = folder
        command = [sys.executable, "-m", "tests.faults.machines", "hold", str(folder)]
        self._holder = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._holder.pid
        self._started: list[subprocess.Popen] = []
        self._expect("ready")

    def ask(self, name: str, *arguments: Any) -> None:
        """Makes the holder carry out one of its commands."""
        self._holder.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._holder.stdin.flush()
        self._expect("done")

    def _expect(self, word: str) -> None:
        line = self._holder.stdout.readline().strip()
        if line != word:
            raise OSError(f"the holder process of a machine has ended (see its error output): expected it to answer {word!r}, got {line!r}")

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen:
        """Starts a program on this machine. Its process is the session leader of what it starts. `options`: as of `subprocess.Popen`."""
        entering = [sys.executable, "-m", "tests.faults.machines", "enter", str(self.pid), *command]
        self._started.append(subprocess.Popen(entering, cwd=ROOT, start_new_session=True, **options))
        return self._started[-1]

    def path(self, path: str | Path) -> Path:
        """Returns the path at which this process sees a file of the machine."""
        return Path(f"/proc/{self.pid}/root") / str(path).removeprefix("/")

    def pids(self) -> list[int]:
        """Returns the processes on this machine, without its holder."""
        ours = os.stat(f"/proc/{self.pid}/ns/net").st_ino
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{name}/ns/net").st_ino == ours and int(name) != self.pid:
                    found.append(int(name))
            except OSError:
                continue  # it ended just now
        return found

    def end(self) -> None:
        """Kills everything that runs on the machine. The kernel then removes its network and its files."""
        while pids := self.pids():
            for pid in pids:
                _kill(pid)
            for process in self._started:
                process.poll()
            time.sleep(0.01)
        for process in self._started:
            process.wait()
            for pipe in filter(None, (process.stdin, process.stdout, process.stderr)):
                pipe.close()
        self._holder.stdin.close()
        self._holder.wait()
        self._holder.stdout.close()


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class Machines:
    """Machines 10.77.0.1, 10.77.0.2, … and their switch. A context manager: leaving it kills all that runs on them."""

    def __init__(self, count: int, folder: Path) -> None:
        """`folder`: an existing folder, which each machine sees empty."""
        self.machines: list[Machine] = []
        self._switch: Machine | None = None
        try:
            self._switch = Machine("", folder)
            self._switch.ask("add_bridge", SWITCH)
            for number in range(count):
                self._add(f"10.77.0.{number + 1}", folder)
        except BaseException:
            self.end()
            raise

    def _add(self, address: str, folder: Path) -> None:
        machine = Machine(address, folder)
        self.machines.append(machine)
        self._switch.ask("add_cable", f"port{len(self.machines) - 1}", SWITCH, CARD, machine.pid)
        machine.ask("turn_on", CARD)
        machine.ask("add_address", CARD, address, 24)

    def __getitem__(self, number: int) -> Machine:
        return self.machines[number]

    def cut(self, number: int) -> None:
        """Drops every packet from and to a machine. Its connections stay open, as after a cable is pulled at a switch."""
        self._switch.ask("forward", f"port{number}", False)

    def heal(self, number: int) -> None:
        """Lets packets of a machine pass again."""
        self._switch.ask("forward", f"port{number}", True)

    def end(self) -> None:
        """Ends all machines."""
        for machine in filter(None, [*self.machines, self._switch]):
            machine.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def why_not() -> str | None:
    """Returns why machines cannot be made here, or None if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    probe = "import sys; from tests.faults import machines, netlink; machines.isolate('/mnt'); netlink.add_bridge('switch0')"
    ran = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    return f"network namespaces cannot be made here: {ran.stderr.strip().splitlines()[-1]}" if ran.returncode else None


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        hold(sys.argv[2])
    else:
        enter(int(sys.argv[2]), sys.argv[3:])
