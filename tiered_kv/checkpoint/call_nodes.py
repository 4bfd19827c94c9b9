"""Calls of checkpoint steps on nodes. A cluster is called through Ray, the node of this process directly."""

from collections.abc import Callable, Iterable
from typing import Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.node import Node
from tiered_kv.protocol.peer_transport import Ask


def asking_here(node: Node) -> Ask:
    """Returns a function that calls the node of this process, whatever node names it is given."""

    def ask(nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
        return {name: _attempted(lambda: node.checkpoint(method, *arguments)) for name in nodes}

    return ask


def _attempted(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TieredKVError as error:
        return error


def answers(ask: Ask, nodes: Iterable[str], method: str, *arguments: Any) -> dict[str, Any]:
    """Call a method on all nodes. Returns their answers. Raises the first error, with the name of its node."""
    return good(ask(nodes, method, *arguments))


def good(found: dict[str, Any]) -> dict[str, Any]:
    """Returns the answers if none is an error, else raises the first error with the name of its node."""
    for node, answer in found.items():
        if isinstance(answer, TieredKVError):
            raise TieredKVError(answer.kind, f"{node}: {answer}", **{"node": node, **answer.context}) from answer
    if not found:
        raise TieredKVError(Kind.CLUSTER, "the cluster has no nodes")
    return found
