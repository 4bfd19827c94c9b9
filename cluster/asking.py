"""Asking the node actors of a cluster, all at once."""

from collections.abc import Iterable
from typing import Any

from tiered_kv.actors.names import NAMESPACE, node_name
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.service.link import Ask

ANSWER_WITHIN_S = 10.0
RECEIVE_WITHIN_S = 30.0  # an answer that is there, and may be large


def asking(cluster: str, within_s: float = ANSWER_WITHIN_S) -> Ask:
    """How to ask the nodes of the cluster whose Ray this process has joined; each answers within so many seconds."""
    import ray

    def send(node: str, method: str, arguments: tuple) -> Any:
        try:
            return getattr(ray.get_actor(node_name(cluster, node), NAMESPACE), method).remote(*arguments)
        except (ValueError, ray.exceptions.RayError) as error:
            return TieredKVError(Kind.TRANSPORT, f"it is not there ({type(error).__name__})", node=node)

    def receive(sent: Any, is_ready: bool) -> Any:
        if isinstance(sent, TieredKVError):
            return sent
        try:
            return ray.get(sent, timeout=RECEIVE_WITHIN_S if is_ready else 0)
        except ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, TieredKVError) else TieredKVError(Kind.TRANSPORT, f"it failed: {error.cause!r}")
        except ray.exceptions.RayError as error:
            return TieredKVError(Kind.TRANSPORT, f"it does not answer ({type(error).__name__})")

    def ask(nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
        sent = {node: send(node, method, arguments) for node in nodes}
        under_way = [each for each in sent.values() if not isinstance(each, TieredKVError)]
        ready = ray.wait(under_way, num_returns=len(under_way), timeout=within_s)[0] if under_way else []
        return {node: receive(each, each in ready) for node, each in sent.items()}

    return ask
