"""The link: a node's calls to the coordinator and to its peers.

`actors` implements it with Ray, `embedded` within one process, and `node.peers` with streams of its own in front of either.

Every method may raise `TieredKVError` (kind `transport`); the node treats that as a miss.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.messages import PeerStats
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report

HUNG_AFTER_S = 0.05
"""A node that has sent no answer for this long may hang."""

SPREAD_WITHIN_S = 5.0
"""The longest wait until all nodes have adopted a new weight epoch."""

Buffer = Any
"""Anything with the buffer protocol: bytes, memoryview, numpy array."""

FramePieces = Sequence[Buffer]
"""The buffers that make up a frame, in order."""


class BlockOffer(NamedTuple):
    """One block that a peer sends next, as `nbytes` of payload.

    `head`: the header of the block's extent in the peer's memory, with its seal, if the payload is the block's raw bytes. It is
    empty if the payload is a frame, which the codec with the id `codec` made of `raw_bytes`.
    """

    nbytes: int
    raw_bytes: int
    codec: int = 0
    head: bytes = b""


class PayloadTarget(NamedTuple):
    """Memory that waits for one block's payload. `update`: called with each piece of it that has arrived, in order."""

    memory: memoryview
    update: Callable[[memoryview], object] | None = None


class Landing(Protocol):
    """Reserved memory for the leading blocks of a batch: one target each. End it with `commit` or `abandon`."""

    targets: Sequence[PayloadTarget]

    def commit(self) -> int:
        """Verify the payloads, all of which have arrived, and make the blocks visible. Returns how many are.

        Raises (kind `transport`, with a reason) at a block that is not what was asked for; those before it are visible.
        """

    def abandon(self) -> None:
        """Free the memory of payloads that will not arrive. Does nothing after `commit`."""


class Receiver(Protocol):
    """Stores the blocks that a transfer delivers. Only blocks that are verified become visible."""

    def take(self, keys: Sequence[BlockKey], frames: Sequence[FramePieces]) -> int:
        """Store the frames of the leading `keys`. Returns how many were stored; it stops at a damaged frame."""

    def land(self, keys: Sequence[BlockKey], offers: Sequence[BlockOffer]) -> Landing:
        """Reserve memory for the leading offered blocks, at least one.

        Raises (kind `transport`, with a reason) if the first offer is not of the first key or may not be shown, or without room.
        """


class Transfer(Protocol):
    """A transfer of consecutive blocks from a peer, under way."""

    def prefetch(self) -> None:
        """Start to fetch what the peer has ready. Returns at once."""

    def deliver(self, receiver: Receiver, wait_s: float, patience_s: float, meanwhile: Callable[[], None]) -> int:
        """Hand the leading requested blocks to `receiver`. Returns how many it has stored; fewer if the peer had fewer.

        Waits at most `wait_s`, and at most `patience_s` for the next byte of a stream. `meanwhile` is called before each wait, and
        before blocks are stored. Raises with `hung=True` if the peer has sent nothing for HUNG_AFTER_S or longer.
        """


class Link(Protocol):
    """One node's access to its cluster. No method blocks for longer than its docstring says, even if other processes hang."""

    def report(self, report: Report) -> Answer:
        """Send a report to the coordinator. Returns its answer; waits a few seconds at most."""

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        """Ask the coordinator which nodes hold the leading keys. Returns their names for each key; waits at most `wait_s`."""

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        """Ask the coordinator for the variants of a root, one of which agrees with `probe`. `known`: the variants this node knows."""

    def raise_epoch(self, families: list[bytes], keep: bool) -> tuple[list[Epoch], list[str]]:
        """Have the coordinator raise the weight epochs of families. Waits some seconds.

        Returns them, and all nodes that are alive or lost.
        """

    def spread(self, nodes: Sequence[str], epochs: Sequence[Epoch], within_s: float) -> list[str]:
        """Tell other nodes about epochs. Returns those that have not confirmed within `within_s` that they have adopted them."""

    def request(self, node: str, keys: list[BlockKey]) -> Transfer:
        """Start to fetch blocks from another node. Returns at once."""

    def streams_from(self, node: str) -> bool:
        """Whether a transfer from this node delivers blocks while later ones arrive, so that one request may name all of them."""

    def stats(self) -> PeerStats:
        """Returns figures of the transfers with each peer."""


class Ask(Protocol):
    """A function that calls one method of several nodes at once."""

    def __call__(self, nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
        """Returns by node the answer, or the `TieredKVError` that the call raised."""
