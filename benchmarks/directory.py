"""The coordinator of a real cluster is killed while the directory has many blocks: how long until it is whole, and local hits meanwhile.

    python -m benchmarks.directory --blocks 100000 --times 5 --out benchmarks/results/directory.json

Two nodes; the first has all blocks, of 1 KiB. A process fetches one document from memory over and over. The coordinator is killed
(`kill -9`), and asked how many blocks it knows until it knows all of them again. Exit status 1 if that takes longer than 10 s.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from tests.faults.local_cluster import COORDINATOR, LocalCluster
from tests.faults.workers import wait_until
from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of
from tiered_kv.cluster import attach, raylocal, start
from tiered_kv.cluster.localnodes import LocalNodes
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout

NAME = "directory"
LAYOUT = KVLayout(layers=1, kv_heads=1, head_dim=8, dtype="float32", block_tokens=16)
DOCUMENT_BLOCKS = 1000
SLOT_S = 0.5
QUIET_S = 5.0
WHOLE_MAX_S = 10.0


def tokens_of(document: int, blocks: int = DOCUMENT_BLOCKS) -> list[int]:
    """Returns the prompt of a document."""
    return list(range(document * 100_000, document * 100_000 + blocks * LAYOUT.block_tokens))


def client_of_node(node_id: str) -> Client:
    """Returns a client of one of the nodes."""
    nodes = LocalNodes(NAME, node_id=node_id)
    info = nodes.find()
    assert info is not None, f"{node_id} does not run"
    return client_of(info, LAYOUT, Namespace(weights="directory"), find=nodes.find)


def fill(blocks: int) -> None:
    """Stores the blocks."""
    kv = torch.zeros(LAYOUT.kv_shape(DOCUMENT_BLOCKS * LAYOUT.block_tokens))
    with client_of_node("node-0") as client:
        for document in range(blocks // DOCUMENT_BLOCKS):
            while client.store(tokens_of(document), kv).refused:
                time.sleep(0.1)


def hit(counts: "Synchronized[Any]", slots: int, begun_s: float) -> None:
    """Fetches 16 blocks from memory over and over, and counts the hits of each half second."""
    torch.set_num_threads(1)
    with client_of_node("node-0") as client:
        ids = tokens_of(0, 16)
        out = torch.empty(LAYOUT.kv_shape(len(ids)))
        while (slot := int((time.monotonic() - begun_s) / SLOT_S)) < slots:
            if client.fetch(ids, out).tokens == len(ids):
                counts[slot] += 1


def known_blocks() -> int:
    """Returns how many blocks the coordinator knows of the first node; -1 if it does not answer."""
    try:
        nodes = start.describe(NAME, within_s=1.0)["nodes"]
    except TieredKVError:
        return -1
    return sum(node["directory_blocks"] for node in nodes if node["node"] == "node-0")


def once(cluster: LocalCluster, blocks: int) -> dict[str, Any]:
    """Kills the coordinator once. Returns the seconds until its directory was whole, and the rates of local hits."""
    slots = int((2 * QUIET_S + 3 * WHOLE_MAX_S) / SLOT_S)
    counts = multiprocessing.Array("q", slots, lock=False)
    begun_s = time.monotonic()
    hitting = multiprocessing.get_context("spawn").Process(target=hit, args=(counts, slots, begun_s))
    hitting.start()
    wait_until(lambda: sum(counts) > 0, 60.0, "local hits")
    time.sleep(QUIET_S)
    [pid] = cluster.pids(COORDINATOR)
    os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    wait_until(lambda: pid not in cluster.pids(COORDINATOR), 5.0, "the coordinator is dead")
    answers_s = wait_until(lambda: known_blocks() >= 0, 60.0, "the coordinator answers") and time.monotonic() - killed_s
    wait_until(lambda: known_blocks() >= blocks, 60.0, "the directory is whole")
    whole_s = time.monotonic() - killed_s
    time.sleep(QUIET_S)
    hitting.terminate()
    hitting.join()
    at = [int((moment_s - begun_s) / SLOT_S) for moment_s in (killed_s, killed_s + whole_s)]
    return {"answers_s": round(answers_s, 2), "whole_s": round(whole_s, 2)} | rates(list(counts), at[0], at[1])


def rates(counts: list[int], killed: int, whole: int) -> dict[str, Any]:
    """Returns the median hits a second before, while and after the coordinator was gone. Slots that were cut short are left out."""
    first = next(at for at, count in enumerate(counts) if count) + 1
    last = max(at for at, count in enumerate(counts) if count)
    parts = {"before": counts[first:killed], "meanwhile": counts[killed + 1 : whole], "after": counts[whole + 1 : last]}
    found = {f"hits_per_s_{name}": statistics.median(part) / SLOT_S for name, part in parts.items() if part}
    slowest = {f"hits_per_s_{name}_min": min(part) / SLOT_S for name, part in parts.items() if part}
    return found | slowest | {"ratio": round(found["hits_per_s_meanwhile"] / found["hits_per_s_before"], 3)}


def measured(blocks: int, times: int, scratch: Path) -> dict[str, Any]:
    """Measures so many times on one cluster."""
    os.environ["TIERED_KV_STATE"] = str(scratch / "state")
    cluster = LocalCluster(NAME, scratch, "--host", "1GiB")
    try:
        attach.join(NAME)
        fill(blocks)
        wait_until(lambda: known_blocks() >= blocks, 60.0, "the directory knows all blocks")
        runs = []
        for _ in range(times):
            runs.append(once(cluster, blocks))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            time.sleep(2.0)
        load = Path("/proc/loadavg").read_text().split()[0]
        return {"blocks": blocks, "runs": runs, "whole_s_max": max(run["whole_s"] for run in runs), "load": float(load)}
    finally:
        raylocal.leave_ray()
        cluster.down()


def main() -> int:
    """Returns 0 if the directory was whole in time."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--blocks", type=int, default=100_000)
    options.add_argument("--times", type=int, default=5)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="tkv-directory-") as scratch:
        result = measured(given.blocks, given.times, Path(scratch))
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return int(result["whole_s_max"] > WHOLE_MAX_S)


if __name__ == "__main__":
    sys.exit(main())
