"""The node as a detached Ray actor, one on each matching Ray node. Ray restarts it on the same machine, where it finds its blocks again."""

import logging
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import ray

from tiered_kv.actors.names import SWITCH_INTERVAL_S
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.explanation import GoneRecord
from tiered_kv.protocol.handover import EndReport, Inventory, ModelMessages
from tiered_kv.protocol.messages import BlockRun, NodeInfo, NodeStats
from tiered_kv.protocol.peer_address import PeerPlace
from tiered_kv.protocol.peer_channel import PeerIdentity

if TYPE_CHECKING:
    from tiered_kv.node.checkpoints.steps import CheckpointRequest, StepAnswer
    from tiered_kv.node.trace_recording import Recorded
    from tiered_kv.protocol.peer_transport import Link

log = logging.getLogger(__name__)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=8, enable_task_events=False)
class NodeActor:
    """Runs a `Node`. It serves workers on a Unix socket, and other nodes over streams or through Ray's object store.

    `secret`: the cluster's secret in hexadecimal, "" for a cluster without one (`ClusterState.secret`).
    """

    def __init__(self, cluster: str, cluster_id: str, node_id: str, config: Config, mounted_bytes: int = 0, secret: str = "") -> None:
        # Imported here, so that the coordinator, which creates these actors, does without torch.
        from tiered_kv.metrics.endpoint import MetricsEndpoint
        from tiered_kv.metrics.node_pages import node_pages
        from tiered_kv.node.node import Node
        from tiered_kv.node.peers.network import StreamLink
        from tiered_kv.protocol.node_record import NodeRecord, write_record
        from tiered_kv.protocol.unix_socket import SessionServer

        self._secret = bytes.fromhex(secret)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._refusal: TieredKVError | None = None
        self._link: Link | None = None
        self._metrics: MetricsEndpoint | None = None
        self._is_serving = False
        here = ray.get_runtime_context()
        labels = {"ray_node_id": here.get_node_id(), "address": ray.util.get_node_ip_address()}
        try:
            link = self._link = self._make_link(cluster, cluster_id, node_id, config, labels["address"])
            self._metrics = MetricsEndpoint(config.metrics_port, labels["address"])
            labels |= self._metrics.labels
            if isinstance(link, StreamLink):
                labels["peer_address"] = link.address
            self._node = Node(
                *(config, cluster_id, node_id, link),
                labels=labels,
                mounted_bytes=mounted_bytes,
                secret=self._secret,
                at_beat=self._end_unless_in_place,
            )
            if isinstance(link, StreamLink):
                link.serve(self._node)
            self._metrics.serve(node_pages(self._node))
            self._server = SessionServer(f"{self._node.directory}/sock", self._node.open_session, self._node.report_commits)
            about: NodeInfo = {**self._node.info(), "settings": asdict(config)}
            write_record(NodeRecord(cluster, cluster_id, node_id, about, ray_address=here.gcs_address, ray_node_id=labels["ray_node_id"]))
            self._is_serving = True
        except TieredKVError as error:
            # Ray restarts an actor whose constructor raises forever, and loses its error. So `info` raises the error instead.
            self._refusal = error
            if isinstance(self._link, StreamLink):
                self._link.close()
            if self._metrics is not None:
                self._metrics.close()

    def _make_link(self, cluster: str, cluster_id: str, node_id: str, config: Config, address: str) -> "Link":
        """Returns a link with streams, or a link through Ray if the cluster has no secret or the settings turn streams off."""
        from tiered_kv.actors.link import RayLink
        from tiered_kv.node.peers.network import StreamLink

        place = PeerPlace.of(config.peer_address)
        link = RayLink(cluster, node_id)
        if place is None or not self._secret:
            return link
        return StreamLink(link, PeerIdentity(cluster_id, node_id, self._secret), place.listen(address))

    def _end_unless_in_place(self) -> None:
        """End the process if the node's files were removed or replaced. Ray then restarts the actor, which creates new files."""
        if self._is_serving and not self._node.is_in_place():
            log.error("%s was removed or replaced; this node ends and restarts with new files", self._node.directory)
            self._node.abdicate()
            os._exit(1)  # Ray restarts an actor whose process ends this way, but not one that exits as usual

    def info(self) -> NodeInfo:
        """Returns what a worker needs to attach. Raises the error that kept the node from starting, if any."""
        if self._refusal:
            raise self._refusal
        return self._node.info()

    def stats(self) -> NodeStats:
        return self._node.stats()

    def adopt_epochs(self, epochs: list[Epoch]) -> bool:
        """Take over weight epochs raised elsewhere (`NodeEpochs.adopt`). Returns True once no block of an ended epoch can be read here."""
        self._node.epochs.adopt(epochs)
        return True

    def purge(self, families: list[bytes]) -> int:
        """Drop all blocks of these model families, and refuse new ones until `end_purge` (`NodeEpochs.purge`).

        Returns how many were dropped.
        """
        return self._node.epochs.purge(families)

    def end_purge(self, families: list[bytes]) -> None:
        """Accept blocks of these model families again after a purge (`NodeEpochs.end_purge`)."""
        self._node.epochs.end_purge(families)

    def checkpoint(self, request: "CheckpointRequest[StepAnswer]") -> "StepAnswer":
        """Carry out one step of writing or restoring a checkpoint. See `Node.checkpoint`."""
        return self._node.checkpoint(request)

    def record(self, on: bool, salt: bytes = b"") -> float:
        """Start or stop recording requests. See `Node.record`."""
        return self._node.record(on, salt)

    def recorded(self, everything: bool = False) -> "Recorded":
        """Returns the requests recorded since the last call. See `Node.recorded`."""
        return self._node.recorded(everything)

    def recall(self, keys: list[BlockKey]) -> dict[BlockKey, GoneRecord]:
        """Returns why this node no longer has these blocks. See `insight.explaining.recall`."""
        from tiered_kv.node.insight.explaining import recall

        return recall(self._node, keys)

    def serve(self, keys: list[BlockKey]) -> list[ray.ObjectRef]:
        """Returns a reference to the frames of the leading keys that this node has, in a list; [] if it does not have the first key.

        The frames are one object in Ray's object store: a list of frames, each a list of buffers. Payloads are copied once, from
        the arena to the object store.
        """
        with self._node.serving(keys) as frames:
            if not frames:
                return []
            return [ray.put([[np.frombuffer(buffer, np.uint8) for buffer in pieces] for pieces in frames])]

    def inventory(self) -> Inventory:
        """Returns a list of the node's blocks, which other nodes are to take over. See `leaving.inventory`."""
        from tiered_kv.node.lifetime.leaving import inventory

        return inventory(self._node)

    def take_over(self, runs: list[BlockRun], models: ModelMessages, wait_s: float) -> int:
        """Copy blocks from a node that is about to end. Returns how many of them this node has then. See `leaving.take_over`."""
        from tiered_kv.node.lifetime.leaving import take_over

        return take_over(self._node, runs, models, wait_s)

    def close(self, flush_s: float = 0.0) -> EndReport:
        """Leave the cluster, and delete the node's files. A disk folder that the settings name is kept.

        Before that, blocks that are only in memory are written to the kept folder, for at most `flush_s`. Returns how many
        blocks were kept and lost.
        """
        from tiered_kv.node.lifetime.leaving import end
        from tiered_kv.node.peers.network import StreamLink

        if self._refusal:
            raise TieredKVError(Kind.CLOSED, "the node must have started before it is closed, but its start failed")
        self._is_serving = False
        if isinstance(self._link, StreamLink):
            self._link.close()
        if self._metrics is not None:
            self._metrics.close()
        self._server.close()
        return end(self._node, flush_s)
