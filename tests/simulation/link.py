"""A node's link in a simulation: calls that arrive late, twice or not at all, and transfers of frames that may be damaged.

As with Ray, a call runs in the called process, and may run although its caller no longer waits. A report is sent only when the
one before it was answered or has failed.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tests.simulation.scheduler import Process, Task
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.messages import NO_PEERS, PeerStats
from tiered_kv.protocol.peer_transport import HUNG_AFTER_S, FramePieces, Receiver
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report

if TYPE_CHECKING:
    from tests.simulation.cluster import Cluster

CONTROL_WAIT_S = 2.0
LOST_AFTER_S = 3.0
"""A lost call fails this long after it was sent, as when a connection is given up."""


class Network:
    """The present faults of the network between the machines."""

    def __init__(self) -> None:
        self.delay_s_max = 0.002
        self.lost_share = 0.0
        self.twice_share = 0.0
        self.damaged_share = 0.0
        self.misdirected_share = 0.0
        """The share of transfers in which two frames change places."""
        self.cut: set[frozenset[str]] = set()
        """Pairs of processes that cannot reach each other."""


class Call:
    """A call to another process that has not been answered yet."""

    def __init__(self, cluster: "Cluster", caller: Process, target: str, run: Callable[[], Any]) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self._caller = caller
        self._target = target
        self._waiting: list[Task] = []
        self.is_done = False
        self.result: Any = None
        self.error: Exception | None = None
        self._send(run)

    def _send(self, run: Callable[[], Any]) -> None:
        world, network = self._world, self._cluster.network
        world.pause()
        world.after(LOST_AFTER_S, lambda: self._finish(None, _silent(self._target, "the call was lost")))
        delay_s = world.random.random() * network.delay_s_max
        if self._is_lost():
            return
        world.after(delay_s, lambda: self._arrive(run, answers=True))
        if network.twice_share and world.random.random() < network.twice_share:
            world.after(delay_s + world.random.random() * 3.0, lambda: self._arrive(run, answers=False))

    def _is_lost(self) -> bool:
        network = self._cluster.network
        if frozenset((self._caller.name, self._target)) in network.cut:
            return True
        return bool(network.lost_share) and self._world.random.random() < network.lost_share

    def _arrive(self, run: Callable[[], Any], answers: bool) -> None:
        process = self._cluster.processes.get(self._target)
        if process is None or not process.is_alive:
            if answers:
                self._finish(None, _silent(self._target, "it has ended"))
            return

        def serve() -> None:
            result, error = None, None
            try:
                result = run()
            except TieredKVError as raised:
                error = raised
            if answers and not self._is_lost():
                delay_s = self._world.random.random() * self._cluster.network.delay_s_max
                self._world.after(delay_s, lambda: self._finish(result, error))

        if answers:
            process.on_crash.append(lambda: self._finish(None, _silent(self._target, "it crashed")))
        self._world.spawn(process, "call", serve)

    def _finish(self, result: Any, error: Exception | None) -> None:
        if not self.is_done:
            self.is_done, self.result, self.error = True, result, error
            self._world.wake(self._waiting)

    def wait(self, wait_s: float) -> bool:
        """Wait until the call has ended. Returns whether it has."""
        if not self.is_done:
            self._world.wait(self._waiting, wait_s)
        return self.is_done

    def outcome(self, wait_s: float, **context: Any) -> Any:
        """Returns the result. Raises the call's error, or (kind `transport`, with `context`) if it takes longer than `wait_s`."""
        if not self.wait(wait_s):
            raise _silent(self._target, f"no answer within {wait_s:.2f} s", **context)
        if self.error is not None:
            raise self.error
        return self.result


class SimulatedLink:
    """Does the same as `actors.link.RayLink`, over the simulated network."""

    def __init__(self, cluster: "Cluster", process: Process) -> None:
        self._cluster = cluster
        self._process = process
        self._unanswered: Call | None = None

    def report(self, report: Report) -> Answer:
        if self._unanswered is not None and not self._unanswered.wait(CONTROL_WAIT_S):
            raise _silent("coordinator", "it has not answered an earlier report yet")
        self._unanswered = self._call("coordinator", lambda: self._reported(report))
        answer: Answer = self._unanswered.outcome(CONTROL_WAIT_S)
        return answer

    def _reported(self, report: Report) -> Answer:
        return self._cluster.coordinator.report(report)._replace(directory=self._cluster.lookups_at)

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        call = self._call("coordinator", lambda: self._cluster.coordinator.locate(self._process.name, keys))
        found: list[list[str]] = call.outcome(min(wait_s, CONTROL_WAIT_S))
        return found

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        variants: Variants = self._call("coordinator", lambda: self._cluster.coordinator.probe(root, known, probe)).outcome(0.5)
        return variants

    def request(self, node: str, keys: list[BlockKey]) -> "SimulatedTransfer":
        def serve() -> list[list[bytes]]:
            if node not in self._cluster.nodes:
                raise _silent(node, "it is starting or ending")
            with self._cluster.nodes[node].serving(keys) as frames:
                copies = []
                for pieces in frames:
                    self._cluster.world.pause()
                    copies.append([bytes(piece) for piece in pieces])
                return self._cluster.damaged(copies)

        return SimulatedTransfer(keys, self._call(node, serve))

    def streams_from(self, node: str) -> bool:
        return False

    def stats(self) -> PeerStats:
        return NO_PEERS

    def _call(self, target: str, run: Callable[[], Any]) -> Call:
        return Call(self._cluster, self._process, target, run)


class SimulatedTransfer:
    """A transfer of frames from a peer."""

    def __init__(self, keys: list[BlockKey], call: Call) -> None:
        self._keys = keys
        self._call = call

    def prefetch(self) -> None:
        """Does nothing, because all frames arrive with the answer."""

    def deliver(self, receiver: Receiver, wait_s: float, patience_s: float, meanwhile: Callable[[], None]) -> int:
        meanwhile()
        frames: Sequence[FramePieces] = self._call.outcome(wait_s, hung=wait_s >= HUNG_AFTER_S)
        meanwhile()
        return receiver.take(self._keys[: len(frames)], list(frames))


def _silent(whom: str, why: str, **context: Any) -> TieredKVError:
    return TieredKVError(Kind.TRANSPORT, f"{whom} does not answer: {why}", actor=whom, **context)
