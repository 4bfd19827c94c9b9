"""How fast a fleet follows: a Ray node that joins, a coordinator that is killed, and a node that is drained.

    .venv/bin/python -m benchmarks.fleet --blocks 100000

Starts a cluster of its own on this machine and stops it. Prints one JSON record: seconds until a joined Ray node's cache node serves
(from when Ray says that the node is up), until a killed coordinator has the whole directory again, and of a drain, with its rate.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch

import tiered_kv
from tiered_kv.actors.names import NAMESPACE, coordinator_name
from tiered_kv.client.connect import client_of
from tiered_kv.cluster import attach, draining, raylocal, start, state
from tiered_kv.cluster.stop import down
from tiered_kv.config import Config

NAME = "bench-fleet"
LAYOUT = tiered_kv.KVLayout(layers=1, kv_heads=1, head_dim=16, dtype="float16", block_tokens=16)
"""Blocks of 1 KiB: many for little memory."""
CHAIN_BLOCKS = 500
WITHIN_S = 120.0


def until(condition: Callable[[], bool]) -> float:
    """Returns the seconds until the condition is true. Raises `TimeoutError` after WITHIN_S."""
    begun_s = time.monotonic()
    while not condition():
        if time.monotonic() - begun_s > WITHIN_S:
            raise TimeoutError
        time.sleep(0.02)
    return time.monotonic() - begun_s


def join_one() -> float:
    """Let a Ray node join. Returns the seconds until its cache node serves."""
    known = state.load(NAME)
    processes = raylocal.RayProcesses(known.address, known.node_ips, known.token_path or "", known.temp_dir or "", known.processes)
    started = raylocal.add_nodes([1], processes, raylocal.OBJECT_STORE_BYTES_MIN, directory=state.cluster_dir(NAME))
    replace(known, processes=(*known.processes, *started), node_ips=(*known.node_ips, raylocal.local_ip(1))).save()
    return until(lambda: [member["state"] for member in start.describe(NAME)["fleet"]["members"]] == ["serving", "serving"])


def fill(blocks: int) -> None:
    """Store chains on node-1."""
    [info] = [node for node in start.describe(NAME)["nodes"] if node["node"] == "node-1"]
    kv = torch.zeros(LAYOUT.kv_shape(CHAIN_BLOCKS * LAYOUT.block_tokens), dtype=torch.float16)
    with client_of(info, LAYOUT, tiered_kv.Namespace(weights="bench")) as client:
        for chain in range(blocks // CHAIN_BLOCKS):
            first = chain * CHAIN_BLOCKS * LAYOUT.block_tokens
            client.store(list(range(first, first + CHAIN_BLOCKS * LAYOUT.block_tokens)), kv)


def in_directory() -> int:
    """Returns how many blocks of node-1 the coordinator knows."""
    return sum(node["directory_blocks"] for node in start.describe(NAME, WITHIN_S)["nodes"] if node["node"] == "node-1")


def measured(blocks: int) -> dict[str, Any]:
    """Returns the record."""
    joined_s = join_one()
    fill(blocks)
    until(lambda: in_directory() >= blocks)
    ray.kill(ray.get_actor(coordinator_name(NAME), NAMESPACE), no_restart=False)
    whole_s = until(lambda: in_directory() >= blocks)
    begun_s = time.monotonic()
    drained = draining.drain(NAME, "node-1", WITHIN_S)
    drain_s = time.monotonic() - begun_s
    taken = sum(drained.taken.values())
    return {
        "load": os.getloadavg()[0],
        "joined_s": round(joined_s, 2),
        "blocks": blocks,
        "directory_whole_s": round(whole_s, 2),
        "drain_s": round(drain_s, 2),
        "taken": taken,
        "left": drained.left,
        "taken_per_s": round(taken / drain_s),
    }


def main() -> None:
    """Run the benchmark."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--blocks", type=int, default=100_000, help="blocks of 1 KiB on the node that is drained (default: 100000)")
    options.add_argument("--host", default="1GiB", help="host memory of each node (default: 1GiB)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TIERED_KV_STATE"] = folder
        start.up(Config.of(host=given.host, block_tokens=LAYOUT.block_tokens), name=NAME, nodes=1)
        try:
            attach.join(NAME)
            print(json.dumps(measured(given.blocks)))
        finally:
            down(NAME)


if __name__ == "__main__":
    main()
