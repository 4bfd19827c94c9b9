"""Starts, finds and stops processes and their sessions.

A process is identified by (pid, start time), so that a reused pid is never signalled.

psutil reads /proc. A process started here leads its own session, and its children stay in that session.
"""

import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

_POLL_S = 0.02
_ORPHANS_WAIT_S = 2.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """Identifies a process. A later process with the same pid has another start time, so it is not equal.

    `start_time` is in clock ticks since boot.
    """

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Returns the process that has this pid now. Raises `ProcessLookupError` if there is none."""
        start_time = _start_time(pid)
        if start_time is None:
            raise ProcessLookupError(f"there is no process with pid {pid}")
        return cls(pid, start_time)

    def alive(self) -> bool:
        """Returns whether the process is running.

        A process that has ended but was not reaped (a zombie) is not running. If it is a child of this process, it is reaped here.
        """
        with suppress(psutil.NoSuchProcess):
            if _start_time(self.pid) == self.start_time:
                if psutil.Process(self.pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                    return True
                with suppress(ChildProcessError):  # another process's child
                    os.waitpid(self.pid, os.WNOHANG)
        return False

    def signal(self, number: int) -> None:
        """Send a signal if the process is still running."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _start_time(pid: int) -> int | None:
    """Returns when a process started, in clock ticks since boot, or None if there is no such process.

    psutil's own start time is a time of day. It changes when the system's clock is set, so a state file must not contain it.
    """
    boot_s = psutil.boot_time()  # before the start time: psutil below 7.1 adds the boot time that was read last
    with suppress(psutil.NoSuchProcess):
        return round((psutil.Process(pid).create_time() - boot_s) * _TICKS_PER_S)
    return None


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start a command as the leader of a new session, detached from the terminal.

    Its output is written to `log` (mode 0600). Returns the process.
    """
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return Process.of(os.posix_spawn(command[0], list(command), dict(environment), file_actions=actions, setsid=True))


def session_members(leader: Process, directory: Path) -> list[Process]:
    """Returns the running processes of a leader's session, including the leader.

    Once the leader has ended, its pid may be the id of an unrelated session. Then only processes that have a file
    below `directory` open (Ray's own log files) are returned. Cost: one system call for each process of the machine.
    """
    start_time = _start_time(leader.pid)
    if start_time not in (None, leader.start_time):
        return []  # the kernel reuses a session's number only after the session is empty
    found = _session(leader.pid)
    if start_time is not None:
        return found
    return [process for process in found if _has_open_file_below(process.pid, directory)]


def _session(number: int) -> list[Process]:
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError):  # it ended after it was listed
            if os.getsid(pid) == number and (process := Process.of(pid)).alive():
                found.append(process)
    return found


def _has_open_file_below(pid: int, directory: Path) -> bool:
    """Returns whether a process has a file below `directory` open.

    Reads /proc, because psutil's `open_files` leaves out deleted files, and a cleaner of /tmp may have deleted Ray's logs.
    """
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or belongs to another user
        return any(os.path.realpath(f"/proc/{pid}/fd/{fd}").startswith(f"{directory}/") for fd in os.listdir(f"/proc/{pid}/fd"))
    return False


def stop_sessions(leaders: Iterable[Process], directory: Path, wait_s: float) -> list[int]:
    """Stop sessions: send SIGTERM to each leader, wait up to `wait_s`, then send SIGKILL to the processes that still run.

    A process that outlives its leader also gets SIGTERM, and 2 s to end. Returns the pids that got SIGKILL, or [] if all ended
    after SIGTERM. `directory`: see `session_members`.
    """
    leaders = list(leaders)
    known = {process for leader in leaders for process in session_members(leader, directory)}
    for leader in leaders:
        leader.signal(signal.SIGTERM)
    left = _wait_gone(leaders, known, directory, wait_s)
    killed: set[int] = set()
    deadline_s = time.monotonic() + wait_s
    while left:
        for process in left:
            process.signal(signal.SIGKILL)
        killed.update(process.pid for process in left)
        left = _wait_gone(leaders, known, directory, 0.5)
        if time.monotonic() >= deadline_s:
            break
    return sorted(killed)


def _wait_gone(leaders: list[Process], known: set[Process], directory: Path, wait_s: float) -> list[Process]:
    """Wait until all `known` processes and the leaders' sessions have ended. Adds the session members to `known`.

    Returns the processes that are still running. A process that outlives its leader, as Ray's agents do, has no parent left to
    stop it. So it gets SIGTERM here, and must end within `_ORPHANS_WAIT_S`.
    """
    deadline_s = time.monotonic() + wait_s
    signalled: set[Process] = set()
    while True:
        for leader in leaders:
            members = session_members(leader, directory)
            known.update(members)
            orphans = set() if leader.alive() else set(members) - signalled
            signalled |= orphans
            for process in orphans:
                process.signal(signal.SIGTERM)
        if not any(leader.alive() for leader in leaders):
            deadline_s = min(deadline_s, time.monotonic() + _ORPHANS_WAIT_S)
        left = [process for process in known if process.alive()]
        if not left or time.monotonic() >= deadline_s:
            return left
        time.sleep(_POLL_S)
