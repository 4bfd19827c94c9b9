"""Sends the steps of a checkpoint to nodes. A cluster is called through Ray, the node of this process directly."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.checkpoints.steps import CheckpointRequest, StepAnswer
from tiered_kv.node.node import Node


class CallNodes(Protocol):
    """Sends a request to several nodes at once."""

    def __call__(self, nodes: Iterable[str], request: CheckpointRequest[StepAnswer]) -> dict[str, StepAnswer | TieredKVError]:
        """Returns each node's answer, or the error that it raised."""


def calls_to(node: Node) -> CallNodes:
    """Returns a function that calls the node of this process, whatever node names it is given."""

    def call(nodes: Iterable[str], request: CheckpointRequest[StepAnswer]) -> dict[str, StepAnswer | TieredKVError]:
        return {name: _attempted(lambda: node.checkpoint(request)) for name in nodes}

    return call


def _attempted(call: Callable[[], StepAnswer]) -> StepAnswer | TieredKVError:
    try:
        return call()
    except TieredKVError as error:
        return error


def call_all(call: CallNodes, nodes: Iterable[str], request: CheckpointRequest[StepAnswer]) -> dict[str, StepAnswer]:
    """Send a request to all nodes. Returns their answers. Raises the first error, with the name of its node."""
    return raise_on_error(call(nodes, request))


def raise_on_error(answers: Mapping[str, StepAnswer | TieredKVError]) -> dict[str, StepAnswer]:
    """Returns the answers by node. If one is an error, raises it with the name of its node; the first if there are several."""
    good: dict[str, StepAnswer] = {}
    for node, answer in answers.items():
        if isinstance(answer, TieredKVError):
            raise error_of(node, answer) from answer
        good[node] = answer
    if not answers:
        raise TieredKVError(Kind.CLUSTER, "the cluster has no nodes")
    return good


def error_of(node: str, error: TieredKVError) -> TieredKVError:
    """Returns the error with the name of its node."""
    return TieredKVError(error.kind, f"{node}: {error}", **{"node": node, **error.context})
