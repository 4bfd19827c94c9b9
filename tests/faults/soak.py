"""A soak: a cluster of two nodes that workers use for hours, with eviction and disk. Nothing may grow, and no answer may be wrong.

    make soak HOURS=1
    python -m tests.faults.soak --hours 1 --out FIGURES.json

Two workers stay attached; a third attaches, works, forks a child, and detaches, over and over. Host memory and disk are small, so
that blocks are evicted all the time. Once a minute the memory (PSS, RSS), open files and threads of every process are written down,
and the bytes in `/dev/shm` and in the disk folder. Exit status 1 if one of them grew by more than 5 % over the second half, or
if a block was wrong. Ray's own logs are written down too, but may grow: Ray rotates them. So may PSS: it depends on other processes.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from tests.faults.local_cluster import COORDINATOR, GCS, NODE, RAYLET, VARIABLES, LocalCluster
from tests.faults.ray_machines import command_of
from tiered_kv.cluster import state

SAMPLE_EVERY_S = 60.0
GROWTH_MAX = 0.05
FLOORS = {"rss_bytes": 2 << 20, "fds": 3, "threads": 2, "bytes": 1 << 20}
"""Less growth than this is not growth: of memory, allocators and page tables; of files and threads, what comes and goes."""
UNJUDGED = ("Ray's logs", "pss_bytes")
"""The PSS of a process grows when another one ends that had mapped the same libraries, for example of another Ray on this machine."""
WORKERS = {"worker-0": 0, "worker-1": 1, "worker-churn": 0}
"""By name the node that each uses."""
CHURN_S = 5.0
Sample = dict[str, dict[str, float]]


def figures_of(pid: int) -> dict[str, float]:
    """Returns the memory, open files and threads of a process; {} if it has ended."""
    try:
        process = psutil.Process(pid)
        memory = process.memory_full_info()
        return {"pss_bytes": memory.pss, "rss_bytes": memory.rss, "fds": process.num_fds(), "threads": process.num_threads()}
    except psutil.Error:
        return {}


def bytes_below(folder: Path) -> dict[str, float]:
    """Returns the bytes that the files below a folder occupy."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except OSError:
            continue  # it was removed just now
    return {"bytes": total}


def role_of(command: str) -> str:
    """Returns what a process of Ray is: "raylet", "node actor", …; its program's name for all others."""
    roles = {COORDINATOR: "coordinator", NODE: "node actor", RAYLET: "raylet", GCS: "control store of Ray"}
    found = [role for words, role in roles.items() if words in command]
    words = [os.path.basename(word) for word in command.split() if word.endswith(".py")]
    return found[0] if found else (words or ["ray start"])[0]


class Soak:
    """A cluster, its workers, and the samples that are taken of them."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._disk = scratch / "disk"
        settings = ["--host", "24MiB", "--disk", f"32MiB:{self._disk}"]
        self.cluster = LocalCluster("soak", scratch, *settings)
        self._counts: dict[str, Path] = {}
        for number, (name, node) in enumerate(WORKERS.items()):
            self._start(name, node, number)
        self._roles = self._find_roles()
        self.samples: list[Sample] = []

    def _start(self, name: str, node: int, number: int) -> None:
        self._counts[name] = self._scratch / f"{name}.json"
        arguments = ["--node-id", f"node-{node}", "--number", str(number), "--workers", str(len(WORKERS))]
        churn = ["--churn-s", str(CHURN_S)] if name == "worker-churn" else []
        environment = self.cluster.environment()
        out = self._counts[name]
        self.cluster.workers.start(name, *arguments, *churn, env=environment, module="tests.faults.soak_worker", out=out)

    def _find_roles(self) -> dict[int, str]:
        """Returns a name for each process that lives as long as the soak. Processes of one role get numbers, by their pids."""
        found: dict[int, str] = {self.cluster.workers.pid(name): name for name in WORKERS}
        seen: Counter[str] = Counter()
        for pid in sorted(self.cluster.everything()):
            role = role_of(command_of(pid))
            found[pid] = f"{role} {seen[role]}"
            seen[role] += 1
        return found

    def sample(self) -> Sample:
        """Takes a sample of everything."""
        taken: Sample = {name: figures for pid, name in self._roles.items() if (figures := figures_of(pid))}
        for node in (0, 1):
            taken[f"/dev/shm of node-{node}"] = bytes_below(self.cluster.directory(node))
        taken["disk"] = bytes_below(self._disk)
        taken["Ray's logs"] = bytes_below(Path(state.load(self.cluster.name).temp_dir or ""))
        taken["processes"] = {"count": len(self.cluster.everything())}
        self.samples.append(taken)
        return taken

    def counts(self) -> Counter[str]:
        """Returns the counts of all workers."""
        total: Counter[str] = Counter()
        for path in self._counts.values():
            if path.exists():
                total.update(json.loads(path.read_text()))
        return total


def growth_of(samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Returns how much each figure of each process or folder grew in the run's second half.

    Growth is the median of that half's last third, divided by that of its first third.
    """
    half = samples[len(samples) // 2 :]
    third = max(len(half) // 3, 1)
    found: dict[str, dict[str, float]] = {}
    for thing in half[0]:
        for figure in half[0][thing]:
            values = [sample[thing][figure] for sample in half if thing in sample]
            early, late = statistics.median(values[:third]), statistics.median(values[-third:])
            if early:
                found.setdefault(thing, {})[figure] = late / early - 1
    return found


def faults_of(samples: list[Sample], counts: Counter[str]) -> list[str]:
    """Returns a text for each process or folder that grew, for each process that ended, and for wrong answers."""
    faults = [f"{name} is {counts[name]}, must be 0" for name in ("wrong", "errors") if counts[name]]
    half = samples[len(samples) // 2 :]
    faults += [f"{thing} has ended" for thing in half[0] if thing not in samples[-1]]
    for thing, figures in growth_of(samples).items():
        for figure, growth in figures.items():
            values = [sample[thing][figure] for sample in half if thing in sample]
            grew = growth > GROWTH_MAX and max(values) - min(values) > FLOORS.get(figure, 0)
            if grew and not {thing, figure} & set(UNJUDGED):
                faults.append(f"{figure} of {thing} grew by {growth:.1%} over the second half, from {values[0]:.0f} to {values[-1]:.0f}")
    return faults


def soak(hours: float, scratch: Path, sample_every_s: float = SAMPLE_EVERY_S) -> dict[str, Any]:
    """Runs a soak and returns its figures."""
    os.environ["TIERED_KV_STATE"] = str(scratch / "state")
    for variable in VARIABLES:
        os.environ.pop(variable, None)
    run = Soak(scratch)
    try:
        begun_s = time.monotonic()
        while (past_s := time.monotonic() - begun_s) < hours * 3600:
            time.sleep(min(sample_every_s, hours * 3600 - past_s + 0.1))
            taken, counts = run.sample(), run.counts()
            memory = sum(figures.get("pss_bytes", 0) for figures in taken.values())
            print(f"{past_s / 60:5.1f} min: {memory / 2**20:.0f} MiB in all, {dict(counts)}", file=sys.stderr, flush=True)
        statuses = run.cluster.workers.end_all()
        counts = run.counts()
        faults = faults_of(run.samples, counts) + [f"{name} ended with status {status}" for name, status in statuses.items() if status]
        growth = {thing: {figure: round(value, 4) for figure, value in each.items()} for thing, each in growth_of(run.samples).items()}
        ends = {"half": run.samples[len(run.samples) // 2], "last": run.samples[-1]}
        return {"hours": hours, "counts": counts, "growth_over_second_half": growth, "faults": faults, "samples": len(run.samples), **ends}
    finally:
        run.cluster.workers.kill_all()
        run.cluster.down()


def main() -> int:
    """Returns 0 if nothing grew and nothing was wrong."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--hours", type=float, default=1.0)
    options.add_argument("--sample-every-s", type=float, default=SAMPLE_EVERY_S)
    options.add_argument("--out", type=Path, help="write the figures there, too")
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="tkv-soak-") as scratch:
        result = soak(given.hours, Path(scratch), given.sample_every_s)
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    print(*result["faults"], sep="\n")
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
