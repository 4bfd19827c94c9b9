"""A worker that fetches and stores all the time, whatever fails, and writes a history of it.

    python -m tests.faults.worker --cluster NAME --out FILE --number 0 --workers 2 [--node-id node-1] [--pause-ms 10]

It ends when its standard input ends. Each document is one prompt. New documents appear all the time: one for each worker in
each tick, a fixed span of the machine's clock. A worker stores its own document of the present tick, and fetches documents of
all workers that are at most `RECENT_TICKS` old. So it always needs blocks of other nodes. `--kept`: how many more documents
never change.
"""

import argparse
import random
import select
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import xxhash

from tests.faults.history import Operation
from tests.hostile.content import BLOCKS, block_of, keys_of, kv_of, namespace, tokens_of
from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of
from tiered_kv.cluster.attach import attach
from tiered_kv.cluster.localnodes import LocalNodes
from tiered_kv.keys import BlockKey
from tiered_kv.layout import KVLayout

LAYOUT = KVLayout(layers=2, kv_heads=2, head_dim=32, dtype="float32", block_tokens=16)  # blocks of 16 KiB
TENANT = "faults"
DEADLINE_MS = 200
STORE_SHARE = 0.4
KEPT_SHARE = 0.2
TICK_NS = 200_000_000
RECENT_TICKS = 20
EXPECTED_MAX = 4096


class Documents:
    """Draws which document a worker uses next. `number`: of the worker, below `workers`. `kept`: documents that never change."""

    def __init__(self, number: int, workers: int, kept: int) -> None:
        self._draw = random.Random(number)
        self._number = number
        self._workers = workers
        self._kept = kept

    def to_store(self) -> int:
        """Returns the document to store now."""
        return self._any_kept() if self._draw.random() < KEPT_SHARE else self._of(self._number, 0)

    def to_fetch(self) -> int:
        """Returns the document to fetch now, which may be another worker's."""
        if self._draw.random() < KEPT_SHARE:
            return self._any_kept()
        return self._of(self._draw.randrange(self._workers), self._draw.randint(0, RECENT_TICKS))

    def is_store_next(self) -> bool:
        """Returns whether to store, not to fetch."""
        return self._draw.random() < STORE_SHARE

    def _any_kept(self) -> int:
        return self._draw.randrange(self._kept)

    def _of(self, number: int, ticks_ago: int) -> int:
        return self._kept + (time.monotonic_ns() // TICK_NS - ticks_ago) * self._workers + number


def digest_of(block: torch.Tensor) -> str:
    """Returns a digest of a block's bytes."""
    return xxhash.xxh3_64_hexdigest(block.contiguous().numpy().tobytes())


@lru_cache(maxsize=EXPECTED_MAX)
def expected_digest(key: BlockKey) -> str:
    """Returns the digest of the bytes that belong to a key."""
    return digest_of(block_of(key, LAYOUT))


def expected_of(keys: list[BlockKey]) -> list[str]:
    """Returns the digest of each key's bytes."""
    return [expected_digest(key) for key in keys]


class Worker:
    """Fetches and stores documents through one client, and calls `write` with each operation."""

    def __init__(self, client: Client, name: str, documents: Documents, write: Callable[[Operation], object]) -> None:
        self._client = client
        self._name = name
        self._write = write
        self._documents = documents
        self._buffer = torch.empty(LAYOUT.kv_shape(BLOCKS * LAYOUT.block_tokens), dtype=LAYOUT.torch_dtype)

    def step(self) -> None:
        """Stores or fetches one random document."""
        if self._documents.is_store_next():
            self.store(self._documents.to_store())
        else:
            self.fetch(self._documents.to_fetch())

    def store(self, document: int) -> None:
        """Stores a document."""
        keys, error, refused = keys_of(document, TENANT, LAYOUT), "", 0
        begun_ns = time.monotonic_ns()
        self._record("storing", document, begun_ns, keys, expected_of(keys))
        try:
            refused = self._client.store(tokens_of(document), kv_of(keys, LAYOUT)).refused
        except Exception as raised:  # noqa: BLE001 - what the tests look for; the history says it
            error = repr(raised)
        self._record("store", document, begun_ns, keys, expected_of(keys), refused=refused, error=error)

    def fetch(self, document: int) -> None:
        """Fetches a document."""
        keys, error, blocks, tiers = keys_of(document, TENANT, LAYOUT), "", 0, {}
        begun_ns = time.monotonic_ns()
        try:
            fetched = self._client.fetch(tokens_of(document), self._buffer, deadline_ms=DEADLINE_MS)
            blocks, tiers = fetched.tokens // LAYOUT.block_tokens, fetched.tokens_by_tier
        except Exception as raised:  # noqa: BLE001 - as above
            error = repr(raised)
        ended_ns, t = time.monotonic_ns(), LAYOUT.block_tokens
        digests = [digest_of(self._buffer[..., at * t : (at + 1) * t, :]) for at in range(blocks)]
        self._record(
            "fetch", document, begun_ns, keys[:blocks], digests, ended_ns=ended_ns, tiers=dict(tiers), deadline_ms=DEADLINE_MS, error=error
        )

    def _record(self, kind: str, document: int, begun_ns: int, keys: list[BlockKey], digests: list[str], **more: Any) -> None:
        names = tuple(bytes(key).hex() for key in keys)
        more = {"ended_ns": time.monotonic_ns()} | more
        operation = Operation(self._name, kind, begun_ns, document=document, keys=names, asked=BLOCKS, digests=tuple(digests), **more)
        self._write(operation)


def client_on(cluster: str, node_id: str | None) -> Client:
    """Returns a client of the node on this machine, or of the node with this id where one machine has several."""
    space = namespace(TENANT)
    if node_id is None:
        return attach(space, lambda _: LAYOUT, name=cluster)
    nodes = LocalNodes(cluster, node_id=node_id)
    info = nodes.find()
    if info is None:
        raise SystemExit(f"no node {node_id} of cluster {cluster} runs here")
    return client_of(info, LAYOUT, space, find=nodes.find)


def main() -> None:
    """Work until the input ends."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cluster", required=True)
    options.add_argument("--out", required=True, type=Path)
    options.add_argument("--node-id")
    options.add_argument("--number", type=int, default=0, help="of this worker")
    options.add_argument("--workers", type=int, default=2, help="of the whole run")
    options.add_argument("--kept", type=int, default=8, help="documents that stay the same")
    options.add_argument("--pause-ms", type=float, default=10.0, help="between operations")
    given = options.parse_args()
    torch.set_num_threads(1)
    documents = Documents(given.number, given.workers, given.kept)
    with client_on(given.cluster, given.node_id) as client, given.out.open("a", buffering=1) as out:
        worker = Worker(client, given.out.stem, documents, lambda operation: out.write(operation.line()))
        print("attached", flush=True)
        while not select.select([sys.stdin], [], [], given.pause_ms / 1000)[0]:
            worker.step()


if __name__ == "__main__":
    main()
