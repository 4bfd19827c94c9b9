"""Computes the samples (values with labels) of the coordinator's metrics."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tiered_kv.metrics.endpoint import MetricsEndpoint
from tiered_kv.metrics.exporter import TableCollector, exposition
from tiered_kv.metrics.http_server import Page, discovery, healthz
from tiered_kv.metrics.table import MetricSample, Scope

if TYPE_CHECKING:
    from tiered_kv.coordinator.coordinator import Coordinator
    from tiered_kv.protocol.fleet import FleetStatus

STATES = ("starting", "serving", "lost", "refused", "draining", "drained")


def coordinator_pages(
    coordinator: "Coordinator", fleet: "Callable[[], FleetStatus]", own: MetricsEndpoint, cluster: str
) -> dict[str, Page]:
    """Returns the pages of the coordinator's server, by path. `/sd` lists all live nodes and the coordinator itself."""

    def targets() -> Iterator[tuple[str, dict[str, str]]]:
        yield from ((node["metrics_address"], {"cluster": cluster}) for node in coordinator.nodes() if node.get("metrics_address"))
        if own.address is not None:
            yield own.address, {"cluster": cluster}

    collector = TableCollector(Scope.COORDINATOR, CoordinatorSamples(coordinator, fleet))
    return {"/metrics": exposition(collector), "/sd": discovery(targets), "/healthz": healthz}


class CoordinatorSamples:
    """Reads the coordinator's figures and returns their samples. `fleet`: returns the keeper's view; None without a keeper."""

    def __init__(self, coordinator: "Coordinator", fleet: "Callable[[], FleetStatus] | None" = None) -> None:
        self._coordinator = coordinator
        self._fleet = fleet

    def __call__(self) -> Iterator[MetricSample]:
        """Yields all samples."""
        nodes, lost = self._coordinator.nodes(), self._coordinator.lost()
        yield MetricSample("nodes", len(nodes), ("live",))
        yield MetricSample("nodes", len(lost), ("lost",))
        for node in nodes:
            yield MetricSample("node_silent_seconds", node["silent_s"], (node["node"],))
            yield MetricSample("directory_blocks", node["directory_blocks"], (node["node"],))
        entries, nbytes = self._coordinator.directory_size()
        yield MetricSample("directory_entries", entries)
        yield MetricSample("directory_bytes", nbytes)
        if self._fleet is not None:
            yield from _fleet_samples(self._fleet())


def _fleet_samples(fleet: "FleetStatus") -> Iterator[MetricSample]:
    states = Counter(member["state"] for member in fleet["members"])
    yield from (MetricSample("members", states[state], (state,)) for state in (*STATES, *(states.keys() - set(STATES))))
    yield MetricSample("coordinator_restarts_total", fleet["restarts"])
    yield MetricSample("coordinator_uptime_seconds", fleet["uptime_s"])
    yield MetricSample("keeper_round_age_seconds", fleet["round_age_s"])
