"""The keeper: keeps one cache node running on every matching Ray node, also when Ray nodes join and leave.

Plain Python: Ray is behind the protocols `Platform` and `RecordStore`. Each round compares the Ray nodes that are alive with the fleet's
record, saves the changes that it is about to make, and makes them. So if a keeper dies at any point, the next one continues its work.
"""

import logging
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple, Protocol

from tiered_kv.clock import Clock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.fleet import FleetMember, FleetRecord, FleetStatus, MemberStatus, RayNode, Selector

log = logging.getLogger(__name__)

ROUND_S = 1.0
"""The pause between two rounds."""
SHORT_ROUND_S = 0.2
"""The pause while a node is starting."""
RETRY_S = 30.0
"""The pause before a node whose start was refused, for example for lack of shared memory, is tried again."""
SILENT_AFTER_S = 60.0
"""After this time, a node that was started and has not reported yet is called silent instead of starting."""


class Outcome(NamedTuple):
    """The result of starting a cache node. `error`: why the node does not serve, None if it does."""

    error: TieredKVError | None = None


class Platform(Protocol):
    """The operations of Ray that a keeper uses. Each may raise `TieredKVError` if Ray does not answer."""

    def ray_nodes(self) -> list[RayNode]:
        """Returns the Ray nodes that are alive."""

    def present(self) -> set[str]:
        """Returns the ids of the cache nodes whose actor exists and has not ended."""

    def start(self, node: str, ray_node: RayNode, record: FleetRecord) -> None:
        """Start the actor of a cache node on a Ray node. Does not wait for it."""

    def outcome(self, node: str) -> Outcome | None:
        """Returns the result of the node's start; None while it is not known."""

    def remove(self, node: str) -> None:
        """End the node's actor for good, if there is one."""


class RecordStore(Protocol):
    """Keeps the fleet's record for the next keeper."""

    def load(self) -> bytes | None:
        """Returns the record, or None if there is none."""

    def save(self, data: bytes) -> None:
        """Replace the record. Once this has returned, every later `load` returns it."""


class Keeper:
    """Keeps the cache nodes of a fleet running. Thread-safe. `run` is the loop of its thread, and `step` is one round of the loop.

    `first`: the record to begin with, unless `store` has a record of the same cluster. `reporting` returns the nodes whose reports reach
    the coordinator. `forget` removes a node from the coordinator's members.
    """

    def __init__(
        self,
        platform: Platform,
        store: RecordStore,
        first: FleetRecord,
        clock: Clock,
        *,
        reporting: Callable[[], Collection[str]],
        forget: Callable[[str], None],
    ) -> None:
        self._platform = platform
        self._store = store
        self._clock = clock
        self._reporting = reporting
        self._forget = forget
        self._turn = threading.Lock()
        self._wake = threading.Event()
        self._states: dict[str, tuple[str, float]] = {}  # by node: its state, and since when
        self._refused: dict[str, tuple[TieredKVError, float]] = {}  # by node: why it cannot start, and when to try again
        self._ray_nodes = self._rounds = 0
        self._problem = ""
        self._begun_s = self._round_s = clock.now_s()
        self.record = self._inherited(first)
        self._selector = Selector(self.record.selector)
        self._save(self.record.started())

    def _inherited(self, first: FleetRecord) -> FleetRecord:
        data = self._store.load()
        if data is None:
            return first
        record = FleetRecord.of_bytes(data)
        return record if record.cluster_id == first.cluster_id else first

    def run(self, stopped: threading.Event) -> None:
        """Run rounds until `stopped` is set. A round that fails is logged, and the next one runs."""
        while not stopped.is_set():
            try:
                self.step()
            except Exception as error:
                if not self._problem:
                    log.exception("a round of the fleet's keeper failed")
                self._problem = f"{type(error).__name__}: {error}"
            is_starting = any(state == "starting" for state, _ in self._states.values())
            self._wake.wait(SHORT_ROUND_S if is_starting else ROUND_S)
            self._wake.clear()

    def step(self) -> None:
        """Run one round. Raises `TieredKVError` if Ray does not answer. The next round makes the changes that are left."""
        with self._turn:
            alive = self._platform.ray_nodes()
            present = self._platform.present()
            here = self._chosen(alive)
            self._ray_nodes = len(alive)
            self._admit(here)
            reporting = set(self._reporting())
            for node, member in list(self.record.members.items()):
                self._keep(node, here.get(member.address), present, reporting)
            self._rounds += 1
            self._round_s = self._clock.now_s()
            self._problem = ""

    def drain(self, node: str, on: bool) -> None:
        """Mark a cache node as drained, so that it is not started again. With `on` False, remove the mark: the next round starts it.

        The mark is for the present Ray node. Once that Ray node has left, the cache node is no longer a member of the fleet, and a new
        Ray node at the same address gets a cache node. Draining a lost node removes it from the fleet at once. Raises (kind `cluster`)
        if there is no such node.
        """
        with self._turn:
            if node not in self.record.members:
                known = ", ".join(self.record.members) or "none"
                raise TieredKVError(Kind.CLUSTER, f"no cache node {node!r} in this cluster; there are: {known}", node=node)
            if on and self._states.get(node, ("",))[0] == "lost":
                self._drop(node)
            else:
                self._save(self.record.with_drained(node, on))
        self._wake.set()

    def finish_drain(self, node: str) -> None:
        """End the actor of a drained node. Raises (kind `cluster`) if the node is not marked as drained."""
        with self._turn:
            if node not in self.record.drained:
                raise TieredKVError(Kind.CLUSTER, f"{node} must be marked as drained before its actor is ended", node=node)
            self._platform.remove(node)
            self._forget(node)
        self._wake.set()

    def retry(self) -> None:
        """Run a round at once, in which nodes that could not start before are started again."""
        with self._turn:
            self._refused.clear()
        self._wake.set()

    def status(self) -> FleetStatus:
        """Returns the state of the fleet after the last round."""
        now_s = self._clock.now_s()
        members = [self._status_of(node, member, now_s) for node, member in self.record.members.items()]
        return {
            "selector": self.record.selector,
            "members": members,
            "ray_nodes": self._ray_nodes,
            "rounds": self._rounds,
            "round_age_s": now_s - self._round_s,
            "problem": self._problem,
            "restarts": self.record.coordinator_starts - 1,
            "uptime_s": now_s - self._begun_s,
        }

    def _status_of(self, node: str, member: FleetMember, now_s: float) -> MemberStatus:
        state, since_s = self._states.get(node, ("starting", now_s))
        found: MemberStatus = {"node": node, "address": member.address, "state": state, "since_s": now_s - since_s}
        if state == "refused" and (refused := self._refused.get(node)):
            found |= {"error": str(refused[0]), "kind": str(refused[0].kind)}
        return found

    def _chosen(self, alive: list[RayNode]) -> dict[str, RayNode]:
        """Returns by address the Ray nodes that get a cache node, in the order in which new nodes are numbered.

        Of several Ray nodes with one address, only one is chosen: the one that has the cache node already.
        """
        kept = {member.ray_node_id for member in self.record.members.values()}
        matching = [node for node in alive if self._selector.matches(node)]
        chosen: dict[str, RayNode] = {}
        for node in sorted(matching, key=lambda node: (not node.is_head, node.address, node.ray_node_id not in kept, node.ray_node_id)):
            chosen.setdefault(node.address, node)
        return chosen

    def _admit(self, here: dict[str, RayNode]) -> None:
        """Add a member with a new node id for each new address."""
        known = {member.address for member in self.record.members.values()}
        for address in here:
            if address not in known:
                log.info("node-%d joins at %s", self.record.next_number, address)
                self._save(self.record.with_new_member(address))

    def _keep(self, node: str, ray_node: RayNode | None, present: set[str], reporting: set[str]) -> None:
        member, is_drained = self.record.members[node], node in self.record.drained
        if ray_node is None:
            if node in present:
                log.warning("%s is gone: no matching Ray node at %s is alive", node, member.address)
                self._platform.remove(node)
            if is_drained:
                self._drop(node)
            else:
                self._set(node, "lost")
        elif is_drained and member.ray_node_id == ray_node.ray_node_id:
            self._set(node, "draining" if node in present else "drained")
        elif node not in present or member.ray_node_id != ray_node.ray_node_id:
            self._start(node, ray_node, node in present)
        elif node in reporting:
            self._refused.pop(node, None)
            self._set(node, "serving")
        else:
            self._await(node)

    def _start(self, node: str, ray_node: RayNode, is_present: bool) -> None:
        if is_present:
            self._platform.remove(node)  # the actor of a Ray node that has ended and come back
        elif node in self._refused and self._clock.now_s() < self._refused[node][1]:
            self._set(node, "refused")
            return
        started = FleetMember(ray_node.address, ray_node.ray_node_id)
        self._save(self.record.with_drained(node, False).with_member(node, started))
        self._platform.start(node, ray_node, self.record)
        self._set(node, "starting", again=True)

    def _await(self, node: str) -> None:
        """Set the state of a node that has an actor but does not report: `refused`, `silent`, or still `starting`."""
        outcome = self._platform.outcome(node)
        if outcome is not None and outcome.error is not None:
            log.warning("%s cannot start: %s", node, outcome.error)
            self._refused[node] = outcome.error, self._clock.now_s() + RETRY_S
            self._platform.remove(node)
            self._set(node, "refused")
            return
        state, since_s = self._states.get(node, ("starting", self._clock.now_s()))
        if state != "starting" or self._clock.now_s() - since_s >= SILENT_AFTER_S:
            self._set(node, "silent")
        else:
            self._set(node, "starting")

    def _drop(self, node: str) -> None:
        """Remove the node from the fleet and from the coordinator's members."""
        self._save(self.record.without_member(node))
        self._states.pop(node, None)
        self._forget(node)

    def _set(self, node: str, state: str, *, again: bool = False) -> None:
        if again or self._states.get(node, ("",))[0] != state:
            self._states[node] = state, self._clock.now_s()

    def _save(self, record: FleetRecord) -> None:
        self._store.save(record.as_bytes())
        self.record = record
