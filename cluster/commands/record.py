"""The work behind `tiered-kv record`: collects the requests of all nodes of a cluster into one trace, in time order."""

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
from tiered_kv.node.trace_recorder import PENDING_S
from tiered_kv.protocol.peer_transport import Ask

POLL_S = 1.0
NOBODY_S = 60.0
"""The recording ends if no node has answered for this long."""


@dataclass
class _Source:
    """The state of one node's recording, in milliseconds of the trace.

    `begun_ms`: when the node started to record, or None while it does not record. The true time is up to `slack_ms` later.
    `complete_ms`: all requests that began before this time have been received.
    """

    begun_ms: float | None = None
    slack_ms: float = 0.0
    complete_ms: float = 0.0
    is_gone: bool = False
    lost: int = 0


class ClusterRecording:
    """Starts the recorders of all nodes, reads them, and writes their requests in time order.

    The recorder of a node that was unreachable is started again once the node answers.
    """

    def __init__(
        self,
        ask: Ask,
        nodes: Iterable[str],
        write: Callable[[dict], None],
        log: Callable[[str], None],
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.requests = 0
        self.blocks = 0
        self._ask, self._write, self._log = ask, write, log
        self._now_s = now_s
        self._begun_s = self._answered_s = now_s()
        self._salt = secrets.token_bytes(16)
        self._sources = {node: _Source() for node in nodes}
        self._waiting: list[tuple[float, int, dict]] = []
        self._order = count()

    @property
    def recording(self) -> list[str]:
        """The nodes that are recording now."""
        return [node for node, source in self._sources.items() if source.begun_ms is not None]

    @property
    def lost(self) -> int:
        """The number of requests that the nodes report as missing from the recording."""
        return sum(source.lost for source in self._sources.values())

    @property
    def nobody_answers(self) -> bool:
        """Whether no node has answered for `NOBODY_S` seconds."""
        return self._now_s() - self._answered_s > NOBODY_S

    def start(self) -> None:
        """Start recording on every node. Raises the first error if recording started on no node."""
        errors = self._start_missing()
        if not self.recording:
            raise next(iter(errors.values()), TieredKVError(Kind.CLUSTER, "the cluster has no nodes"))

    def poll(self, everything: bool = False) -> None:
        """Read the new requests of all nodes. Write those requests before which no other request can still arrive."""
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
        """Read and write all remaining requests, then stop the recording on all nodes."""
        self.poll(everything=True)
        self._write_before(float("inf"))
        self.stop()

    def stop(self) -> None:
        """Stop the recording on all nodes. Nodes that do not answer stop by themselves."""
        self._ask(self.recording, "record", False)
        for source in self._sources.values():
            source.begun_ms = None

    def check(self) -> None:
        """Assert that every waiting request is queued under its own timestamp."""
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
                self._log(f"{node} answers again and records again")
        return errors

    def _gone(self, node: str, error: TieredKVError) -> None:
        source = self._sources[node]
        source.begun_ms = None
        if not source.is_gone:
            source.is_gone = True
            self._log(f"recording continues without {node}: {error}")

    def _write_before(self, time_ms: float) -> None:
        while self._waiting and self._waiting[0][0] < time_ms:
            request = heapq.heappop(self._waiting)[2]
            self._write(request)
            self.requests += 1
            self.blocks += len(request["hash_ids"])

    def _now_ms(self) -> float:
        return (self._now_s() - self._begun_s) * 1000


def record(recording: ClusterRecording, seconds: float | None, console: Console, stopped: threading.Event) -> None:
    """Record for `seconds` or until `stopped` is set, then finish.

    The nodes' recorders are always stopped at the end, also if the trace cannot be written.
    """
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
    """Yields an event that the first Ctrl-C or SIGTERM sets instead of ending the process.

    A second signal has its usual effect. The previous signal handlers are restored at the end.
    """
    event = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            with suppress(TypeError):  # a handler set by C code cannot be restored
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
    """Returns whether the file's name contains the block size in the form that `tiered-kv simulate` reads (-b64)."""
    named = re.search(r"-b([1-9]\d*)(?=[._-]|$)", Path(path).name)
    return named is not None and int(named[1]) == block_tokens
