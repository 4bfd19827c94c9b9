"""The state of a fleet: which Ray nodes get a cache node, which cache node is on which Ray node, and which ones are drained. Plain data.

It is one small JSON document. The keeper writes it before it acts, so a coordinator that was killed continues where it stopped.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, NotRequired, TypedDict

from tiered_kv.errors import Kind, TieredKVError

VERSION = 1
MEMBER_STATES = ("starting", "serving", "silent", "refused", "lost", "draining", "drained")


class RayNode(NamedTuple):
    """A Ray node that is alive. `ray_node_id` is new after each start of the Ray node; `address` is that of its machine."""

    ray_node_id: str
    address: str
    is_head: bool = False
    labels: Mapping[str, str] = {}
    resources: Mapping[str, float] = {}


@dataclass(frozen=True)
class Selector:
    """Chooses Ray nodes: by label (`name=value`), by resource (`name`), or all of them (None)."""

    text: str | None = None

    def __post_init__(self) -> None:
        label, equals, value = (part.strip() for part in ("all" if self.text is None else self.text).partition("="))
        if not label or (equals and not value):
            message = f"--nodes-with: must be LABEL=VALUE, or the name of a resource, got {self.text!r}"
            raise TieredKVError(Kind.CONFIG, message, setting="nodes-with")

    def matches(self, node: RayNode) -> bool:
        """Returns whether the Ray node gets a cache node."""
        if self.text is None:
            return True
        name, equals, value = (part.strip() for part in self.text.partition("="))
        if equals:
            return node.labels.get(name) == value
        return node.resources.get(name, 0) > 0


@dataclass(frozen=True)
class FleetMember:
    """A cache node of the fleet: the address of its Ray node, and the Ray node's id when the cache node was last started there."""

    address: str
    ray_node_id: str | None = None


@dataclass(frozen=True)
class FleetRecord:
    """The state of a fleet that outlives its coordinator.

    settings: the fields of `Config`. mounted_bytes: as in `Node`. selector: the text of a `Selector`. members: by node id. drained:
    the ids of nodes that must not be started. next_number: the number in the id of the next new node. coordinator_starts: how often
    the coordinator has started. secret: as in `ClusterState`.
    """

    cluster_id: str
    settings: dict[str, Any]
    mounted_bytes: int = 0
    selector: str | None = None
    members: dict[str, FleetMember] = field(default_factory=dict)
    drained: tuple[str, ...] = ()
    next_number: int = 0
    coordinator_starts: int = 0
    secret: str = field(default="", repr=False)

    def as_bytes(self) -> bytes:
        """Returns the record as JSON."""
        return json.dumps({"version": VERSION} | asdict(self)).encode()

    @classmethod
    def of_bytes(cls, data: bytes) -> "FleetRecord":
        """Parse a record. Raises (kind `cluster`) if it is damaged or of another version."""
        try:
            found = json.loads(data)
            version = found.pop("version")
            if version != VERSION:
                raise ValueError(f"version must be {VERSION}, got {version!r}")
            members = {str(node): FleetMember(**member) for node, member in found.pop("members").items()}
            return cls(**found | {"members": members, "drained": tuple(found["drained"])})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"the fleet's record in Ray cannot be used: {error}; stop the cluster with `tiered-kv down`, and start it again"
            raise TieredKVError(Kind.CLUSTER, message) from error

    def started(self) -> "FleetRecord":
        """Returns a copy with one more start of the coordinator."""
        return replace(self, coordinator_starts=self.coordinator_starts + 1)

    def with_new_member(self, address: str) -> "FleetRecord":
        """Returns a copy with a new node at `address`, with the next number."""
        node = f"node-{self.next_number}"
        return replace(self.with_member(node, FleetMember(address)), next_number=self.next_number + 1)

    def with_member(self, node: str, member: FleetMember) -> "FleetRecord":
        """Returns a copy in which the node id `node` has the data `member`."""
        return replace(self, members=self.members | {node: member})

    def without_member(self, node: str) -> "FleetRecord":
        """Returns a copy without the node, and without its drained mark."""
        kept = {other: member for other, member in self.members.items() if other != node}
        return replace(self, members=kept, drained=tuple(other for other in self.drained if other != node))

    def with_drained(self, node: str, on: bool) -> "FleetRecord":
        """Returns a copy in which the node is drained, or no longer drained."""
        return replace(self, drained=tuple(sorted({*self.drained} | {node} if on else {*self.drained} - {node})))


class MemberStatus(TypedDict):
    """A member as `status` shows it. `state`: one of MEMBER_STATES. `since_s`: for how many seconds it has been in this state.

    `error`, `kind`: the error that prevents its start, if its state is `refused`.
    """

    node: str
    address: str
    state: str
    since_s: float
    error: NotRequired[str]
    kind: NotRequired[str]


class FleetStatus(TypedDict):
    """The keeper's view of the fleet. `ray_nodes`: how many Ray nodes are alive. `rounds`: how many of the keeper's rounds succeeded.

    `round_age_s`: the seconds since the last successful round. `problem`: why the last round failed, empty if it did not. `restarts`,
    `uptime_s`: how often the coordinator was restarted, and the seconds since its last start.
    """

    selector: str | None
    members: list[MemberStatus]
    ray_nodes: int
    rounds: int
    round_age_s: float
    problem: str
    restarts: int
    uptime_s: float
