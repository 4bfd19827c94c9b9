"""The nodes of a cluster on this machine, by the records that they leave in shared memory. Asks nobody, imports no Ray."""

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
"""A node whose last beat is younger lives; beats come every 0.1 s."""
STAY_S = 5.0
"""So long a client waits for its own node to beat again before it goes to another one of the cluster on this machine."""


class LocalNodes:
    """The records of the nodes of cluster `name` that this process may attach to, and which of them it should.

    Where this machine has the cluster's state file the nodes must be of the cluster that stands there now. `address`: they must be
    part of this Ray as well.
    """

    def __init__(self, name: str, address: str | None = None) -> None:
        self.name = name
        self.address = address
        self._by_state = state.find(name) is not None
        self._chosen: NodeRecord | None = None

    def records(self) -> "list[NodeRecord]":
        """All that match, also of nodes that have ended without removing theirs."""
        from tiered_kv.protocol.node_record import records_below

        known = self._known()
        here = _own_ray()
        if known is None and self._by_state and here is None:
            return []  # stopped; another cluster of this name, from elsewhere, is not meant
        shm_path = Config.of(known.config).shm_path if known else Config().shm_path
        found = [record for record in records_below(shm_path) if record.cluster == self.name and self._is_at_address(record)]
        own = [record for record in found if here is not None and record.ray_address == here[0]]
        if own or known is None:
            return own or found
        return [record for record in found if record.cluster_id == known.cluster_id]

    def find(self) -> dict | None:
        """What the node to use says of itself (`Node.info`); None while there is none that lives.

        That is the one used before, while it is expected back; else the one on this process's Ray node, if it is part of a Ray; else
        the first by name. Raises (kind `cluster`) for a node of another version.
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
                f"the node {best.node_id} of cluster {self.name!r} runs tiered_kv {best.package}, whose workers speak version"
                f" {best.protocol} of the session protocol, this one {PROTOCOL}; run one version of tiered_kv on this machine",
                name=self.name,
            )
        self._chosen = best
        return best.info

    def running(self) -> list[bool]:
        """For each node that has left a record here whether its process runs."""
        return [os.path.exists(f"/proc/{record.pid}") for record in self.records()]

    def silent(self, waited_s: float, error: TieredKVError | None) -> TieredKVError:
        """The error (kind `cluster`) for nodes that run here and do not answer; `error`: what was met last."""
        now_ns = time.monotonic_ns()
        silent = [f"{record.node_id} (process {record.pid}, last beat {record.age_s(now_ns):.0f} s ago)" for record in self.records()]
        why = f": {error}" if error else ""
        message = f"no node of cluster {self.name!r} on this machine has answered for {waited_s:.0f} s: {', '.join(silent)}{why}"
        return TieredKVError(Kind.CLUSTER, message, name=self.name)

    def _known(self) -> state.ClusterState | None:
        with suppress(TieredKVError):  # damaged: as good as none
            return state.find(self.name)
        return None

    def _is_at_address(self, record: "NodeRecord") -> bool:
        if self.address is None:
            return True
        return record.ray_address is not None and raylocal.parse_address(record.ray_address) == raylocal.parse_address(self.address)


def _own_ray() -> tuple[str, str] | None:
    """Address and node of the Ray that this process is part of; None if of none. Does not import ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    context = ray.get_runtime_context()
    return context.gcs_address, context.get_node_id()
