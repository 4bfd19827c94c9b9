"""The link: a node's calls to the coordinator and to its peers.

`actors` implements it with Ray, `embedded` within one process, and `node.peers` with streams of its own in front of either.

Every method may raise `TieredKVError` (kind `transport`); the node treats that as a miss.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.explanation import GoneRecord
from tiered_kv.protocol.messages import PeerStats
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report

HUNG_AFTER_S = 0.05
"""A node that has sent nothing for this long is treated as one that may hang."""

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
    """Memory into which one block's payload is received. `update`: called with each piece of the payload after it has arrived."""

    memory: memoryview
    update: Callable[[memoryview], object] | None = None


class Landing(Protocol):
    """Reserved memory for the leading blocks of a batch: one target for each block. End it with `commit` or `abandon`."""

    targets: Sequence[PayloadTarget]

    def commit(self) -> int:
        """Verify the payloads, all of which must have arrived, and make the blocks visible. Returns how many are visible.

        Raises (kind `transport`, with a reason) if a block does not match its offer. The blocks before it are then visible.
        """

    def abandon(self) -> None:
        """Free the memory of payloads that will not arrive. Does nothing after `commit`."""


class Receiver(Protocol):
    """Stores the blocks that a transfer delivers. Only verified blocks become visible."""

    def take(self, keys: Sequence[BlockKey], frames: Sequence[FramePieces]) -> int:
        """Store the frames of the leading `keys`, up to the first damaged frame. Returns how many were stored."""

    def expect(self, keys: Sequence[BlockKey]) -> None:
        """Reserve memory for some leading blocks of `keys` while the peer prepares them. `land` uses it if they are raw.

        First frees what is left of the memory that an earlier call has reserved. With no keys, does nothing else.
        """

    def land(self, keys: Sequence[BlockKey], offers: Sequence[BlockOffer]) -> Landing:
        """Reserve memory for the leading offered blocks, at least one.

        Raises (kind `transport`, with a reason) if the first offer does not fit the first key or is too lossy, or if there is no room.
        """


class Transfer(Protocol):
    """A running transfer of consecutive blocks from a peer."""

    def prefetch(self) -> None:
        """Start to fetch the bytes that the peer has ready. Returns at once."""

    def deliver(self, receiver: Receiver, wait_s: float, patience_s: float, meanwhile: Callable[[], None]) -> int:
        """Pass the leading requested blocks to `receiver`. Returns how many it has stored: fewer than requested if the peer lacks some.

        Waits at most `wait_s`, and at most `patience_s` for the next byte of a stream. `meanwhile` is called before each wait, and
        before blocks are stored. Raises with `hung=True` if the peer has sent nothing for HUNG_AFTER_S or longer.
        """


class Holders(NamedTuple):
    """The directory's answer about blocks that a node lacks. `peers`: all other live nodes.

    `live`: by block, the other live nodes that have it. `silent`: by block, the nodes that had it when they last reported, and that
    do not answer now. Blocks that nobody has are left out.
    """

    peers: list[str]
    live: dict[BlockKey, list[str]]
    silent: dict[BlockKey, list[str]]

    def of(self, key: BlockKey) -> tuple[Sequence[str], Sequence[str]]:
        """Returns the live nodes that have a block, and the silent ones."""
        return self.live.get(key, ()), self.silent.get(key, ())

    def without(self, nodes: frozenset[str]) -> "Holders":
        """Returns these holders with `nodes` as silent ones."""
        if not nodes:
            return self
        live = {key: [name for name in names if name not in nodes] for key, names in self.live.items()}
        silent = {key: [*self.silent.get(key, ()), *nodes.intersection(names)] for key, names in self.live.items()}
        return Holders(self.peers, live, self.silent | silent)


class Link(Protocol):
    """One node's access to its cluster. No method blocks for longer than its docstring says, even if other processes hang."""

    def report(self, report: Report) -> Answer:
        """Send a report to the coordinator. Returns its answer; waits a few seconds at most."""

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        """Ask the coordinator which nodes hold the leading keys. Returns their names for each key; waits at most `wait_s`."""

    def holders(self, keys: list[BlockKey], wait_s: float) -> Holders:
        """Ask the coordinator which nodes have or had each of the blocks. Not for the path of a fetch. Waits at most `wait_s`."""

    def recall(self, nodes: Sequence[str], keys: list[BlockKey], wait_s: float) -> dict[str, dict[BlockKey, GoneRecord]]:
        """Ask other nodes why they no longer have these blocks. Returns the answers by node, of those that answer within `wait_s`."""

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        """Have the coordinator match `probe` against the variants of a root, and add a variant if none agrees. Returns all variants.

        `known`: the variants that this node knows.
        """

    def raise_epoch(self, families: list[bytes], keep: bool) -> tuple[list[Epoch], list[str]]:
        """Have the coordinator raise the weight epochs of families. Waits some seconds at most.

        Returns the new epochs, and the names of all live and lost nodes.
        """

    def spread(self, nodes: Sequence[str], epochs: Sequence[Epoch], within_s: float) -> list[str]:
        """Have other nodes adopt epochs. Returns the names of the nodes that did not confirm this within `within_s`."""

    def request(self, node: str, keys: list[BlockKey]) -> Transfer:
        """Start to fetch blocks from another node. Returns at once."""

    def streams_from(self, node: str) -> bool:
        """Returns whether transfers from this node deliver blocks while later ones arrive. If so, one request may name all blocks."""

    def stats(self) -> PeerStats:
        """Returns figures of the transfers with each peer."""


class Ask(Protocol):
    """A function that calls one method of several nodes at once."""

    def __call__(self, nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
        """Returns by node the answer, or the `TieredKVError` that the call raised."""
