"""The link of a node to the rest of its cluster, through Ray: small calls to actors, blocks through the object store."""

from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from tiered_kv.actors.names import NAMESPACE, coordinator_name, node_name
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.service.coordinator import Answer, Report
from tiered_kv.service.link import FramePieces
from tiered_kv.service.probes import Probe, Variants

CONTROL_WAIT_S = 2.0


class RayLink:
    """Finds the coordinator and the peers by name; a handle that failed is looked up again the next time."""

    def __init__(self, cluster: str, node_id: str) -> None:
        self._cluster = cluster
        self._node_id = node_id
        self._handles: dict[str, Any] = {}

    def report(self, report: Report) -> Answer:
        return self._ask(coordinator_name(self._cluster), lambda actor: actor.report.remote(report))

    def locate(self, keys: list[BlockKey]) -> list[list[str]]:
        return self._ask(coordinator_name(self._cluster), lambda actor: actor.locate.remote(self._node_id, keys))

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        return self._ask(coordinator_name(self._cluster), lambda actor: actor.probe.remote(root, known, probe))

    def request(self, node: str, keys: list[BlockKey]) -> "RayTransfer":
        name = node_name(self._cluster, node)
        return RayTransfer(self._actor(name).serve.remote(keys), lambda: self._handles.pop(name, None))

    def _actor(self, name: str) -> Any:
        if name not in self._handles:
            try:
                self._handles[name] = ray.get_actor(name, NAMESPACE)
            except (ValueError, RayError) as error:
                raise TieredKVError(Kind.TRANSPORT, f"there is no actor {name}: {error}", actor=name) from error
        return self._handles[name]

    def _ask(self, name: str, call: Callable[[Any], ray.ObjectRef]) -> Any:
        try:
            return ray.get(call(self._actor(name)), timeout=CONTROL_WAIT_S)
        except RayError as error:
            self._handles.pop(name, None)
            raise TieredKVError(Kind.TRANSPORT, f"{name} does not answer: {type(error).__name__}", actor=name) from error


class RayTransfer:
    """Frames on their way through Ray's object store: first the peer's answer, which names an object, then the object."""

    def __init__(self, served: ray.ObjectRef, on_failure: Callable[[], object]) -> None:
        self._served = served
        self._on_failure = on_failure
        self._objects: list[ray.ObjectRef] | None = None

    def prefetch(self) -> None:
        if self._objects is None and ray.wait([self._served], timeout=0)[0]:
            self._objects = self._get(self._served, 1.0)
            if self._objects:
                ray.wait(self._objects, timeout=0, fetch_local=True)

    def frames(self, wait_s: float) -> list[FramePieces]:
        if self._objects is None:
            self._objects = self._get(self._served, wait_s)
        return self._get(self._objects[0], wait_s) if self._objects else []

    def _get(self, reference: ray.ObjectRef, wait_s: float) -> Any:
        try:
            return ray.get(reference, timeout=wait_s)
        except GetTimeoutError as error:
            raise TieredKVError(Kind.TRANSPORT, f"a peer's blocks did not come within {wait_s:.2f} s") from error
        except RayError as error:
            self._on_failure()
            raise TieredKVError(Kind.TRANSPORT, f"a peer went away: {type(error).__name__}") from error
