"""A worker of a hostile run: stores and fetches random documents, and checks every block that it gets against its key."""

import os
import random
import time
import traceback
from pathlib import Path

import torch

import tiered_kv
from tests.history.history import HistoryWriter
from tests.history.recorded import RecordedClient
from tests.hostile.board import Board
from tests.hostile.content import BLOCKS, LAYOUT, is_right, keys_of, kv_of, namespace, tokens_of
from tests.hostile.nursery import end_with_parent
from tiered_kv.client.client import Client

STORE_SHARE = 0.3
DEADLINE_MS = 200


def run_worker(board: str, history: str, workers: list[int], cluster: str, documents: int, seed: int) -> None:
    """The role of a nursery's child: works until the board says stop.

    `workers`: its number, and those of the children that it forks once it has used its client. `cluster`: the name to attach to.
    `history`: the folder for its history.
    """
    torch.set_num_threads(1)
    with tiered_kv.attach(namespace=namespace(), layout=LAYOUT, cluster=cluster) as client, Board(board) as counts:
        me = Worker(client, counts, history, workers[0], documents, random.Random(seed))
        for _ in range(20):
            me.step()
        for worker in workers[1:]:
            if not os.fork():
                end_with_parent()
                me = Worker(client, counts, history, worker, documents, random.Random(seed + worker))
                break
        while not counts["stop"]:
            me.step()


class Worker:
    """One of the run's workers: the client, where it counts, and what it draws from."""

    def __init__(self, client: Client, counts: Board, history: str, number: int, documents: int, draw: random.Random) -> None:
        self._client = RecordedClient(client, HistoryWriter(Path(history) / f"{number}.jsonl"), f"w{number}")
        self._counts = counts
        self._number = number
        self._documents = documents
        self._draw = draw
        self._out = torch.empty(LAYOUT.kv_shape(BLOCKS * LAYOUT.block_tokens), dtype=LAYOUT.torch_dtype)

    def step(self) -> None:
        """One store or fetch. Boundary: an exception that leaves the client is what the run looks for; it is counted and printed."""
        document = self._draw.randrange(self._documents)
        try:
            if self._draw.random() < STORE_SHARE:
                self._store(document)
            else:
                self._fetch(document)
        except Exception:  # noqa: BLE001
            self._counts.add(self._number, "exceptions")
            traceback.print_exc()

    def _store(self, document: int) -> None:
        blocks = self._draw.randint(1, BLOCKS)
        keys = keys_of(document)[:blocks]
        stored = self._client.store(tokens_of(document)[: blocks * LAYOUT.block_tokens], kv_of(keys))
        self._counts.add(self._number, "stores")
        self._counts.add(self._number, "stored_blocks", stored.new)

    def _fetch(self, document: int) -> None:
        lossy, pauses = self._counts["lossy"], self._counts["pauses"]
        begun_s = time.monotonic()
        fetched = self._client.client.fetch(tokens_of(document), self._out, deadline_ms=DEADLINE_MS)
        took_ms = (time.monotonic() - begun_s) * 1000
        self._counts.add(self._number, "fetches")
        if pauses == self._counts["pauses"]:
            self._counts.at_least(self._number, "overrun_us_max", int((took_ms - DEADLINE_MS) * 1000))
        # A block may carry a lossy codec's error if the node was allowed one at any moment of the fetch.
        exactly = not lossy and not self._counts["lossy"]
        keys, t = keys_of(document), LAYOUT.block_tokens
        self._client.note_fetched([key.hex() for key in keys], fetched, self._client.scope(), lossy=not exactly)
        for block, key in enumerate(keys[: fetched.tokens // t]):
            self._counts.add(self._number, "checked_blocks")
            if not is_right(fetched.kv[..., block * t : (block + 1) * t, :], key, exactly=exactly):
                self._counts.add(self._number, "wrong_blocks")
                print(f"worker {self._number}: block {block} of document {document} is wrong (exactly={exactly})", flush=True)
