"""A stand-in for Ray: nodes that join and leave, actors that start, refuse or hang, and a key-value store that can fail."""

from tiered_kv.coordinator.keeper import Keeper, Outcome
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.fleet import FleetRecord, RayNode


class Clock:
    """A clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def now_s(self) -> float:
        return self.now


class Ground:
    """Ray nodes and actors (`Platform`), and the record (`RecordStore`). `calls` lists what a keeper did, in order."""

    def __init__(self) -> None:
        self.alive: dict[str, RayNode] = {}
        self.actors: dict[str, str] = {}  # by node: the id of the Ray node that runs it
        self.refusals: dict[str, TieredKVError] = {}  # by address: why no node can start there
        self.silent: set[str] = set()  # nodes whose start takes long
        self.fails: TieredKVError | None = None
        self.data: bytes | None = None
        self.calls: list[str] = []
        self.forgotten: list[str] = []
        self._numbers = 0

    def join(self, address: str, *, is_head: bool = False, labels: dict | None = None, resources: dict | None = None) -> str:
        """Let a Ray node join. Returns its id."""
        self._numbers += 1
        ray_node = RayNode(f"ray-{self._numbers}", address, is_head, labels or {}, resources or {})
        self.alive[ray_node.ray_node_id] = ray_node
        return ray_node.ray_node_id

    def leave(self, ray_node_id: str) -> None:
        """Let a Ray node end. Its actors stay in Ray's list, as they would be restarted there."""
        del self.alive[ray_node_id]

    def keeper(self, clock: Clock, *, cluster_id: str = "c1", selector: str | None = None) -> Keeper:
        """Returns a keeper, as the coordinator makes one when it starts."""
        first = FleetRecord(cluster_id, {"host": 1 << 20}, selector=selector)
        return Keeper(self, self, first, clock, reporting=self.reporting, forget=self.forgotten.append)

    def reporting(self) -> set[str]:
        """Returns the nodes that serve."""
        return {node for node, where in self.actors.items() if where in self.alive and node not in self.silent and not self._refusal(node)}

    def _refusal(self, node: str) -> TieredKVError | None:
        where = self.alive.get(self.actors.get(node, ""))
        return self.refusals.get(where.address) if where else None

    # Platform

    def ray_nodes(self) -> list[RayNode]:
        if self.fails:
            raise self.fails
        return list(self.alive.values())

    def present(self) -> set[str]:
        return set(self.actors)

    def start(self, node: str, ray_node: RayNode, record: FleetRecord) -> None:
        assert FleetRecord.of_bytes(self.data or b"") == record, "the record is saved before anything is started"
        if node in self.actors:
            raise TieredKVError(Kind.CLUSTER, f"an actor named {node} exists already")
        assert ray_node.address not in {self.alive[where].address for where in self.actors.values() if where in self.alive}, (
            "two nodes on one machine"
        )
        self.calls.append(f"start {node} at {ray_node.address}")
        self.actors[node] = ray_node.ray_node_id

    def outcome(self, node: str) -> Outcome | None:
        return None if node in self.silent else Outcome(self._refusal(node))

    def remove(self, node: str) -> None:
        self.calls.append(f"remove {node}")
        self.actors.pop(node, None)

    # RecordStore

    def load(self) -> bytes | None:
        return self.data

    def save(self, data: bytes) -> None:
        self.data = data
