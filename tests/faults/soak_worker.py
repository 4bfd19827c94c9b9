"""A worker of a soak: works for hours, checks every block that it fetches, and keeps only counts.

    python -m tests.faults.soak_worker --cluster NAME --out COUNTS.json --node-id node-0 --number 0 --workers 3 [--churn-s 5]

With `--churn-s` it attaches, works for that long, forks a child that works on for two seconds with the client that it inherited,
detaches, and begins again. It writes its counts once a second, and ends when its standard input ends.
"""

import argparse
import json
import os
import select
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from tests.faults.history import Operation
from tests.faults.worker import Documents, Worker, client_on, expected_digest
from tests.hostile.nursery import end_with_parent

LATE_MS = 50.0
CHILD_S = 2.0
WRITE_EVERY_S = 1.0
KEPT = 300
"""Documents that are used for ever: more than fit into host memory, so that they come back from disk."""


class Tally:
    """Counts operations, and now and then replaces a file by one with the new counts."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._written_s = 0.0
        self.counts: Counter[str] = Counter()

    def add(self, operation: Operation) -> None:
        """Checks one operation and counts it."""
        expected = tuple(expected_digest(bytes.fromhex(key)) for key in operation.keys)
        self.counts[operation.kind] += 1
        self.counts["wrong"] += sum(a != b for a, b in zip(operation.digests, expected, strict=True))
        self.counts["errors"] += bool(operation.error)
        self.counts["refused_blocks"] += operation.refused
        if operation.kind == "fetch":
            self.counts["fetched_blocks"] += len(operation.keys)
            self.counts["late"] += operation.overrun_ms > LATE_MS
            for tier, tokens in (operation.tiers or {}).items():
                self.counts[f"tokens_{tier}"] += tokens
        if operation.error:
            print(operation, file=sys.stderr, flush=True)
        if time.monotonic() > self._written_s + WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Writes the counts."""
        written = self._out.with_suffix(".new")
        written.write_text(json.dumps(self.counts))
        written.rename(self._out)
        self._written_s = time.monotonic()


class SoakWorker:
    """The worker of this process. `pause_s`: the pause between operations."""

    def __init__(self, cluster: str, node_id: str, documents: Documents, out: Path, pause_s: float) -> None:
        self._cluster = cluster
        self._node_id = node_id
        self._documents = documents
        self._pause_s = pause_s
        self._out = out
        self.tally = Tally(out)

    def ends(self) -> bool:
        """Waits for a pause. Returns whether the input has ended."""
        return bool(select.select([sys.stdin], [], [], self._pause_s)[0])

    def session(self, seconds: float, *, forks: bool) -> None:
        """Attaches, works for some seconds or until the input ends, and detaches."""
        with client_on(self._cluster, self._node_id) as client:
            worker = Worker(client, self._out.stem, self._documents, self.tally.add)
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s and not self.ends():
                worker.step()
            if forks:
                self._fork(worker)
        self.tally.counts["sessions"] += 1

    def _fork(self, worker: Worker) -> None:
        """Forks a child that works on with the client that it inherited. Counts the child as failed if it found something wrong."""
        self.tally.counts["forks"] += 1
        pid = os.fork()
        if pid:
            self.tally.counts["errors"] += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
            return
        status = 1
        try:
            end_with_parent()
            self.tally.write = lambda: None  # the file is the parent's
            end_s = time.monotonic() + CHILD_S
            while time.monotonic() < end_s:
                time.sleep(self._pause_s)
                worker.step()
            status = int(bool(self.tally.counts["wrong"] or self.tally.counts["errors"]))
        finally:
            os._exit(status)


def main() -> None:
    """Work until the input ends."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cluster", required=True)
    options.add_argument("--out", required=True, type=Path)
    options.add_argument("--node-id", required=True)
    options.add_argument("--number", type=int, required=True)
    options.add_argument("--workers", type=int, required=True)
    options.add_argument("--pause-ms", type=float, default=100.0)
    options.add_argument("--churn-s", type=float, default=0.0)
    given = options.parse_args()
    torch.set_num_threads(1)
    documents = Documents(given.number, given.workers, KEPT)
    worker = SoakWorker(given.cluster, given.node_id, documents, given.out, given.pause_ms / 1000)
    print("attached", flush=True)
    while not worker.ends():
        worker.session(given.churn_s or float("inf"), forks=given.churn_s > 0)
    worker.tally.write()


if __name__ == "__main__":
    main()
