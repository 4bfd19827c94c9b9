"""The workers of a simulation: each carries out its operations and checks every answer."""

from typing import Any

import torch

from tests.history.history import FETCH, STORE, Operation, digest_of
from tests.simulation.cluster import Cluster
from tests.simulation.content import LAYOUT, T, bytes_in, bytes_of, keys_of, kv_of, namespace, tokens_of
from tests.simulation.plan import BLOCKS, Step
from tests.simulation.scheduler import SimulationError
from tiered_kv.blocks import Hint
from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of
from tiered_kv.errors import TieredKVError
from tiered_kv.protocol.node_record import read_record

GRACE_S = 0.05
"""A fetch may end this long after its deadline (issue: the longest fetch while anything is killed, stopped or cut)."""
STORE_GRACE_S = 0.35
"""The same for a store: a commit after the deadline gets `COMMIT_GRACE_S`."""
OTHER_S_MAX = 1.1
"""For calls that deliver no block: `QUESTION_S_MAX` and the grace."""
ATTACH_AGAIN_S = 0.2
CHECK_SHARE = 0.12


class Worker:
    """One worker: a process with one client, used by one or two threads."""

    def __init__(self, cluster: Cluster, number: int, steps: list[Step]) -> None:
        self.cluster = cluster
        self.world = cluster.world
        self.name = f"w{number}"
        self.node = cluster.plan.node_of(number)
        self._working = 0
        self._threads = cluster.plan.threads
        self._client: Any = None
        self.hit_blocks = 0
        """Blocks that the last fetch returned."""
        process = cluster.process(self.name)
        process.on_crash.append(self._crashed)
        for thread in range(self._threads):
            self._work(steps[thread :: self._threads])

    @property
    def is_done(self) -> bool:
        """Whether all operations have been carried out, or the worker has crashed."""
        return not self._working

    def _work(self, steps: list[Step]) -> None:
        self._working += 1
        self.world.spawn(self.cluster.processes[self.name], "main", lambda: self._run(steps))

    def _crashed(self) -> None:
        self._working = 0

    def _run(self, steps: list[Step]) -> None:
        epoch = 0
        for step in steps:
            if step.at_s:
                self.world.sleep(step.at_s)
            if step.what == "new_epoch":
                epoch = step.arguments["epoch"]
            if step.what != "reopen" or self._threads == 1:
                self.do(step, epoch)
        self._working -= 1

    @property
    def is_alive(self) -> bool:
        """Whether the process has not crashed."""
        return self.cluster.processes[self.name].is_alive

    def again(self, steps: list[Step]) -> None:
        """Carry out more operations."""
        self._work(steps)

    def client(self) -> Any:
        """Returns the client. Attaches first if there is none."""
        while self._client is None:
            try:
                made = self.attached()
            except TieredKVError:  # the node ended meanwhile
                made = None
            if self._client is None:
                self._client = made
            elif made is not None:  # another thread was faster
                made.close()
            if self._client is None:
                self.world.sleep(ATTACH_AGAIN_S)
        return self._client

    def attached(self) -> Any:
        """Returns a client of the machine's node, None if there is no node."""
        record = read_record(self.cluster.directory(self.node))
        return client_of(record.info, LAYOUT, namespace(0)) if record is not None else None

    def do(self, step: Step, epoch: int) -> None:
        """Carry out one operation with the weight epoch `epoch`, and check the nodes afterwards."""
        client = self.client()
        process = self.cluster.processes[self.name]
        begun_s, interrupted_s = self.world.now_s, process.interrupted_s
        try:
            outcome, allowed_s = getattr(self, f"_{step.what}")(client, **{"epoch": epoch, **step.arguments})
        except TieredKVError as error:
            raise SimulationError(f"{step.what} raised {error.kind}", f"{self.name}: {step.what} raised {error.kind}: {error}") from error
        took_s = self.world.now_s - begun_s
        self.world.note(f"{self.name} {step.what} {_text(step.arguments)} -> {outcome} in {took_s * 1000:.1f} ms")
        if took_s > allowed_s + process.interrupted_s - interrupted_s:
            message = f"{self.name}: {step} took {took_s:.3f} s, allowed were {allowed_s:.3f} s"
            raise SimulationError(f"{step.what} too late", message)
        if self.world.random.random() < CHECK_SHARE:
            self.cluster.check()

    def take_hits(self, document: int, keys: list[bytes], got: list[bytes], by_tier: dict[str, int]) -> None:
        """Count the blocks that a fetch has returned. Raises unless each has the bytes of its key."""
        for number, (key, data) in enumerate(zip(keys, got, strict=False)):
            if data != bytes_of(key):
                message = f"{self.name} fetched wrong bytes for block {number} of document {document}: {key.hex()[:12]}"
                raise SimulationError("wrong bytes", f"{message}, from {by_tier}")
        self.hit_blocks = len(got)

    def _fetch(self, client: Client, epoch: int, document: int, blocks: int, ms: int) -> tuple[str, float]:
        keys = keys_of(document, epoch)[:blocks]
        fetched = client.fetch(tokens_of(document)[: blocks * T], deadline_ms=ms, namespace=namespace(epoch))
        got = [bytes_in(fetched.kv, block) for block in range(fetched.tokens // T)]
        self.record(FETCH, epoch, dict(zip([key.hex() for key in keys], map(digest_of, got), strict=False)))
        self.take_hits(document, keys, got, fetched.tokens_by_tier)
        return f"{len(got)} of {blocks} blocks {fetched.tokens_by_tier}", ms / 1000 + GRACE_S

    def _store(self, client: Client, epoch: int, document: int, blocks: int) -> tuple[str, float]:
        keys = keys_of(document, epoch)[:blocks]
        self.record(STORE, epoch, {key.hex(): digest_of(bytes_of(key)) for key in keys})
        stored = client.store(tokens_of(document)[: blocks * T], kv_of(keys), namespace=namespace(epoch))
        if stored.new + stored.present + stored.refused != blocks:
            raise SimulationError("wrong counts of a store", f"{self.name}: {blocks} blocks were stored, got {stored}")
        return f"new {stored.new}, present {stored.present}, refused {stored.refused}", 0.2 + STORE_GRACE_S

    def _match(self, client: Client, epoch: int, document: int) -> tuple[str, float]:
        return f"{client.match(tokens_of(document)).tokens // T} blocks", OTHER_S_MAX

    def _hint(self, client: Client, epoch: int, document: int, pinned_s: float) -> tuple[str, float]:
        empty = torch.empty(LAYOUT.kv_shape(0), dtype=LAYOUT.torch_dtype)
        client.store(tokens_of(document), empty, start=BLOCKS * T, hint=Hint(pinned_s=pinned_s), namespace=namespace(epoch))
        return "done", 0.2 + STORE_GRACE_S

    def _reopen(self, client: Client, epoch: int) -> tuple[str, float]:
        client.close()
        self._client = None
        return "done", OTHER_S_MAX

    def _new_epoch(self, client: Client, epoch: int) -> tuple[str, float]:
        client.new_epoch(epoch)
        return "done", OTHER_S_MAX

    def _stats(self, client: Client, epoch: int) -> tuple[str, float]:
        return "answered" if client.stats()["node"] is not None else "no answer", OTHER_S_MAX

    def record(self, kind: str, epoch: int, blocks: dict[str, str]) -> None:
        """Record in the history a store that begins now, or a fetch that has just ended."""
        self.cluster.history.append(Operation(self.name, kind, self.world.now_s, f"epoch {epoch}", blocks))


def _text(arguments: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in arguments.items())
