"""Sends checkpoint requests to nodes: through Ray to the nodes of a cluster, directly to the node of this process."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.checkpoints.steps import CheckpointRequest, StepAnswer

if TYPE_CHECKING:
    from tiered_kv.node.node import Node


class CallNodes(Protocol):
    """Sends a request to several nodes at once."""

    def __call__(self, nodes: Iterable[str], request: CheckpointRequest[StepAnswer]) -> dict[str, StepAnswer | TieredKVError]:
        """Send the request. Returns by node name the answer of each node, or the error that the node raised."""


def calls_to(node: "Node") -> CallNodes:
    """Returns a function that sends each request to `node`, which is in this process, under whatever node names it is given."""

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
    """Returns the answers by node. If any answer is an error, raises the first one, with the name of its node.

    Raises (kind `cluster`) if there are no answers.
    """
    good: dict[str, StepAnswer] = {}
    for node, answer in answers.items():
        if isinstance(answer, TieredKVError):
            raise error_of(node, answer) from answer
        good[node] = answer
    if not answers:
        raise TieredKVError(Kind.CLUSTER, "the cluster has no nodes")
    return good


def error_of(node: str, error: TieredKVError) -> TieredKVError:
    """Returns a copy of the error that names its node."""
    return TieredKVError(error.kind, f"{node}: {error}", **{"node": node, **error.context})
