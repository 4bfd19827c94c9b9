"""Processes and their sessions. A process is identified by (pid, start time), so that a reused pid is never signalled.

Everything is read from /proc. A process started here leads its own session, and its children stay in that session.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_POLL_S = 0.02
_ORPHANS_WAIT_S = 2.0


class _Stat(NamedTuple):
    state: str
    session: int
    start_time: int


def _stat(pid: int) -> _Stat | None:
    """Reads the state of a pid from /proc. Returns None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the command name is in parentheses and may contain spaces and parentheses
    return _Stat(state=fields[0], session=int(fields[3]), start_time=int(fields[19]))


class Process(NamedTuple):
    """Identifies a process; a later process with the same pid is not equal.

    `start_time` is in clock ticks since boot.
    """

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Returns the process that has this pid now. Raises `ProcessLookupError` if there is none."""
        stat = _stat(pid)
        if stat is None:
            raise ProcessLookupError(f"there is no process with pid {pid}")
        return cls(pid, stat.start_time)

    def alive(self) -> bool:
        """Returns whether the process is running.

        A process that has ended but was not reaped (a zombie) is not running.
        """
        _reap(self.pid)
        stat = _stat(self.pid)
        return stat is not None and stat.start_time == self.start_time and stat.state not in "ZX"

    def signal(self, number: int) -> None:
        """Send a signal if the process is still running."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _reap(pid: int) -> None:
    """Reap a child of this process if it has ended. Does nothing for other processes."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


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

    Once the leader has ended, its number may be the id of an unrelated session. Then only processes that have a file
    below `directory` open (Ray's own log files) are returned. Cost: one pass over /proc.
    """
    now = _stat(leader.pid)
    if now is not None and now.start_time != leader.start_time:
        return []  # the kernel reuses a session's number only after the session is empty
    found = [process for process, stat in _all_processes() if stat.session == leader.pid]
    if now is not None:
        return found
    return [process for process in found if _has_open_file_below(process.pid, directory)]


def _all_processes() -> Iterator[tuple[Process, _Stat]]:
    for name in os.listdir("/proc"):
        stat = _stat(int(name)) if name.isdigit() else None
        if stat is not None and stat.state not in "ZX":
            yield Process(int(name), stat.start_time), stat


def _has_open_file_below(pid: int, directory: Path) -> bool:
    prefix = str(directory) + "/"
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or belongs to another user
        return any(path.startswith(prefix) for path in _open_files(pid))
    return False


def _open_files(pid: int) -> list[str]:
    paths = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed after it was listed
            paths.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return paths


def stop_sessions(leaders: Iterable[Process], directory: Path, wait_s: float) -> list[int]:
    """Stop sessions: send SIGTERM to each leader, wait up to `wait_s`, then send SIGKILL to the processes that are left.

    A process that outlives its leader also gets SIGTERM, and 2 s to end. Returns the pids that had to be killed, or []
    if all ended by themselves. `directory`: see `session_members`.
    """
    leaders = list(leaders)
    known = {process for leader in leaders for process in session_members(leader, directory)}
    for leader in leaders:
        leader.signal(signal.SIGTERM)
    left = _wait_gone(leaders, known, directory, wait_s)
    killed: set[int] = set()
    deadline_s = time.monotonic() + wait_s
    while left and time.monotonic() < deadline_s:
        for process in left:
            process.signal(signal.SIGKILL)
        killed.update(process.pid for process in left)
        left = _wait_gone(leaders, known, directory, 0.5)
    return sorted(killed)


def _wait_gone(leaders: list[Process], known: set[Process], directory: Path, wait_s: float) -> list[Process]:
    """Wait until all `known` processes and the leaders' sessions have ended. Adds the session members to `known`.

    Returns the processes that are still running. A process that outlives its leader has no parent left to stop it
    (Ray's agents keep running): it gets SIGTERM, and less time.
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
