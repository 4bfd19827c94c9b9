"""Raises weight epochs (for new weights of a model), and purges namespaces (drops all their blocks), on all nodes of a cluster."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from tiered_kv.actors.names import NAMESPACE, coordinator_name
from tiered_kv.cluster import start
from tiered_kv.cluster.node_calls import calls_to
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.epochs import EVERY, Epoch
from tiered_kv.protocol.messages import NamespaceStats
from tiered_kv.protocol.peer_transport import Ask

PURGE_WITHIN_S = 60.0


class Change(NamedTuple):
    """The result of a new epoch or of a purge.

    `namespaces`: the namespaces that were changed, [] for all. `by_node`: each node's answer, or an error if it did not answer.
    `number`: the new epoch; 0 after a purge.
    """

    namespaces: list[NamespaceStats]
    by_node: dict[str, Any]
    number: int = 0

    @property
    def unreached(self) -> dict[str, str]:
        """The nodes that did not confirm the change, each with the reason."""
        return {node: str(answer) for node, answer in self.by_node.items() if isinstance(answer, TieredKVError)}


def new_epoch(name: str, wanted: Sequence[str], *, keep: bool) -> Change:
    """Raise the weight epoch of the namespaces that `wanted` names (see `chosen`), or of all namespaces if it is empty.

    `keep`: do not drop the blocks of the former epoch. This process must have joined the cluster's Ray. Raises (kind `cluster`), with
    nothing changed, if the coordinator does not answer. Raises (kind `config`) if a text in `wanted` names no namespace.
    """

    def raise_epoch(families: list[bytes]) -> tuple[list[Epoch], list[str]]:
        return _coordinator(name, lambda actor: actor.raise_epoch.remote(families, keep))

    return raise_on(nodes_of(name), calls_to(name), raise_epoch, wanted)


def raise_on(
    nodes: Sequence[str], ask: Ask, raise_epoch: Callable[[list[bytes]], tuple[list[Epoch], list[str]]], wanted: Sequence[str]
) -> Change:
    """Do the work of `new_epoch`.

    `nodes`: ids of known nodes. `ask`: calls methods of nodes. `raise_epoch`: a function that asks the coordinator to raise the
    epochs of model families, and returns the new epochs and the ids of the coordinator's nodes.
    """
    namespaces = chosen(known_namespaces(ask(nodes, "stats").values()), wanted) if wanted else []
    raised, listed = raise_epoch([bytes.fromhex(each["family"]) for each in namespaces] or [EVERY])
    answers = ask(sorted({*nodes, *listed}), "adopt_epochs", raised)
    return Change(namespaces, answers, raised[0].number)


def purge(name: str, wanted: Sequence[str]) -> Change:
    """Drop all blocks of the namespaces that `wanted` names, on all nodes. The epochs do not change. Raises what `new_epoch` raises."""
    return purge_on(nodes_of(name), calls_to(name, PURGE_WITHIN_S), wanted)


def purge_on(nodes: Sequence[str], ask: Ask, wanted: Sequence[str]) -> Change:
    """Do the work of `purge`.

    Nodes admit blocks of these namespaces again only after all answering nodes have dropped theirs. So no node gets a dropped block
    back from another node.
    """
    namespaces = chosen(known_namespaces(ask(nodes, "stats").values()), wanted)
    families = [bytes.fromhex(each["family"]) for each in namespaces]
    answers = ask(nodes, "purge", families)
    ask([node for node, answer in answers.items() if not isinstance(answer, TieredKVError)], "end_purge", families)
    return Change(namespaces, answers)


def nodes_of(name: str) -> list[str]:
    """Returns the ids of all nodes that Ray or the coordinator knows, lost nodes included."""
    about = start.describe(name)
    return sorted({*start.nodes_of(name), *(node["node"] for node in about["nodes"]), *about.get("lost", {})})


def known_namespaces(stats: Iterable[Any]) -> list[NamespaceStats]:
    """Returns the namespaces in the statistics of several nodes, without duplicates. Skips errors in place of statistics."""
    found = {each["family"]: each for node in stats if not isinstance(node, TieredKVError) for each in node["namespaces"]}
    return [found[family] for family in sorted(found)]


def chosen(namespaces: Sequence[NamespaceStats], wanted: Iterable[str]) -> list[NamespaceStats]:
    """Returns the namespaces that the texts in `wanted` name.

    A text names a namespace by its tenant, or by the start of its `weights` or of its family's digest.

    Raises (kind `config`) for a text that names no namespace.
    """
    found: dict[str, NamespaceStats] = {}
    for text in wanted:
        named = [each for each in namespaces if text and (text == each["tenant"] or each["weights"].startswith(text))]
        named += [each for each in namespaces if text and each["family"].startswith(text)]
        if not named:
            known = ", ".join(f"{each['weights'][:12]!r} of tenant {each['tenant']} ({each['family'][:12]})" for each in namespaces)
            raise TieredKVError(
                Kind.CONFIG, f"namespace: the cluster has no namespace named {text!r}; known are: {known or 'none'}", setting="namespace"
            )
        found |= {each["family"]: each for each in named}
    return list(found.values())


def _coordinator(name: str, call: Callable[[Any], Any]) -> Any:
    import ray

    try:
        return ray.get(call(ray.get_actor(coordinator_name(name), NAMESPACE)), timeout=start.ANSWER_WITHIN_S)
    except (ValueError, ray.exceptions.RayError) as error:
        message = f"the coordinator of cluster {name!r} does not answer ({type(error).__name__}), so nothing was changed"
        raise TieredKVError(Kind.CLUSTER, message, name=name) from error
