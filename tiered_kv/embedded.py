"""A cluster in one process: nodes that reach each other by plain calls. For tests, and for `tiered_kv.open`."""

import atexit
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.config import Config
from tiered_kv.coordinator.coordinator import Answer, Coordinator, Report
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.layout import KVLayout
from tiered_kv.node.node import Node
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.protocol.probes import Probe, Variants


class InProcessCluster:
    """Nodes and their coordinator in this process. A context manager; closing it removes everything."""

    def __init__(self, config: Config, nodes: int = 1, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self.cluster_id = uuid.uuid4().hex[:8]
        self.config = config
        self.coordinator = Coordinator(self._clock, config.node_timeout_s)
        self.nodes: dict[str, Node] = {}
        self.unreachable: set[str] = set()
        """Nodes, and "coordinator", that do not answer: the partition of a test."""
        for number in range(nodes):
            self.start_node(f"n{number}")

    def start_node(self, node_id: str) -> Node:
        """A node of this cluster; one that was stopped without removal finds its blocks."""
        link = InProcessLink(self, node_id)
        self.nodes[node_id] = Node(self.config, self.cluster_id, node_id, link, clock=self._clock)
        return self.nodes[node_id]

    def client(self, node_id: str, layout: KVLayout, namespace: Namespace, **rope: Any) -> Client:
        """A worker's client, attached to one node (and to what is started under its id later) by direct calls."""
        return client_of(
            self.nodes[node_id].info(),
            layout,
            namespace,
            connect=lambda: self.nodes[node_id].open_session(),
            find=lambda: self.nodes[node_id].info(),
            **rope,
        )

    def report_all(self) -> None:
        """Bring the directory up to date now, instead of a moment later."""
        for node in self.nodes.values():
            node.report()

    def close(self) -> None:
        """Stop all nodes and remove their files."""
        for node in self.nodes.values():
            node.close()

    def __enter__(self) -> "InProcessCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcessLink:
    """The link of a node of an `InProcessCluster`."""

    def __init__(self, cluster: InProcessCluster, node_id: str) -> None:
        self._cluster = cluster
        self._node_id = node_id

    def report(self, report: Report) -> Answer:
        self._reach("coordinator")
        return self._cluster.coordinator.report(report)

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        self._reach("coordinator")
        return self._cluster.coordinator.locate(self._node_id, keys)

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        self._reach("coordinator")
        return self._cluster.coordinator.probe(root, known, probe)

    def request(self, node: str, keys: list[BlockKey]) -> "InProcessTransfer":
        self._reach(node)
        with self._cluster.nodes[node].serving(keys) as frames:
            return InProcessTransfer([[bytes(buffer) for buffer in pieces] for pieces in frames])

    def _reach(self, whom: str) -> None:
        known = whom == "coordinator" or whom in self._cluster.nodes
        if not known or whom in self._cluster.unreachable or self._node_id in self._cluster.unreachable:
            raise TieredKVError(Kind.TRANSPORT, f"{whom} does not answer")


class InProcessTransfer:
    """Frames that are here already."""

    def __init__(self, frames: list[FramePieces]) -> None:
        self._frames = frames

    def prefetch(self) -> None:
        pass

    def frames(self, wait_s: float) -> list[FramePieces]:
        return self._frames


class Embedded:
    """A node of its own in this process, without peers, which ends with `close`, at the latest when the interpreter exits.

    What lies in a `disk_path` that was named stays there, and is found by who opens it next; all else ends with the node.
    A child process reads what is in memory; it stores nothing, and its `close` removes nothing.
    """

    def __init__(self, config: Config, clock: Clock | None = None) -> None:
        self._clock = clock
        self._pid = os.getpid()
        # Not a TemporaryDirectory, which a child process would remove when it ends.
        self._scratch = tempfile.mkdtemp(prefix="tkv-disk-") if config.disk and config.disk_path is None else None
        if self._scratch:
            config = config.with_(disk_path=str(Path(self._scratch) / "segments"))
        try:
            if self._scratch:
                Path(config.disk_path).mkdir(mode=0o700)
            self.node = Node(config, uuid.uuid4().hex[:8], "local", clock=clock)
        except TieredKVError:
            self._clear()
            raise
        atexit.register(self.close)

    def client(self, layout: KVLayout, namespace: Namespace, *, on_close: Callable[[], None] = lambda: None, **rope: Any) -> Client:
        """A client of the node by direct calls; several may be open, of different layouts and namespaces."""
        node = self.node
        return client_of(node.info(), layout, namespace, connect=node.open_session, clock=self._clock, on_close=on_close, **rope)

    def close(self) -> None:
        """End the node and remove its files; close its clients before. A second time does nothing.

        Takes at most some seconds, also where the disk hangs: see `Node.close` for what is given up then.
        """
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        self.node.close(afterwards=self._clear)

    def _clear(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


def open_client(config: Config, layout: KVLayout, namespace: Namespace, clock: Clock | None = None, **rope: Any) -> Client:
    """A client with a node of its own in this process (`Embedded`), which ends with it."""
    embedded = Embedded(config, clock)
    try:
        return embedded.client(layout, namespace, on_close=embedded.close, **rope)
    except BaseException:
        embedded.close()
        raise
