"""A node in a separate process, run as by the node actor, but without Ray. It can be killed, stopped and started again."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

from tests.hostile.nursery import Child, Nursery, wait_until
from tiered_kv.config import Config
from tiered_kv.node.node import Node
from tiered_kv.protocol.node_record import NodeRecord, write_record
from tiered_kv.protocol.unix_socket import SessionServer


def run_node(config: dict[str, Any], cluster_id: str, node_id: str, ready: str) -> None:
    """The role of a nursery's child: writes `Node.info` to the file `ready`, and serves until it is killed.

    Workers attach to it by the cluster name, which is `cluster_id`. As a node actor it ends when its files are removed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before there are threads, so that only sigwait takes it
    serving = threading.Event()
    node = Node(Config.of(config), cluster_id, node_id, at_beat=lambda: serving.is_set() and _end_unless_in_place(node))
    server = SessionServer(f"{node.directory}/sock", node.open_session, node.report_commits)
    write_record(NodeRecord(cluster_id, cluster_id, node_id, node.info()))
    serving.set()
    written = Path(f"{ready}.new")
    written.write_text(json.dumps(node.info()))
    written.rename(ready)
    signal.sigwait({signal.SIGTERM})
    serving.clear()
    server.close()
    node.close(remove=True)


def _end_unless_in_place(node: Node) -> None:
    if not node.is_in_place():
        node.abdicate()
        os._exit(3)


class NodeProcess:
    """A node of fixed ids that is started, stopped and killed over and over."""

    def __init__(self, nursery: Nursery, scratch: Path, cluster_id: str, node_id: str = "n0", **settings: Any) -> None:
        self._nursery = nursery
        self._ready = scratch / f"{node_id}.json"
        self.ids = {"cluster_id": cluster_id, "node_id": node_id}
        self.settings = settings
        self.child: Child | None = None
        self.directory: Path | None = None

    def start(self, within_s: float = 60.0, **settings: Any) -> dict[str, Any]:
        """Start the node, with settings that differ from the usual ones. Returns its `Node.info`."""
        self._ready.unlink(missing_ok=True)
        self.child = self._nursery.start("node", config=self.settings | settings, ready=str(self._ready), **self.ids)
        wait_until(lambda: self._ready.exists() or not self.child.is_alive(), within_s, "the node's start")
        if not self._ready.exists():
            raise RuntimeError("the node ended while it started; its error output says why")
        info = json.loads(self._ready.read_text())
        self.directory = Path(info["directory"])
        return info

    def kill(self) -> None:
        """`kill -9`."""
        self.child.kill()

    def freeze(self) -> None:
        """Make the node hang (SIGSTOP)."""
        self.child.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the node continue (SIGCONT)."""
        self.child.signal(signal.SIGCONT)

    def end(self, within_s: float = 30.0) -> None:
        """Make the node close and remove its files, as `tiered-kv down` does."""
        self.child.signal(signal.SIGCONT)
        self.child.signal(signal.SIGTERM)
        self.child.wait(within_s)
