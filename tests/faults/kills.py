"""Kills (`kill -9`) and stops (SIGSTOP) each process of a real cluster of two Ray nodes in turn, while workers go on.

    python -m tests.faults.kills [--out FIGURES.json]

Prints JSON: for each fault, by how much fetches missed their deadline at most, the hits meanwhile, and the seconds until the
nodes exchange blocks again.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import history
from tests.faults.history import Operation
from tests.faults.local_cluster import COORDINATOR, GCS, NODE, RAYLET, LocalCluster
from tests.faults.workers import wait_until

MEANWHILE_S = 2.0
WHOLE_WITHIN_S = 120.0
WORKERS = 3
PAUSE_MS = 25


@dataclass(frozen=True)
class Fault:
    """A process to make fail.

    `what`: words of its command line, or the name of a worker. `node`: the number of its Ray node; None for any.

    `is_fatal`: whether Ray does not recover by itself, so that the operator must run `tiered-kv up` again.
    """

    name: str
    what: str
    signal: int
    node: int | None = None
    is_fatal: bool = False


VICTIM = "victim"
FAULTS = (
    Fault("worker stopped", VICTIM, signal.SIGSTOP),
    Fault("worker killed", VICTIM, signal.SIGKILL),
    Fault("node actor stopped", NODE, signal.SIGSTOP, node=1),
    Fault("node actor killed", NODE, signal.SIGKILL, node=1),
    Fault("coordinator stopped", COORDINATOR, signal.SIGSTOP),
    Fault("coordinator killed", COORDINATOR, signal.SIGKILL),
    Fault("raylet stopped", RAYLET, signal.SIGSTOP, node=1),
    Fault("control store of Ray stopped", GCS, signal.SIGSTOP),
    Fault("raylet killed", RAYLET, signal.SIGKILL, node=1, is_fatal=True),
    Fault("control store of Ray killed", GCS, signal.SIGKILL, is_fatal=True),
)
"""To the worker of node-0, the node actor of node-1 is a peer."""


class Kills:
    """A cluster of two nodes, each with a worker on it. One more worker, the victim, is started when it is to fail."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self._victims = 0
        for node in (0, 1):
            self._start(node, f"worker-{node}", node)

    def _start(self, node: int, name: str, number: int) -> None:
        self.cluster.start_worker(node, name, "--number", str(number), "--workers", str(WORKERS), "--pause-ms", str(PAUSE_MS))

    def cause(self, fault: Fault) -> dict[str, Any]:
        """Causes a fault, and waits until the cluster has recovered. Returns what was measured.

        Raises `AssertionError` if something is wrong.
        """
        begun_ns = time.monotonic_ns()
        self._cross(begun_ns, "before the fault")
        victim = self._new_victim() if fault.what == VICTIM else None
        caused_ns = time.monotonic_ns()
        self._send(fault, victim)
        time.sleep(MEANWHILE_S)
        meanwhile = self._others(caused_ns)
        mended_ns = time.monotonic_ns()
        if fault.signal == signal.SIGSTOP:
            self._send(fault, victim, signal.SIGCONT)
        if fault.is_fatal:
            self.cluster.up()
        whole_s = self._cross(mended_ns, fault.name)
        if victim is not None and fault.signal == signal.SIGSTOP:
            assert self.cluster.workers.end(victim) == 0
        return self._judged(fault, meanwhile, self.cluster.workers.history(caused_ns)) | {"whole_s": round(whole_s, 2)}

    def _new_victim(self) -> str:
        self._victims += 1
        name = f"{VICTIM}-{self._victims}"
        self._start(0, name, 2)
        time.sleep(0.2)
        return name

    def _send(self, fault: Fault, victim: str | None, number: int | None = None) -> None:
        if victim is not None and fault.signal == signal.SIGKILL:
            self.cluster.workers.kill(victim)
            return
        pids = [self.cluster.workers.pid(victim)] if victim is not None else self.cluster.pids(fault.what, fault.node)
        assert pids, f"no process to fail: {fault.name}"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number or fault.signal)

    def _others(self, since_ns: int) -> list[Operation]:
        return [each for each in self.cluster.workers.history(since_ns) if not each.worker.startswith(VICTIM)]

    def _cross(self, since_ns: int, what: str) -> float:
        """Waits until the worker of each node has fetched blocks from the other node, after the time `since_ns`.

        Returns the seconds waited.
        """

        def crossed() -> bool:
            found = self._others(since_ns)
            return all(history.hits(each for each in found if each.worker == f"worker-{node}")["peer"] for node in (0, 1))

        wait_until(crossed, WHOLE_WITHIN_S, f"blocks cross the nodes: {what}")
        return (time.monotonic_ns() - since_ns) / 1e9

    @staticmethod
    def _judged(fault: Fault, meanwhile: list[Operation], operations: list[Operation]) -> dict[str, Any]:
        by_node = {node: [each for each in meanwhile if each.worker == f"worker-{node}"] for node in (0, 1)}
        hits = {f"worker-{node}": dict(history.hits(each)) for node, each in by_node.items()}
        for worker, tiers in hits.items():
            assert tiers.get("host"), f"{fault.name}: {worker} hit nothing in memory meanwhile: {hits}"
        return {
            "fault": fault.name,
            "operations": len(operations),
            "hit_tokens_meanwhile": hits,
            "longest_fetch_beyond_its_deadline_ms": round(history.longest_overrun_ms(operations), 2),
        }


@contextmanager
def kills(name: str) -> Iterator[Kills]:
    """A cluster to kill, which is stopped at the end. `TIERED_KV_STATE` names a folder of its own meanwhile."""
    before = os.environ.get("TIERED_KV_STATE")
    with tempfile.TemporaryDirectory(prefix="tkv-kills-") as scratch:
        os.environ["TIERED_KV_STATE"] = f"{scratch}/state"
        cluster = LocalCluster(name, Path(scratch), "--host", "24MiB")
        try:
            run = Kills(cluster)
            yield run
            assert set(cluster.workers.end_all().values()) == {0}
        finally:
            cluster.workers.kill_all()
            cluster.down()
            os.environ.pop("TIERED_KV_STATE")
            if before is not None:
                os.environ["TIERED_KV_STATE"] = before


def run_all(faults: tuple[Fault, ...], say: Callable[[dict], None]) -> dict[str, Any]:
    """Causes all faults in turn. Returns the figures."""
    with kills("kills") as run:
        found = []
        for fault in faults:
            found.append(run.cause(fault))
            say(found[-1])
        everything = run.cluster.workers.history()
    longest = max(each["longest_fetch_beyond_its_deadline_ms"] for each in found)
    return {
        "faults": found,
        "operations": len(everything),
        "wrong": history.faults_of(everything),
        "longest_fetch_beyond_its_deadline_ms": longest,
    }


def main() -> int:
    """Returns 0 if no answer was wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="write the figures there, too")
    given = options.parse_args()
    figures = run_all(FAULTS, lambda found: print(json.dumps(found), file=sys.stderr, flush=True))
    text = json.dumps(figures, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
