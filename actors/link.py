"""A node's link to the rest of its cluster through Ray: small calls to actors, blocks through the object store.

While Ray's control store does not answer, `get_actor` and `.remote()` may block for an unlimited time. So these calls run on threads
of the link, and callers wait for the answer only for a limited time. Hanging calls do not accumulate: each called actor has few
threads, and a call that finds no free thread in time is cancelled.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError

from tiered_kv.actors.names import NAMESPACE, coordinator_name, node_name
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.explanation import GoneRecord
from tiered_kv.protocol.messages import NO_PEERS, PeerStats
from tiered_kv.protocol.peer_transport import HUNG_AFTER_S, FramePieces, Holders, Receiver
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Answer, Report
from tiered_kv.threads import DaemonThreads

CONTROL_WAIT_S = 2.0
PROBE_WAIT_S = 0.5  # less than the second that a worker waits for the node's answer to a probe
LOCATES_AT_ONCE = 4
TELL_AGAIN_S = 0.2  # pause before a failed call to a node is repeated: Ray may be restarting the node
READY_WAIT_S = 0.05  # for an answer that Ray has reported as ready

R = TypeVar("R")


class RayLink:
    """Finds the coordinator and the other nodes by their actors' names. After a failed call, the next call looks the actor up again."""

    def __init__(self, cluster: str, node_id: str) -> None:
        self._coordinator = coordinator_name(cluster)
        self._cluster = cluster
        self._node_id = node_id
        self._handles: dict[str, Any] = {}
        self._reporting = DaemonThreads(1, "tkv-link")
        self._locating = DaemonThreads(LOCATES_AT_ONCE, "tkv-link")
        self._requesting: dict[str, DaemonThreads] = {}
        self._unanswered: ray.ObjectRef | None = None  # a report that the coordinator has not answered yet

    def report(self, report: Report) -> Answer:
        return _within(CONTROL_WAIT_S, self._coordinator, self._reporting.submit(self._reported, report))

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        wait_s = min(wait_s, CONTROL_WAIT_S)
        call = partial(self._ask, lambda actor: actor.locate.remote(self._node_id, keys), wait_s)
        return _within(wait_s, self._coordinator, self._locating.submit(call))

    def holders(self, keys: list[BlockKey], wait_s: float) -> Holders:
        wait_s = min(wait_s, CONTROL_WAIT_S)
        call = partial(self._ask, lambda actor: actor.holders.remote(self._node_id, keys), wait_s)
        return _within(wait_s, self._coordinator, self._locating.submit(call))

    def recall(self, nodes: Sequence[str], keys: list[BlockKey], wait_s: float) -> dict[str, dict[BlockKey, GoneRecord]]:
        until_s = time.monotonic() + wait_s
        names = {node: node_name(self._cluster, node) for node in nodes}
        sent = {node: self._threads(name).submit(partial(self._send_recall, name, keys)) for node, name in names.items()}
        found: dict[str, dict[BlockKey, GoneRecord]] = {}
        for node, call in sent.items():
            with suppress(TieredKVError, RayError):
                reference = _within(max(until_s - time.monotonic(), 0), names[node], call)
                found[node] = ray.get(reference, timeout=max(until_s - time.monotonic(), 0))
        return found

    def _send_recall(self, name: str, keys: list[BlockKey]) -> "ray.ObjectRef":
        return self._actor(name).recall.remote(keys)

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        call = partial(self._ask, lambda actor: actor.probe.remote(root, known, probe), PROBE_WAIT_S)
        return _within(PROBE_WAIT_S, self._coordinator, self._locating.submit(call))

    def raise_epoch(self, families: list[bytes], keep: bool) -> tuple[list[Epoch], list[str]]:
        call = partial(self._ask, lambda actor: actor.raise_epoch.remote(families, keep), CONTROL_WAIT_S)
        return _within(CONTROL_WAIT_S, self._coordinator, self._locating.submit(call))

    def spread(self, nodes: Sequence[str], epochs: Sequence[Epoch], within_s: float) -> list[str]:
        until_s = time.monotonic() + within_s
        waiting = list(nodes)
        while waiting:
            names = {node: node_name(self._cluster, node) for node in waiting}
            sent = {node: self._threads(name).submit(self._told, name, list(epochs)) for node, name in names.items()}
            waiting = [node for node, call in sent.items() if not self._is_confirmed(names[node], call, until_s)]
            if time.monotonic() + TELL_AGAIN_S >= until_s:
                break
            time.sleep(TELL_AGAIN_S if waiting else 0)
        return waiting

    def _told(self, name: str, epochs: list[Epoch]) -> "ray.ObjectRef":
        return self._actor(name).adopt_epochs.remote(epochs)

    def _is_confirmed(self, name: str, sent: "Future[ray.ObjectRef]", until_s: float) -> bool:
        """Returns whether a node has confirmed that it uses the weight epochs sent to it. Waits for that until `until_s` at most."""
        try:
            reference = _within(max(until_s - time.monotonic(), 0), name, sent)
            ray.get(reference, timeout=max(until_s - time.monotonic(), 0))
        except (TieredKVError, RayError):
            self._handles.pop(name, None)
            return False
        return True

    def _threads(self, name: str) -> DaemonThreads:
        return self._requesting.setdefault(name, DaemonThreads(1, "tkv-link"))

    def request(self, node: str, keys: list[BlockKey]) -> "RayTransfer":
        name = node_name(self._cluster, node)
        sent = self._threads(name).submit(lambda: self._actor(name).serve.remote(keys))
        return RayTransfer(keys, sent, lambda: self._handles.pop(name, None))

    def streams_from(self, node: str) -> bool:
        return False

    def stats(self) -> PeerStats:
        return NO_PEERS

    # On the link's threads

    def _reported(self, report: Report) -> Answer:
        """Send a report, and return the coordinator's answer.

        Raises (kind `transport`) without sending it if the coordinator has not answered the former report yet. That report is still
        in the coordinator's queue.
        """
        if self._unanswered is not None and not ray.wait([self._unanswered], timeout=CONTROL_WAIT_S)[0]:
            raise _silent(self._coordinator, "it has not answered an earlier report yet")

        def send(actor: Any) -> Any:
            self._unanswered = actor.report.remote(report)
            return self._unanswered

        answer = self._ask(send, CONTROL_WAIT_S)
        self._unanswered = None
        return answer

    def _ask(self, send: Callable[[Any], ray.ObjectRef], wait_s: float) -> Any:
        try:
            return ray.get(send(self._actor(self._coordinator)), timeout=wait_s)
        except RayError as error:
            if not isinstance(error, GetTimeoutError):
                self._handles.pop(self._coordinator, None)
            raise _silent(self._coordinator, type(error).__name__) from error

    def _actor(self, name: str) -> Any:
        if name not in self._handles:
            try:
                self._handles[name] = ray.get_actor(name, NAMESPACE)
            except (ValueError, RayError) as error:
                raise TieredKVError(Kind.TRANSPORT, f"no actor is named {name}: {error}", actor=name) from error
        return self._handles[name]


class RayTransfer:
    """A transfer of frames through Ray's object store. First the peer answers with a reference to an object, then the object is fetched.

    `sent`: the call to the peer, which runs on a thread of the link. `on_failure` is called if the peer's actor fails.
    """

    def __init__(self, keys: list[BlockKey], sent: "Future[ray.ObjectRef]", on_failure: Callable[[], object]) -> None:
        self._keys = keys
        self._sent = sent
        self._on_failure = on_failure
        self._objects: list[ray.ObjectRef] | None = None

    def prefetch(self) -> None:
        is_sent = self._sent.done() and self._sent.exception() is None
        if self._objects is None and is_sent and ray.wait([self._sent.result()], timeout=0)[0]:
            self._objects = self._get(self._sent.result(), READY_WAIT_S)
            if self._objects:
                ray.wait(self._objects, timeout=0, fetch_local=True)

    def deliver(self, receiver: Receiver, wait_s: float, patience_s: float, meanwhile: Callable[[], None]) -> int:
        meanwhile()
        frames = self.frames(wait_s)
        meanwhile()
        return receiver.take(self._keys[: len(frames)], frames)

    def frames(self, wait_s: float) -> list[FramePieces]:
        """Returns the frames of the leading requested keys that the peer has; [] if it lacks the first. Waits at most `wait_s`."""
        deadline_s = time.monotonic() + wait_s
        if self._objects is None:
            hung = wait_s >= HUNG_AFTER_S
            served = _within(wait_s, "a peer", self._sent, hung=hung)
            self._objects = self._get(served, max(deadline_s - time.monotonic(), 0), hung=hung)
        return self._get(self._objects[0], max(deadline_s - time.monotonic(), 0)) if self._objects else []

    def _get(self, reference: ray.ObjectRef, wait_s: float, *, hung: bool = False) -> Any:
        try:
            return ray.get(reference, timeout=wait_s)
        except GetTimeoutError as error:
            raise TieredKVError(Kind.TRANSPORT, f"no blocks from the peer within {wait_s:.2f} s", hung=hung) from error
        except RayError as error:
            self._on_failure()
            raise TieredKVError(Kind.TRANSPORT, f"the call to the peer failed: {type(error).__name__}") from error


def _within(wait_s: float, whom: str, call: Future[R], **context: object) -> R:
    """Returns the result of a call that runs on a thread of the link.

    Raises what the call raised, or an error (kind `transport`, with `context`) if the call takes longer than `wait_s`.
    """
    try:
        return call.result(wait_s)
    except TimeoutError as error:
        call.cancel()
        raise _silent(whom, f"no answer within {wait_s:.2f} s", **context) from error


def _silent(whom: str, why: str, **context: object) -> TieredKVError:
    return TieredKVError(Kind.TRANSPORT, f"{whom} does not answer: {why}", actor=whom, **context)
