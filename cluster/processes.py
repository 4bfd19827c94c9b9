"""Processes known by (pid, start time), so that a pid that was reused is never signalled, and their sessions.

Everything is read from /proc. A started process leads a session of its own; what it starts stays in that session.
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
    """What the kernel says about a pid; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the command name, in parentheses, may itself hold spaces and parentheses
    return _Stat(state=fields[0], session=int(fields[3]), start_time=int(fields[19]))


class Process(NamedTuple):
    """A process that cannot be mistaken for a later one with the same pid. `start_time`: clock ticks since boot."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> "Process":
        """The process that now has this pid; raises `ProcessLookupError` if there is none."""
        stat = _stat(pid)
        if stat is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid, stat.start_time)

    def alive(self) -> bool:
        """Whether it runs; a process that ended and waits for its parent (a zombie) does not."""
        _reap(self.pid)
        stat = _stat(self.pid)
        return stat is not None and stat.start_time == self.start_time and stat.state not in "ZX"

    def signal(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _reap(pid: int) -> None:
    """Let a child of ours that has ended go; nothing for other processes."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start a command as the leader of a new session, detached from the terminal; its output goes to `log` (0600)."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    return Process.of(os.posix_spawn(command[0], list(command), dict(environment), file_actions=actions, setsid=True))


def session_members(leader: Process, directory: Path) -> list[Process]:
    """The running processes of a leader's session, the leader included.

    Once the leader is gone its number may name a session of somebody else's; then only processes that hold a file
    below `directory` open (Ray's own log files) count. Cost: one pass over /proc.
    """
    now = _stat(leader.pid)
    if now is not None and now.start_time != leader.start_time:
        return []  # a session's number is free for reuse only once the session is empty
    found = [process for process, stat in _all_processes() if stat.session == leader.pid]
    if now is not None:
        return found
    return [process for process in found if _holds_file_below(process.pid, directory)]


def _all_processes() -> Iterator[tuple[Process, _Stat]]:
    for name in os.listdir("/proc"):
        stat = _stat(int(name)) if name.isdigit() else None
        if stat is not None and stat.state not in "ZX":
            yield Process(int(name), stat.start_time), stat


def _holds_file_below(pid: int, directory: Path) -> bool:
    prefix = str(directory) + "/"
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it ended, or is none of ours
        return any(path.startswith(prefix) for path in _open_files(pid))
    return False


def _open_files(pid: int) -> list[str]:
    paths = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed since it was listed
            paths.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return paths


def stop_sessions(leaders: Iterable[Process], directory: Path, wait_s: float) -> list[int]:
    """SIGTERM to each leader, `wait_s` for their sessions to empty, then SIGKILL to what is left of these sessions.

    What outlives its leader gets a SIGTERM too, and 2 s. Returns the pids that had to be killed; empty if all ended by
    themselves. `directory`: see `session_members`.
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
    """Wait until all `known` processes and the leaders' sessions are gone; return those that are not. Adds to `known`.

    What outlives its leader has nobody left to end it: it gets a SIGTERM, and less time (Ray's agents go on regardless).
    """
    deadline_s = time.monotonic() + wait_s
    asked: set[Process] = set()
    while True:
        for leader in leaders:
            members = session_members(leader, directory)
            known.update(members)
            orphans = set() if leader.alive() else set(members) - asked
            asked |= orphans
            for process in orphans:
                process.signal(signal.SIGTERM)
        if not any(leader.alive() for leader in leaders):
            deadline_s = min(deadline_s, time.monotonic() + _ORPHANS_WAIT_S)
        left = [process for process in known if process.alive()]
        if not left or time.monotonic() >= deadline_s:
            return left
        time.sleep(_POLL_S)
