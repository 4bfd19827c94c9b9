"""The link: a node's calls to the coordinator and to its peers. `actors` implements it with Ray, `embedded` within one process.

Every method may raise `TieredKVError` (kind `transport`); the node treats that as a miss.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.epochs import Epoch
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


class Transfer(Protocol):
    """A transfer of blocks from a peer, under way."""

    def prefetch(self) -> None:
        """Start to fetch what the peer has ready. Returns at once."""

    def frames(self, wait_s: float) -> list[FramePieces]:
        """Returns the frames of the leading requested keys; fewer if the peer had fewer. Waits at most `wait_s`.

        Raises with `hung=True` if the peer has sent no answer for HUNG_AFTER_S or longer.
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


class Ask(Protocol):
    """A function that calls one method of several nodes at once."""

    def __call__(self, nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
        """Returns by node the answer, or the `TieredKVError` that the call raised."""
