"""Finds the nodes of a cluster on this machine by their records in shared memory. Calls no node, and does not import ray."""

import os
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from tiered_kv.cluster import raylocal, state
from tiered_kv.config import Config
from tiered_kv.errors import Kind, TieredKVError

if TYPE_CHECKING:
    from tiered_kv.protocol.node_record import NodeRecord

LIVE_S = 2.0
"""A node counts as alive if its last heartbeat is younger than this. Nodes write one every 0.1 s."""
STAY_S = 5.0
"""How long a client waits for its own node's next heartbeat before it uses another node of the cluster on this machine."""


class LocalNodes:
    """Finds the records of cluster `name`'s nodes on this machine, and chooses the node that this process should use.

    If this machine has the cluster's state file, only nodes of the cluster in that file match. With `address`, only nodes of the
    Ray at that address match. With `node_id`, only the node with this id matches.
    """

    def __init__(self, name: str, address: str | None = None, node_id: str | None = None) -> None:
        self.name = name
        self._node_id = node_id
        self.address = address
        self._by_state = state.find(name) is not None
        self._chosen: NodeRecord | None = None

    def records(self) -> "list[NodeRecord]":
        """Returns all matching records, including those of nodes that ended without removing their record."""
        from tiered_kv.protocol.node_record import records_below

        known = self._known()
        here = _own_ray()
        if known is None and self._by_state and here is None:
            return []  # the cluster was stopped, and another cluster of the same name must not take its place
        shm_path = Config.of(known.config).shm_path if known else Config().shm_path
        found = [record for record in records_below(shm_path) if record.cluster == self.name and self._is_at_address(record)]
        found = [record for record in found if self._node_id in (None, record.node_id)]
        own = [record for record in found if here is not None and record.ray_address == here[0]]
        if own or known is None:
            return own or found
        return [record for record in found if record.cluster_id == known.cluster_id]

    def find(self) -> dict | None:
        """Returns the description (`Node.info`) of the node to use, or None while no node is alive.

        For STAY_S after its last heartbeat, only the node that was chosen last is used. After that a live node is chosen: preferably one
        with the same id, else the one on this process's Ray node if the process uses Ray, else the first by id. Raises
        (kind `cluster`) if the chosen node has another protocol version.
        """
        from tiered_kv.protocol.session import PROTOCOL

        now_ns, records = time.monotonic_ns(), self.records()
        ages = {record.directory: record.age_s(now_ns) for record in records}
        before = self._chosen
        if before is not None and ages.get(before.directory, STAY_S) < STAY_S:
            records = [record for record in records if record.directory == before.directory]
        live = [record for record in records if ages[record.directory] < LIVE_S]
        if not live:
            return None
        ray_node_id = (_own_ray() or (None, None))[1]
        same = before.node_id if before else None
        best = min(live, key=lambda record: (record.node_id != same, record.ray_node_id != ray_node_id, record.node_id))
        if best.protocol != PROTOCOL:
            raise TieredKVError(
                Kind.CLUSTER,
                f"the node {best.node_id} of cluster {self.name!r} must use version {PROTOCOL} of the session protocol, as this process"
                f" does, but runs tiered_kv {best.package} with version {best.protocol}; install one version of tiered_kv on this machine",
                name=self.name,
            )
        self._chosen = best
        return best.info

    def running(self) -> list[bool]:
        """Returns, for each matching record, whether the node's process is running."""
        return [os.path.exists(f"/proc/{record.pid}") for record in self.records()]

    def silent(self, waited_s: float, error: TieredKVError | None) -> TieredKVError:
        """Returns the error (kind `cluster`) for nodes that run here but do not answer. `error`: what the last attempt to attach raised."""
        now_ns = time.monotonic_ns()
        silent = [f"{record.node_id} (process {record.pid}, last heartbeat {record.age_s(now_ns):.0f} s ago)" for record in self.records()]
        why = f": {error}" if error else ""
        message = f"no node of cluster {self.name!r} on this machine has answered for {waited_s:.0f} s: {', '.join(silent)}{why}"
        return TieredKVError(Kind.CLUSTER, message, name=self.name)

    def _known(self) -> state.ClusterState | None:
        with suppress(TieredKVError):  # a damaged state file counts as missing
            return state.find(self.name)
        return None

    def _is_at_address(self, record: "NodeRecord") -> bool:
        if self.address is None:
            return True
        return record.ray_address is not None and raylocal.parse_address(record.ray_address) == raylocal.parse_address(self.address)


def _own_ray() -> tuple[str, str] | None:
    """Returns the address and node id of the Ray that this process uses, or None. Does not import ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_node_id()
