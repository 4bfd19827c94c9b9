"""What the scheduler's side and the workers' side of the connector say to each other, through vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from tiered_kv.client.page_client import Chain
from tiered_kv.keys import KEY_BYTES, BlockKey


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A worker's namespace and layout, as plain data. From them the scheduler's side computes the keys of each rank.

    `ranks`: the number of workers. Those with identical KV have one namespace.
    """

    ranks: int
    namespace: dict[str, Any]
    layout: dict[str, Any]


@dataclass(frozen=True)
class RequestBlocks:
    """Consecutive blocks of a request: vLLM's `hashes`, the hash `before` them, and their numbers in vLLM's KV cache.

    `scope`: what must be equal besides the namespace: epoch and adapter. `depth`: the number of blocks before them. `weight_epoch`: the
    cluster's, for which they were planned. Once the workers' client has another one, they are neither loaded nor stored.
    """

    request: str
    scope: bytes
    hashes: list[bytes]
    before: bytes | None
    depth: int
    blocks: list[int]
    weight_epoch: int = 0

    def chain(self, root: BlockKey) -> Chain:
        """Returns the chain of the keys of these blocks under a rank's root."""
        parent = None if self.before is None else keys_of(root, self.scope, [self.before])[0]
        return Chain(keys_of(root, self.scope, self.hashes), parent, self.depth, root)


def keys_of(root: BlockKey, scope: bytes, hashes: Sequence[bytes]) -> list[BlockKey]:
    """Returns the key of each block. About 1 µs a block. vLLM's hashes chain tokens, adapters' names, images, salts and embeddings."""
    start = blake2b(root + scope, digest_size=KEY_BYTES)
    keys = []
    for each in hashes:
        hasher = start.copy()
        hasher.update(each)
        keys.append(hasher.digest())
    return keys


@dataclass
class Step(KVConnectorMetadata):
    """The work of one step of the engine.

    `now`: loads that the step's forward pass needs. `later`: loads during which their requests wait. `acknowledged`: the number of the
    last step with a failed load that the scheduler knows of. `resets`: how often the cache was reset; loads from before are not valid.
    `prefill_tokens`: the tokens of prompts that the step computes.
    """

    number: int = 0
    now: list[RequestBlocks] = field(default_factory=list)
    later: list[RequestBlocks] = field(default_factory=list)
    stores: list[RequestBlocks] = field(default_factory=list)
    acknowledged: int = 0
    resets: int = 0
    prefill_tokens: int = 0


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """What the workers tell the scheduler after a step: the last step with a failed load of its own, and the hashes newly stored."""

    failed_step: int = 0
    stored: list[bytes] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        """Returns the report of two workers together. A block counts as stored if any rank has stored it."""
        assert isinstance(other, WorkerReport)
        return WorkerReport(max(self.failed_step, other.failed_step), list(dict.fromkeys([*self.stored, *other.stored])))
