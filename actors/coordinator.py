"""The coordinator as a Ray actor: named, detached, and restarted by Ray. After a restart the nodes' reports restore its state."""

import logging
import sys
import threading
import time
from dataclasses import asdict
from typing import NotRequired, TypedDict

import ray

from tiered_kv.actors.fleet import RayPlatform, RayRecordStore
from tiered_kv.actors.names import SWITCH_INTERVAL_S
from tiered_kv.clock import SystemClock
from tiered_kv.config import Config
from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.coordinator.keeper import Keeper
from tiered_kv.coordinator.lookup_server import LookupServer
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.metrics.coordinator_samples import coordinator_pages
from tiered_kv.metrics.endpoint import MetricsEndpoint
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.fleet import FleetRecord, FleetStatus
from tiered_kv.protocol.messages import LiveNode
from tiered_kv.protocol.peer_address import PeerPlace
from tiered_kv.protocol.peer_channel import PeerIdentity
from tiered_kv.protocol.peer_transport import Holders
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report

log = logging.getLogger(__name__)


class ClusterDescription(TypedDict):
    """A cluster's id, settings, live nodes, lost nodes and fleet. `lost`: by lost node, the seconds since its last report."""

    cluster_id: str
    config: Config
    nodes: list[LiveNode]
    lost: dict[str, float]
    fleet: FleetStatus
    metrics_address: NotRequired[str | None]
    """The address of `/metrics` and `/sd` of the coordinator; None if there is none, then `metrics_problem` may say why."""
    metrics_problem: NotRequired[str]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=4, enable_task_events=False)
class CoordinatorActor:
    """Forwards calls to a `Coordinator`, and runs the `Keeper`, which starts and removes cache nodes.

    The arguments are the fields of a new fleet's record (`FleetRecord`). After a restart the record saved in Ray is used instead.
    """

    def __init__(
        self, cluster: str, cluster_id: str, config: Config, mounted_bytes: int = 0, selector: str | None = None, secret: str = ""
    ) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._cluster_id = cluster_id
        self._config = config
        self._coordinator = Coordinator(SystemClock(), config.node_timeout_s)
        self._keeper = Keeper(
            RayPlatform(cluster),
            RayRecordStore(cluster),
            FleetRecord(cluster_id, asdict(config), secret=secret, mounted_bytes=mounted_bytes, selector=selector),
            SystemClock(),
            reporting=self._coordinator.reporting,
            forget=self._coordinator.forget,
        )
        self._metrics = MetricsEndpoint(config.metrics_port, ray.util.get_node_ip_address(), is_coordinator=True)
        self._metrics.serve(coordinator_pages(self._coordinator, self._keeper.status, self._metrics, cluster))
        self._lookups = self._make_lookups(bytes.fromhex(self._keeper.record.secret))
        threading.Thread(target=self._keeper.run, args=(threading.Event(),), name="tkv-keep", daemon=True).start()

    def _make_lookups(self, secret: bytes) -> LookupServer | None:
        """Returns the server through which nodes look blocks up without Ray.

        Returns None if streams are off, if the cluster has no secret, or, with a warning in the log, if the server cannot listen. Nodes
        then look blocks up through Ray.
        """
        try:
            place = PeerPlace.of(self._config.peer_address)
            if place is None or not secret:
                return None
            listener = place.beside_nodes().listen(ray.util.get_node_ip_address())
        except TieredKVError as error:
            log.warning("look-ups go through Ray: %s", error)
            return None
        return LookupServer(self._coordinator, PeerIdentity(self._cluster_id, "coordinator", secret), listener)

    def describe(self) -> ClusterDescription:
        """Returns the cluster's id, its settings, its live nodes, its lost nodes and its fleet."""
        nodes, lost = self._coordinator.nodes(), self._coordinator.lost()
        return {
            **{"cluster_id": self._cluster_id, "config": self._config, "nodes": nodes, "lost": lost, "fleet": self._keeper.status()},
            "metrics_address": self._metrics.address,
            "metrics_problem": self._metrics.problem,
        }

    def drain(self, node: str, on: bool = True) -> None:
        """Mark a node as drained, or with `on` False as no longer drained. See `Keeper.drain`."""
        self._keeper.drain(node, on)

    def finish_drain(self, node: str) -> None:
        """End the actor of a drained node. See `Keeper.finish_drain`."""
        self._keeper.finish_drain(node)

    def retry(self) -> None:
        """Start missing nodes at once, also those whose start failed before. See `Keeper.retry`."""
        self._keeper.retry()

    def report(self, report: Report) -> Answer:
        return self._coordinator.report(report)._replace(directory=self._lookups.address if self._lookups else None)

    def locate(self, asker: str, keys: list[BlockKey]) -> list[list[str]]:
        return self._coordinator.locate(asker, keys)

    def holders(self, asker: str, keys: list[BlockKey]) -> Holders:
        return self._coordinator.holders(asker, keys)

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        return self._coordinator.probe(root, known, probe)

    def raise_epoch(self, families: list[bytes], keep: bool) -> tuple[list[Epoch], list[str]]:
        return self._coordinator.raise_epoch(families, keep, int(time.time() * 1000))

    def forget(self, node: str) -> None:
        self._coordinator.forget(node)
