"""A cluster in one process, whose nodes reach each other by direct calls. For tests, and for `tiered_kv.open`."""

import atexit
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of, page_client_of
from tiered_kv.client.page_client import PageClient
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.config import Config
from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.coordinator.lookup_server import LookupServer
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.layout import Layout, OpaqueLayout
from tiered_kv.node.insight.explaining import recall
from tiered_kv.node.node import Node
from tiered_kv.node.peers.network import StreamLink
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.explanation import GoneRecord
from tiered_kv.protocol.messages import NO_PEERS, PeerStats
from tiered_kv.protocol.peer_address import PeerPlace
from tiered_kv.protocol.peer_channel import PeerIdentity
from tiered_kv.protocol.peer_transport import FramePieces, Holders, Receiver
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report


class InProcessCluster:
    """Nodes and their coordinator in this process. A context manager. Closing it removes all files.

    `streams`: whether the nodes transfer blocks and ask the directory over TCP, as nodes of a real cluster do. All connections stay on
    this machine. `secret`: the secret from which the salts of tenants are derived.
    """

    def __init__(self, config: Config, nodes: int = 1, clock: Clock | None = None, *, streams: bool = False, secret: bytes = b"") -> None:
        self._salting: dict[str, Any] = {"secret": secret}
        self._clock = clock or SystemClock()
        self.cluster_id = uuid.uuid4().hex[:8]
        self.config = config
        self.coordinator = Coordinator(self._clock, config.node_timeout_s)
        self.nodes: dict[str, Node] = {}
        self.unreachable: set[str] = set()
        """Names of nodes, or "coordinator", that do not answer direct calls: a network partition in a test."""
        self._secret = os.urandom(32) if streams else b""
        self.links: dict[str, StreamLink] = {}
        self._labels: dict[str, dict[str, str]] = {}  # by node: additional entries of its info
        self._lookups: LookupServer | None = None
        if streams:
            self._lookups = LookupServer(self.coordinator, self._identity("coordinator"), self._listener())
        for number in range(nodes):
            self.start_node(f"n{number}")

    def start_node(self, node_id: str) -> Node:
        """Start a node of this cluster. Returns the node.

        If a node with this id was stopped and its files were not removed, the new node has its blocks.
        """
        direct = InProcessLink(self, node_id)
        if not self._secret:
            self.nodes[node_id] = Node(self.config, self.cluster_id, node_id, direct, clock=self._clock, **self._salting)
            return self.nodes[node_id]
        link = self.links[node_id] = StreamLink(direct, self._identity(node_id), self._listener())
        labels = self._labels[node_id] = {"peer_address": link.address}
        try:
            node = Node(self.config, self.cluster_id, node_id, link, clock=self._clock, labels=labels, **self._salting)
            self.nodes[node_id] = node
        except TieredKVError:
            link.close()
            raise
        link.serve(node)
        return node

    def _identity(self, name: str) -> PeerIdentity:
        return PeerIdentity(self.cluster_id, name, self._secret)

    def _listener(self) -> socket.socket:
        place = PeerPlace.of(self.config.peer_address)
        assert place is not None, "peer_address must not be off in a cluster with streams"
        return place.listen("127.0.0.1")

    def announce(self, node_id: str, address: str) -> None:
        """Make peers connect to `address` instead of the node's own address, for example to a proxy in a test."""
        self._labels[node_id]["peer_address"] = address
        self.report_all()

    def stop_node(self, node_id: str, *, remove: bool = True) -> None:
        """Close a node and its streams. `remove`: whether to remove its files."""
        if node_id in self.links:
            self.links.pop(node_id).close()
        self.nodes[node_id].close(remove)

    @property
    def directory_address(self) -> str | None:
        """The TCP address at which the coordinator answers look-ups, or None without `streams`."""
        return self._lookups.address if self._lookups else None

    def client(self, node_id: str, layout: Layout, namespace: Namespace, **rope: Any) -> Client:
        """Returns a client that calls one node directly. If another node with this id replaces the node, the client uses that one."""
        return client_of(
            self.nodes[node_id].info(),
            layout,
            namespace,
            connect=lambda: self.nodes[node_id].open_session(),
            find=lambda: self.nodes[node_id].info(),
            **rope,
        )

    def page_client(self, node_id: str, layout: OpaqueLayout, namespace: Namespace) -> PageClient:
        """Returns the same as `client`, but for the pages of an engine."""
        return page_client_of(
            lambda: self.nodes[node_id].info(), layout, namespace, connect=lambda: self.nodes[node_id].open_session(), clock=self._clock
        )

    def report_all(self) -> None:
        """Send the reports of all nodes now, so that the directory is up to date."""
        for node in self.nodes.values():
            node.report()

    def close(self) -> None:
        """Stop all nodes and remove their files."""
        for link in self.links.values():
            link.close()
        for node in self.nodes.values():
            node.close()
        if self._lookups:
            self._lookups.close()

    def __enter__(self) -> "InProcessCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InProcessLink:
    """The link of a node of an `InProcessCluster`: calls the coordinator and the other nodes directly."""

    def __init__(self, cluster: InProcessCluster, node_id: str) -> None:
        self._cluster = cluster
        self._node_id = node_id

    def report(self, report: Report) -> Answer:
        self._reach("coordinator")
        return self._cluster.coordinator.report(report)._replace(directory=self._cluster.directory_address)

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        self._reach("coordinator")
        return self._cluster.coordinator.locate(self._node_id, keys)

    def holders(self, keys: list[BlockKey], wait_s: float) -> Holders:
        self._reach("coordinator")
        return self._cluster.coordinator.holders(self._node_id, keys)

    def recall(self, nodes: Sequence[str], keys: list[BlockKey], wait_s: float) -> dict[str, dict[BlockKey, GoneRecord]]:
        found: dict[str, dict[BlockKey, GoneRecord]] = {}
        for node in nodes:
            with suppress(TieredKVError):
                self._reach(node)
                found[node] = recall(self._cluster.nodes[node], keys)
        return found

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        self._reach("coordinator")
        return self._cluster.coordinator.probe(root, known, probe)

    def raise_epoch(self, families: list[bytes], keep: bool) -> tuple[list[Epoch], list[str]]:
        self._reach("coordinator")
        return self._cluster.coordinator.raise_epoch(families, keep, int(time.time() * 1000))

    def spread(self, nodes: Sequence[str], epochs: Sequence[Epoch], within_s: float) -> list[str]:
        unreached = []
        for node in nodes:
            try:
                self._reach(node)
                self._cluster.nodes[node].epochs.adopt(epochs)
            except TieredKVError:
                unreached.append(node)
        return unreached

    def request(self, node: str, keys: list[BlockKey]) -> "InProcessTransfer":
        self._reach(node)
        with self._cluster.nodes[node].serving(keys) as frames:
            return InProcessTransfer(keys, [[bytes(buffer) for buffer in pieces] for pieces in frames])

    def streams_from(self, node: str) -> bool:
        return False

    def stats(self) -> PeerStats:
        return NO_PEERS

    def _reach(self, whom: str) -> None:
        known = whom == "coordinator" or whom in self._cluster.nodes
        if not known or whom in self._cluster.unreachable or self._node_id in self._cluster.unreachable:
            raise TieredKVError(Kind.TRANSPORT, f"no answer from {whom}")


class InProcessTransfer:
    """A transfer of blocks from another node of this process. It has all frames from the start."""

    def __init__(self, keys: list[BlockKey], frames: list[FramePieces]) -> None:
        self._keys = keys
        self._frames = frames

    def prefetch(self) -> None:
        pass

    def deliver(self, receiver: Receiver, wait_s: float, patience_s: float, meanwhile: Callable[[], None]) -> int:
        meanwhile()
        return receiver.take(self._keys[: len(self._frames)], self._frames)


class Embedded:
    """A node in this process, without peers. It ends with `close`, or when the interpreter exits.

    If the config has a `disk_path`, the disk tier's content stays in that folder for the next node with the same path. All other
    content is lost when the node ends. A forked child process can read blocks in memory. It stores nothing, and its `close` removes
    nothing.
    """

    def __init__(self, config: Config, clock: Clock | None = None) -> None:
        self._clock = clock
        self._pid = os.getpid()
        # Not a TemporaryDirectory: a child process would remove it when it ends.
        self._scratch = tempfile.mkdtemp(prefix="tkv-disk-") if config.disk and config.disk_path is None else None
        try:
            if self._scratch:
                segments = Path(self._scratch) / "segments"
                segments.mkdir(mode=0o700)
                config = config.with_(disk_path=str(segments))
            self.node = Node(config, uuid.uuid4().hex[:8], "local", clock=clock)
        except TieredKVError:
            self._clear()
            raise
        atexit.register(self.close)

    def client(self, layout: Layout, namespace: Namespace, *, on_close: Callable[[], None] = lambda: None, **rope: Any) -> Client:
        """Returns a client that calls the node directly. Several clients of different layouts and namespaces may be open."""
        node = self.node
        return client_of(node.info(), layout, namespace, connect=node.open_session, clock=self._clock, on_close=on_close, **rope)

    def page_client(self, layout: OpaqueLayout, namespace: Namespace, *, on_close: Callable[[], None] = lambda: None) -> PageClient:
        """Returns a client for the pages of an engine, which calls the node directly."""
        node = self.node
        return page_client_of(node.info, layout, namespace, connect=node.open_session, clock=self._clock, on_close=on_close)

    def close(self) -> None:
        """End the node and remove its files. Close its clients first. A second call does nothing.

        Takes a few seconds at most, even if the disk hangs. `Node.close` describes what is lost in that case.
        """
        if os.getpid() != self._pid:
            return
        atexit.unregister(self.close)
        self.node.close(afterwards=self._clear)

    def _clear(self) -> None:
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)


def open_client(config: Config, layout: Layout, namespace: Namespace, clock: Clock | None = None, **rope: Any) -> Client:
    """Create a node in this process (`Embedded`). Returns a client that ends the node when it is closed."""
    embedded = Embedded(config, clock)
    try:
        return embedded.client(layout, namespace, on_close=embedded.close, **rope)
    except BaseException:
        embedded.close()
        raise
