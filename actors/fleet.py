"""The keeper's access to Ray: Ray nodes, the actors of cache nodes, and Ray's key-value store for the fleet's record.

The key-value store is part of Ray's control store, as the list of detached actors is. So the record exists exactly as long as the
actors that it describes.
"""

from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tiered_kv.actors.names import NAMESPACE, node_name
from tiered_kv.config import Config
from tiered_kv.coordinator.keeper import Outcome
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.fleet import FleetRecord, RayNode

HEAD_RESOURCE = "node:__internal_head__"
_GET_WITHIN_S = 5.0  # for an answer that Ray has reported as ready


def _ray_node(node: dict[str, Any]) -> RayNode:
    resources = node["Resources"]
    return RayNode(node["NodeID"], node["NodeManagerAddress"], HEAD_RESOURCE in resources, node.get("Labels") or {}, resources)


def nodes_of(cluster: str) -> list[str]:
    """Returns the sorted ids of a cluster's cache nodes whose actors in Ray have not ended."""
    prefix = node_name(cluster, "")
    names = [actor["name"] for actor in list_named_actors(all_namespaces=True) if actor["namespace"] == NAMESPACE]
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def end_actor(name: str) -> None:
    """End a named actor, so that Ray does not restart it. Does nothing if there is no such actor."""
    with suppress(ValueError):
        ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)


class RayPlatform:
    """Carries out a keeper's actions with Ray (implements `Platform`)."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._asked: dict[str, ray.ObjectRef] = {}

    def ray_nodes(self) -> list[RayNode]:
        return [_ray_node(node) for node in ray.nodes() if node["Alive"]]

    def present(self) -> set[str]:
        return set(nodes_of(self._cluster))

    def start(self, node: str, ray_node: RayNode, record: FleetRecord) -> None:
        from tiered_kv.actors.node import NodeActor

        self._asked.pop(node, None)
        options = {
            "name": node_name(self._cluster, node),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "scheduling_strategy": NodeAffinitySchedulingStrategy(ray_node.ray_node_id, soft=False),
        }
        config = Config.of(record.settings)
        try:
            NodeActor.options(**options).remote(self._cluster, record.cluster_id, node, config, record.mounted_bytes, record.secret)
        except (ValueError, RayError) as error:  # ValueError: the former actor of this name has not ended yet
            raise TieredKVError(Kind.CLUSTER, f"{node} was not started: {error}", node=node) from error

    def outcome(self, node: str) -> Outcome | None:
        try:
            if node not in self._asked:
                self._asked[node] = ray.get_actor(node_name(self._cluster, node), NAMESPACE).info.remote()
            if not ray.wait([self._asked[node]], timeout=0)[0]:
                return None
            ray.get(self._asked.pop(node), timeout=_GET_WITHIN_S)
            return Outcome()
        except ray.exceptions.RayTaskError as error:
            return Outcome(error.cause) if isinstance(error.cause, TieredKVError) else None
        except (ValueError, RayError):  # it has ended, or Ray is restarting it
            return None

    def remove(self, node: str) -> None:
        self._asked.pop(node, None)
        end_actor(node_name(self._cluster, node))


class RayRecordStore:
    """Keeps a fleet's record in Ray's key-value store (implements `RecordStore`)."""

    def __init__(self, cluster: str) -> None:
        self._key = f"fleet:{cluster}"

    def load(self) -> bytes | None:
        try:
            return internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
        except (RuntimeError, RayError) as error:
            raise _silent(error) from error

    def save(self, data: bytes) -> None:
        try:
            internal_kv._internal_kv_put(self._key, data, overwrite=True, namespace=NAMESPACE)
        except (RuntimeError, RayError) as error:
            raise _silent(error) from error

    def delete(self) -> None:
        """Remove the record, if there is one."""
        try:
            internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)
        except (RuntimeError, RayError) as error:
            raise _silent(error) from error


def _silent(error: Exception) -> TieredKVError:
    return TieredKVError(Kind.CLUSTER, f"Ray's key-value store does not answer: {error}")
