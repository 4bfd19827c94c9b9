"""The samples of the coordinator's metrics."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tiered_kv.metrics.table import Sample

if TYPE_CHECKING:
    from tiered_kv.coordinator.coordinator import Coordinator
    from tiered_kv.protocol.fleet import FleetStatus

STATES = ("starting", "serving", "lost", "refused", "draining", "drained")


class CoordinatorSamples:
    """Reads the coordinator's figures and returns their samples. `fleet`: returns the keeper's view; None without a keeper."""

    def __init__(self, coordinator: "Coordinator", fleet: "Callable[[], FleetStatus] | None" = None) -> None:
        self._coordinator = coordinator
        self._fleet = fleet

    def __call__(self) -> Iterator[Sample]:
        """Yields all samples."""
        nodes, lost = self._coordinator.nodes(), self._coordinator.lost()
        yield Sample("nodes", len(nodes), ("live",))
        yield Sample("nodes", len(lost), ("lost",))
        for node in nodes:
            yield Sample("node_silent_seconds", node["silent_s"], (node["node"],))
            yield Sample("directory_blocks", node["directory_blocks"], (node["node"],))
        entries, nbytes = self._coordinator.directory_size()
        yield Sample("directory_entries", entries)
        yield Sample("directory_bytes", nbytes)
        if self._fleet is not None:
            yield from _fleet_samples(self._fleet())


def _fleet_samples(fleet: "FleetStatus") -> Iterator[Sample]:
    states = Counter(member["state"] for member in fleet["members"])
    yield from (Sample("members", states[state], (state,)) for state in (*STATES, *(states.keys() - set(STATES))))
    yield Sample("coordinator_restarts_total", fleet["restarts"])
    yield Sample("coordinator_uptime_seconds", fleet["uptime_s"])
    yield Sample("keeper_round_age_seconds", fleet["round_age_s"])
