"""A node's link with streams: its listener, its connections to peers and to the coordinator's directory, in front of another link.

Where no stream can be opened, the other link does the same work: with Ray, or with direct calls within one process.
"""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tiered_kv.keys import BlockKey
from tiered_kv.node.peers.block_server import BlockServer
from tiered_kv.node.peers.figures import PeerFigures
from tiered_kv.node.peers.lookups import Lookups
from tiered_kv.node.peers.streams import Streams
from tiered_kv.node.peers.transfer import StreamTransfer
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.explanation import GoneRecord
from tiered_kv.protocol.messages import PeerStats
from tiered_kv.protocol.peer_channel import PeerIdentity
from tiered_kv.protocol.peer_listener import PeerListener
from tiered_kv.protocol.peer_transport import Holders, Link, Transfer
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

NO_STREAM_S = 10.0
"""After a peer could not be reached by a stream, it is reached by the other link for this long, or until its address changes."""


class StreamLink:
    """Implements `Link`. `other`: the link that is used where there are no streams. `listener`: a listening socket.

    Peers can reach this node at `address` once `serve` was called. The addresses of the peers and of the directory are in the
    coordinator's answers to reports.
    """

    def __init__(self, other: Link, own: PeerIdentity, listener: socket.socket, now_s: Callable[[], float] = time.monotonic) -> None:
        self._other = other
        self._now_s = now_s
        self._figures = PeerFigures()
        self._listener = PeerListener(listener, own)
        self._streams = Streams(own)
        self._lookups = Lookups(self._streams, self._figures)
        self._addresses: dict[str, str] = {}
        self._unreachable: dict[str, tuple[str, float]] = {}  # by node: its address, and until when no stream is tried
        self._lock = threading.Lock()

    @property
    def address(self) -> str:
        """The address at which peers reach this node."""
        return self._listener.address

    def serve(self, node: "Node") -> None:
        """Serve the node's blocks to its peers from now on."""
        self._listener.start(BlockServer(node, self._figures).serve)

    def report(self, report: Report) -> Answer:
        answer = self._other.report(report)
        with self._lock:
            if answer.addresses is not None:
                self._addresses = dict(answer.addresses)
        self._lookups.use(answer.directory)
        return answer

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        begun_s = time.monotonic()
        located = self._lookups.locate(keys, wait_s)
        if located is None:
            return self._other.locate(keys, max(begun_s + wait_s - time.monotonic(), 0.0))
        holders, addresses = located
        with self._lock:
            self._addresses |= addresses
        return holders

    def holders(self, keys: list[BlockKey], wait_s: float) -> Holders:
        return self._other.holders(keys, wait_s)

    def recall(self, nodes: Sequence[str], keys: list[BlockKey], wait_s: float) -> dict[str, dict[BlockKey, GoneRecord]]:
        return self._other.recall(nodes, keys, wait_s)

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        return self._other.probe(root, known, probe)

    def raise_epoch(self, families: list[bytes], keep: bool) -> tuple[list[Epoch], list[str]]:
        return self._other.raise_epoch(families, keep)

    def spread(self, nodes: Sequence[str], epochs: Sequence[Epoch], within_s: float) -> list[str]:
        return self._other.spread(nodes, epochs, within_s)

    def request(self, node: str, keys: list[BlockKey]) -> Transfer:
        address = self._stream_address(node)
        if address is None:
            return self._other.request(node, keys)
        return StreamTransfer(self._streams, self._figures, node, address, keys, lambda: self._give_up(node, address))

    def streams_from(self, node: str) -> bool:
        return self._stream_address(node) is not None

    def stats(self) -> PeerStats:
        return self._figures.stats(self.address, self._listener.refusals)

    def _stream_address(self, node: str) -> str | None:
        with self._lock:
            address = self._addresses.get(node)
            failed_at, until_s = self._unreachable.get(node, ("", 0.0))
            return None if address is None or (failed_at == address and self._now_s() < until_s) else address

    def _give_up(self, node: str, address: str) -> None:
        with self._lock:
            self._unreachable[node] = address, self._now_s() + NO_STREAM_S

    def close(self) -> None:
        """End all streams. Transfers under way fail at once."""
        self._streams.close()
        self._listener.close()
