"""The node actor of a real cluster is killed at random moments under load, and Ray restarts it: how many committed blocks still hit?

    python -m tests.faults.restarts --times 50 --out FIGURES.json

One node with small host memory and a disk; two workers store and fetch all the time. After each `kill -9` the workers are stopped,
so that nothing else removes blocks; the index is read from its file before and after the restart, and a sample of the documents whose
blocks it showed before is fetched and compared byte by byte. Exit status 1 if fewer than 99.9 % still hit, or if a byte is wrong.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tests.faults import history
from tests.faults.local_cluster import NODE, LocalCluster
from tests.faults.worker import LAYOUT, TENANT, client_on, digest_of, expected_digest
from tests.faults.workers import wait_until
from tests.hostile.content import BLOCKS, keys_of, tokens_of
from tests.hostile.run import shown
from tiered_kv.blocks import Tier
from tiered_kv.cluster import state
from tiered_kv.cluster.survey import directories
from tiered_kv.errors import Kind, TieredKVError

KEPT_MIN = 0.999
SAMPLE_DOCUMENTS = 60
WORKERS = ("worker-0", "worker-1")
RESTART_WITHIN_S = 90.0


class Restarts:
    """A cluster of one node, and the workers that load it."""

    def __init__(self, scratch: Path, seed: int) -> None:
        self._draw = random.Random(seed)
        settings = ("--host", "8MiB", "--disk", f"96MiB:{scratch / 'disk'}")
        self.cluster = LocalCluster("restarts", scratch, *settings, nodes=1)
        self.counts: Counter[str] = Counter()
        self.restart_s: list[float] = []
        for number, name in enumerate(WORKERS):
            self.cluster.start_worker(0, name, "--number", str(number), "--workers", "2", "--pause-ms", "10")

    def once(self) -> None:
        """Kills the node once, and counts the blocks that hit after its restart."""
        time.sleep(self._draw.uniform(1.0, 4.0))
        directory = self._directory()
        self._kill()
        self._to_workers(signal.SIGSTOP)
        before = shown(directory)
        begun_s = time.monotonic()
        wait_until(self._is_back, RESTART_WITHIN_S, "the node is back")
        self.restart_s.append(time.monotonic() - begun_s)
        after = shown(directory)
        self.counts["kills"] += 1
        for tier in (Tier.HOST, Tier.DISK):
            was = {key for key, (at, _) in before.items() if at == tier}
            self.counts[f"shown_before_{tier.label}"] += len(was)
            self.counts[f"shown_after_{tier.label}"] += len(was & after.keys())
        self._fetch_sample(before)
        self._to_workers(signal.SIGCONT)

    def _directory(self) -> Path:
        known = state.load(self.cluster.name)
        silent = TieredKVError(Kind.TRANSPORT, "not asked")
        return Path(directories(known, silent)["node-0"])

    def _kill(self) -> None:
        [pid] = self.cluster.pids(NODE)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: pid not in self.cluster.pids(NODE), 10.0, "the node is dead")
        self._killed_pid = pid

    def _is_back(self) -> bool:
        return any(pid != self._killed_pid for pid in self.cluster.pids(NODE)) and not self.cluster.degraded()

    def _to_workers(self, number: int) -> None:
        for name in WORKERS:
            os.kill(self.cluster.workers.pid(name), number)

    def _fetch_sample(self, before: dict[bytes, tuple[int, int]]) -> None:
        """Fetches a sample of the documents whose leading blocks were in the index before the kill. Compares the bytes of each block."""
        documents = sorted({each.document for each in self.cluster.workers.history() if each.kind == "storing"})
        known = [document for document in documents if keys_of(document, TENANT, LAYOUT)[0] in before]
        with client_on(self.cluster.name, "node-0") as client:
            for document in self._draw.sample(known, min(SAMPLE_DOCUMENTS, len(known))):
                keys = keys_of(document, TENANT, LAYOUT)
                expected = next((at for at, key in enumerate(keys) if key not in before), BLOCKS)
                fetched = client.fetch(tokens_of(document), deadline_ms=5000)
                t = LAYOUT.block_tokens
                blocks = [fetched.kv[..., at * t : (at + 1) * t, :] for at in range(fetched.tokens // t)]
                right = [digest_of(block) == expected_digest(key) for block, key in zip(blocks, keys, strict=False)]
                self.counts["fetched_wrong"] += right.count(False)
                self.counts["fetch_expected"] += expected
                self.counts["fetch_hit"] += min(right.count(True), expected)

    def result(self) -> dict[str, Any]:
        """Returns the figures."""
        counts = self.counts
        was = {tier: counts[f"shown_before_{tier}"] for tier in ("host", "disk")}
        kept = {tier: counts[f"shown_after_{tier}"] / was[tier] for tier in was if was[tier]}
        return {
            **counts,
            "kept": kept,
            "hit_verified_by_content": counts["fetch_hit"] / counts["fetch_expected"],
            "restart_s_max": max(self.restart_s),
            "restart_s_median": sorted(self.restart_s)[len(self.restart_s) // 2],
            "wrong": history.faults_of(self.cluster.workers.history()),
        }


def faults_of(result: dict[str, Any]) -> list[str]:
    """Returns a text for each way in which a result is wrong."""
    faults = list(result["wrong"])
    if result["fetched_wrong"]:
        faults.append(f"{result['fetched_wrong']} blocks were wrong")
    for what, share in {**result["kept"], "fetched": result["hit_verified_by_content"]}.items():
        if share < KEPT_MIN:
            faults.append(f"only {share:.4%} of the blocks were there after a restart ({what}), must be {KEPT_MIN:.1%}")
    return faults


def restarts(times: int, seed: int, scratch: Path) -> dict[str, Any]:
    """Kills a node `times` times. Returns the figures of all restarts."""
    os.environ["TIERED_KV_STATE"] = str(scratch / "state")
    run = Restarts(scratch, seed)
    try:
        for number in range(times):
            run.once()
            print(f"{number + 1}: {dict(run.counts)}, restart {run.restart_s[-1]:.1f} s", file=sys.stderr, flush=True)
        run.cluster.workers.end_all()
        return {"times": times, "seed": seed} | run.result()
    finally:
        run.cluster.workers.kill_all()
        run.cluster.down()


def main() -> int:
    """Returns 0 if nothing was wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--times", type=int, default=50)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tkv-restarts-") as scratch:
        result = restarts(given.times, given.seed, Path(scratch))
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    faults = faults_of(result)
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
