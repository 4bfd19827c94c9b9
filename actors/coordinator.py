"""The coordinator as a Ray actor: named, detached, and restarted by Ray. The nodes' reports then restore its state."""

import logging
import sys
from typing import TypedDict

import ray

from tiered_kv.actors.names import SWITCH_INTERVAL_S
from tiered_kv.clock import SystemClock
from tiered_kv.config import Config
from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.coordinator.lookup_server import LookupServer
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.messages import LiveNode
from tiered_kv.protocol.peer_address import PeerPlace
from tiered_kv.protocol.peer_channel import PeerIdentity
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report

log = logging.getLogger(__name__)


class ClusterDescription(TypedDict):
    """A cluster's id and settings, its live nodes, and by lost node the seconds since its last report."""

    cluster_id: str
    config: Config
    nodes: list[LiveNode]
    lost: dict[str, float]


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=4)
class CoordinatorActor:
    """Forwards calls to a `Coordinator`. `secret`: as for `NodeActor`."""

    def __init__(self, cluster_id: str, config: Config, secret: str = "") -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._cluster_id = cluster_id
        self._config = config
        self._coordinator = Coordinator(SystemClock(), config.node_timeout_s)
        self._lookups = self._make_lookups(bytes.fromhex(secret))

    def _make_lookups(self, secret: bytes) -> LookupServer | None:
        """Returns the server of look-ups without Ray. Without it, which is logged, nodes ask through Ray."""
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
        """Returns the cluster's id, its settings, its live nodes and its lost nodes."""
        nodes, lost = self._coordinator.nodes(), self._coordinator.lost()
        return {"cluster_id": self._cluster_id, "config": self._config, "nodes": nodes, "lost": lost}

    def report(self, report: Report) -> Answer:
        return self._coordinator.report(report)._replace(directory=self._lookups.address if self._lookups else None)

    def locate(self, asker: str, keys: list[BlockKey]) -> list[list[str]]:
        return self._coordinator.locate(asker, keys)

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        return self._coordinator.probe(root, known, probe)

    def forget(self, node: str) -> None:
        self._coordinator.forget(node)
