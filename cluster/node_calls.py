"""Calls a method on several node actors of a cluster in parallel, through Ray."""

from collections.abc import Iterable
from typing import Any

from tiered_kv.actors.names import NAMESPACE, node_name
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.peer_transport import Ask

ANSWER_WITHIN_S = 10.0
RECEIVE_WITHIN_S = 30.0  # for copying an answer that is ready, which may be large


def calls_to(cluster: str, within_s: float = ANSWER_WITHIN_S) -> Ask:
    """Returns a function that calls a method on several nodes at once. This process must have joined the cluster's Ray.

    The function returns a dict with the answer of each node. For a node that fails, or does not answer within `within_s`
    seconds, the dict has a `TieredKVError` instead of an answer. The function itself never raises it.
    """
    import ray

    def send(node: str, method: str, arguments: tuple) -> Any:
        try:
            return getattr(ray.get_actor(node_name(cluster, node), NAMESPACE), method).remote(*arguments)
        except (ValueError, ray.exceptions.RayError) as error:
            return TieredKVError(Kind.TRANSPORT, f"the node's actor was not found ({type(error).__name__})", node=node)

    def receive(sent: Any, is_ready: bool) -> Any:
        if isinstance(sent, TieredKVError):
            return sent
        try:
            return ray.get(sent, timeout=RECEIVE_WITHIN_S if is_ready else 0)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            return cause if isinstance(cause, TieredKVError) else TieredKVError(Kind.TRANSPORT, f"the node failed: {cause!r}")
        except ray.exceptions.RayError as error:
            return TieredKVError(Kind.TRANSPORT, f"the node did not answer ({type(error).__name__})")

    def ask(nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
        sent = {node: send(node, method, arguments) for node in nodes}
        under_way = [each for each in sent.values() if not isinstance(each, TieredKVError)]
        ready = ray.wait(under_way, num_returns=len(under_way), timeout=within_s)[0] if under_way else []
        return {node: receive(each, each in ready) for node, each in sent.items()}

    return ask
