"""The figures that only a node's metrics have: the counts of its clients, and the durations of transfers and of copies between tiers."""

from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.memory.histogram import Histogram, HistogramCounts
from tiered_kv.node.monitoring.client_counts import ClientCounts, ClientSums, Names
from tiered_kv.store import events as ev

if TYPE_CHECKING:
    from tiered_kv.node.node import Node


class Durations(NamedTuple):
    """Histograms of the durations of transfers from other nodes, and of batches that moved to a lower or a faster tier."""

    transfer: HistogramCounts
    demotion: HistogramCounts
    promotion: HistogramCounts


class Meters:
    """Counts and durations of one node. Thread-safe."""

    def __init__(self, node: "Node") -> None:
        self.clients = ClientCounts(node.directory, node.clock.now_s)
        self.transfer = Histogram()
        self._demotion = Histogram()
        self._promotion = Histogram()
        node.engine.on_batch = self._note_batch

    def _note_batch(self, copy: ev.Copy, seconds: float) -> None:
        if copy.target != copy.source.tier:
            (self._demotion if copy.target > copy.source.tier else self._promotion).add(seconds)

    def read_clients(self) -> dict[Names, ClientSums]:
        """Returns the counts of all clients, by namespace and tenant."""
        return self.clients.read()

    def durations(self) -> Durations:
        """Returns the durations so far."""
        return Durations(self.transfer.read(), self._demotion.read(), self._promotion.read())
