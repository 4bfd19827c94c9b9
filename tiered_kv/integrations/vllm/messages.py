"""The messages between the scheduler's side and the workers' side of the connector. vLLM transports them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from tiered_kv.client.page_client import Chain, Estimates
from tiered_kv.keys import KEY_BYTES, BlockKey


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """A worker's namespace and layout, as plain data. The scheduler's side computes from them the keys of the worker's blocks.

    `ranks`: the number of workers. Workers with identical KV send equal namespaces.
    """

    ranks: int
    namespace: dict[str, Any]
    layout: dict[str, Any]


@dataclass(frozen=True)
class RequestBlocks:
    """Consecutive blocks of a request. `hashes`: vLLM's hash of each block. `blocks`: their numbers in vLLM's KV cache.

    `before`: the hash of the first block's parent, if any. `depth`: the number of the first block's ancestors. `scope`: a digest of
    what must be equal besides the namespace (epoch and adapter). `weight_epoch`: the cluster's weight epoch when the blocks were
    planned. If the worker's client has another weight epoch by now, the blocks are not loaded and not stored.
    """

    request: str
    scope: bytes
    hashes: list[bytes]
    before: bytes | None
    depth: int
    blocks: list[int]
    weight_epoch: int = 0

    def chain(self, root: BlockKey) -> Chain:
        """Returns these blocks as a chain of keys, for the rank with this root."""
        parent = None if self.before is None else keys_of(root, self.scope, [self.before])[0]
        return Chain(keys_of(root, self.scope, self.hashes), parent, self.depth, root)


def keys_of(root: BlockKey, scope: bytes, hashes: Sequence[bytes]) -> list[BlockKey]:
    """Returns the key of each block, from vLLM's hash of it. Cost: about 1 µs per block.

    A vLLM hash covers the block and its ancestors: tokens, adapter names, images, salts and embeddings.
    """
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
    last step with a failed load that the scheduler knows of. `resets`: how often the cache was reset. Loads that were planned before
    a reset are not valid. `prefill_tokens`: the number of prompt tokens that the step computes.
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
    """A worker's report to the scheduler after a step.

    `failed_step`: the number of the last step whose forward pass lacked a block, because a load had failed (0: no step). `stored`:
    vLLM's hashes of the newly stored blocks. `estimates`: how fast the worker computes and loads; None if that has not changed.
    """

    failed_step: int = 0
    stored: list[bytes] = field(default_factory=list)
    estimates: Estimates | None = None

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "WorkerReport":
        """Returns the reports of two workers as one. A block counts as stored if any rank has stored it. One rank's estimates suffice."""
        assert isinstance(other, WorkerReport)
        stored = list(dict.fromkeys([*self.stored, *other.stored]))
        return WorkerReport(max(self.failed_step, other.failed_step), stored, self.estimates or other.estimates)
