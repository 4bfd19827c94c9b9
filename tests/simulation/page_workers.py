"""Workers of a simulation that are engines with pages of their own, as vLLM's: they load and store opaque blocks under their own keys."""

from functools import lru_cache
from hashlib import blake2b

import torch

from tests.history.history import FETCH, STORE, digest_of
from tests.simulation.content import BLOCK_BYTES, T, bytes_of, namespace
from tests.simulation.plan import BLOCKS, Step
from tests.simulation.scheduler import SimulationError
from tests.simulation.workers import GRACE_S, OTHER_S_MAX, STORE_GRACE_S, Worker
from tiered_kv.client.connect import page_client_of
from tiered_kv.client.page_client import Chain, PageClient
from tiered_kv.client.page_copy import pages_of
from tiered_kv.keys import BlockKey
from tiered_kv.layout import OpaqueLayout
from tiered_kv.protocol.node_record import read_record

LAYERS = 2
PAGE_BYTES = BLOCK_BYTES // LAYERS
LAYOUT = OpaqueLayout(BLOCK_BYTES, T, "pages of a simulation", 4)


@lru_cache(maxsize=64)
def chain_of(document: int, epoch: int) -> list[BlockKey]:
    """Returns the keys of a document's blocks as an engine computes them, from the hash root of its namespace."""
    root = namespace(epoch).root(LAYOUT)
    return [blake2b(root + bytes([document, block]), digest_size=32).digest() for block in range(BLOCKS)]


class PageWorker(Worker):
    """A worker with a `PageClient`. Each of its operations uses separate pages."""

    def attached(self) -> PageClient | None:
        """Returns a client. If there is no node yet, the client finds one later."""

        def find() -> object:
            record = read_record(self.cluster.directory(self.node))
            return record.info if record is not None else None

        return page_client_of(find, LAYOUT, namespace(0))

    def do(self, step: Step, epoch: int) -> None:
        """Carry out one operation. The calls of a page client take no namespace, so that all of an engine's blocks are of one epoch."""
        if step.what != "new_epoch":
            super().do(step, 0)

    def _fetch(self, client: PageClient, epoch: int, document: int, blocks: int, ms: int) -> tuple[str, float]:
        keys, arrays = chain_of(document, epoch)[:blocks], _arrays()
        loaded = client.load(Chain(keys), pages_of(arrays), list(range(blocks)), deadline_s=ms / 1000)
        got = [b"".join(array[block].numpy().tobytes() for array in arrays) for block in range(loaded.blocks)]
        self.record(FETCH, epoch, dict(zip([key.hex() for key in keys], map(digest_of, got), strict=False)))
        self.take_hits(document, keys, got, loaded.blocks_by_tier)
        return f"{len(got)} of {blocks} blocks {loaded.blocks_by_tier} to pages", ms / 1000 + GRACE_S

    def _store(self, client: PageClient, epoch: int, document: int, blocks: int) -> tuple[str, float]:
        keys, arrays = chain_of(document, epoch)[:blocks], _arrays()
        for block, key in enumerate(keys):
            for layer, array in enumerate(arrays):
                part = bytes_of(key)[layer * PAGE_BYTES : (layer + 1) * PAGE_BYTES]
                array[block] = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        self.record(STORE, epoch, {key.hex(): digest_of(bytes_of(key)) for key in keys})
        stored = client.store(Chain(keys), pages_of(arrays), list(range(blocks)))
        if stored.new + stored.present + stored.refused != blocks:
            raise SimulationError("wrong counts of a store", f"{self.name}: {blocks} blocks were stored, got {stored}")
        return f"new {stored.new}, present {stored.present}, refused {stored.refused} from pages", 0.2 + STORE_GRACE_S

    def _match(self, client: PageClient, epoch: int, document: int) -> tuple[str, float]:
        keys = chain_of(document, epoch)
        return f"{len(client.look(keys).tiers)} blocks here, {client.locate(keys)} elsewhere", OTHER_S_MAX

    def _hint(self, client: PageClient, epoch: int, document: int, pinned_s: float) -> tuple[str, float]:
        client.hold(chain_of(document, epoch)[-1], pinned_s)
        return "done", OTHER_S_MAX


def _arrays() -> list[torch.Tensor]:
    return [torch.zeros(BLOCKS, PAGE_BYTES, dtype=torch.uint8) for _ in range(LAYERS)]
