"""How a node reaches the rest of the cluster: the link. Ray implements it in `actors`, tests and one process in `inprocess`.

Every method may raise `TieredKVError` (kind `transport`); the node takes that for a miss.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report

HUNG_AFTER_S = 0.05
"""A node that has not answered at all for so long may hang."""

Buffer = Any
"""Anything with the buffer protocol: bytes, memoryview, numpy array."""

FramePieces = Sequence[Buffer]
"""A frame as the buffers it consists of, one after the other."""


class Transfer(Protocol):
    """Blocks under way from a peer."""

    def prefetch(self) -> None:
        """Have what is ready at the peer come here meanwhile; returns at once."""

    def frames(self, wait_s: float) -> list[FramePieces]:
        """The frames of the leading keys that were asked for; fewer where the peer had fewer. Waits at most `wait_s`.

        Raises with `hung=True` where the peer has not answered at all, for HUNG_AFTER_S or longer.
        """


class Link(Protocol):
    """The cluster as one node sees it. No method blocks for longer than it says, whatever hangs elsewhere."""

    def report(self, report: Report) -> Answer:
        """Tell the coordinator; waits a few seconds at most for its answer."""

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        """Ask the coordinator which nodes hold the leading keys; waits at most `wait_s` for its answer."""

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        """Ask the coordinator for the variants of a root, of which one agrees with `probe`; `known`: those known here."""

    def request(self, node: str, keys: list[BlockKey]) -> Transfer:
        """Begin to fetch blocks from another node; returns at once."""


class Ask(Protocol):
    """Calls a method of several nodes at once."""

    def __call__(self, nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
        """By node: the answer, or the `TieredKVError` that came in its place."""
