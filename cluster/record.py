"""`tiered-kv record`: the requests of a running cluster, gathered from all its nodes into one trace, in the order of time."""

import heapq
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from rich.console import Console

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.service.link import Ask
from tiered_kv.service.recorder import PENDING_S

POLL_S = 1.0
NOBODY_S = 60.0
"""With no node answering for so long, the recording ends."""


@dataclass
class _Source:
    """One node, in the time of the trace. `begun_ms`: when it began, or up to `slack_ms` before; None while it does not record.

    `complete_ms`: all that began before it is here.
    """

    begun_ms: float | None = None
    slack_ms: float = 0.0
    complete_ms: float = 0.0
    is_gone: bool = False
    lost: int = 0


class ClusterRecording:
    """Starts the nodes' recorders, reads them, and writes what they say in order. A node that went away is started when it is back."""

    def __init__(
        self,
        ask: Ask,
        nodes: Iterable[str],
        write: Callable[[dict], None],
        say: Callable[[str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.requests = 0
        self.blocks = 0
        self._ask, self._write, self._say = ask, write, say
        self._now_s = now_s
        self._begun_s = self._answered_s = now_s()
        self._salt = secrets.token_bytes(16)
        self._sources = {node: _Source() for node in nodes}
        self._waiting: list[tuple[float, int, dict]] = []
        self._order = count()

    @property
    def recording(self) -> list[str]:
        """The nodes that record now."""
        return [node for node, source in self._sources.items() if source.begun_ms is not None]

    @property
    def lost(self) -> int:
        """Requests that nodes know to be missing."""
        return sum(source.lost for source in self._sources.values())

    @property
    def nobody_answers(self) -> bool:
        """Whether no node has answered for a long time."""
        return self._now_s() - self._answered_s > NOBODY_S

    def start(self) -> None:
        """Have all nodes record. Raises what kept them from it if none of them does."""
        errors = self._start_missing()
        if not self.recording:
            raise next(iter(errors.values()), TieredKVError(Kind.CLUSTER, "the cluster has no nodes"))

    def poll(self, everything: bool = False) -> None:
        """Read all nodes, and write what nothing earlier can come before any more."""
        self._start_missing()
        asked_ms = self._now_ms()
        for node, answer in self._ask(self.recording, "recorded", everything).items():
            source = self._sources[node]
            if isinstance(answer, TieredKVError):
                self._gone(node, answer)
                continue
            self._answered_s = self._now_s()
            source.complete_ms, source.lost = asked_ms - PENDING_S * 1000 - source.slack_ms, answer.lost
            for request in answer.requests:
                request["timestamp"] += round(source.begun_ms or 0)
                heapq.heappush(self._waiting, (request["timestamp"], next(self._order), request))
        self._write_before(min((self._sources[node].complete_ms for node in self.recording), default=float("inf")))

    def finish(self) -> None:
        """Read what is left, write everything, and end the recording on all nodes."""
        self.poll(everything=True)
        self._write_before(float("inf"))
        self.stop()

    def stop(self) -> None:
        """End the recording on all nodes; those that do not answer end it by themselves."""
        self._ask(self.recording, "record", False)
        for source in self._sources.values():
            source.begun_ms = None

    def check(self) -> None:
        """Assert that what waits is filed under its time."""
        assert all(request["timestamp"] == time_ms for time_ms, _, request in self._waiting)

    def _start_missing(self) -> dict[str, TieredKVError]:
        missing = [node for node, source in self._sources.items() if source.begun_ms is None]
        asked_ms, errors = self._now_ms(), {}
        for node, answer in (self._ask(missing, "record", True, self._salt) if missing else {}).items():
            if isinstance(answer, TieredKVError):
                errors[node] = answer
                self._gone(node, answer)
                continue
            source = self._sources[node]
            source.begun_ms = max(asked_ms - answer * 1000, 0.0)
            source.slack_ms, source.complete_ms = self._now_ms() - asked_ms, 0.0
            if source.is_gone:
                source.is_gone = False
                self._say(f"{node} is back and records again")
        return errors

    def _gone(self, node: str, error: TieredKVError) -> None:
        source = self._sources[node]
        source.begun_ms = None
        if not source.is_gone:
            source.is_gone = True
            self._say(f"going on without {node}: {error}")

    def _write_before(self, time_ms: float) -> None:
        while self._waiting and self._waiting[0][0] < time_ms:
            request = heapq.heappop(self._waiting)[2]
            self._write(request)
            self.requests += 1
            self.blocks += len(request["hash_ids"])

    def _now_ms(self) -> float:
        return (self._now_s() - self._begun_s) * 1000


def record(recording: ClusterRecording, seconds: float | None, console: Console, stopped: threading.Event) -> None:
    """Record for so many seconds, or until `stopped` is set, and finish. If the trace cannot be written nodes stop as well."""
    end_s = time.monotonic() + (float("inf") if seconds is None else seconds)
    recording.start()
    try:
        with console.status("recording") as progress:
            while (
                not recording.nobody_answers
                and not stopped.wait(max(min(POLL_S, end_s - time.monotonic()), 0))
                and time.monotonic() < end_s
            ):
                recording.poll()
                nodes = len(recording.recording)
                progress.update(f"recording: {recording.requests:,} requests, {recording.blocks:,} blocks, {nodes} nodes")
        recording.finish()
    finally:
        recording.stop()


@contextmanager
def interrupted() -> Iterator[threading.Event]:
    """An event that Ctrl-C, or SIGTERM, sets instead of what else it does; the second time it does that again."""
    event = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            with suppress(TypeError):  # set by C code, which cannot be put back
                signal.signal(number, handler)

    def stop(*_: object) -> None:
        event.set()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        restore()


def names_blocks(path: str, block_tokens: int) -> bool:
    """Whether the file's name says how many tokens a block has, as `tiered-kv simulate` understands it."""
    named = re.search(r"-b([1-9]\d*)(?=[._-]|$)", Path(path).name)
    return named is not None and int(named[1]) == block_tokens
