"""A node's answer to a worker that asks where blocks are, or why they are gone."""

from typing import Any, TypedDict

KEYS_MAX = 1 << 16
"""The most blocks of one question."""
NAMESPACES_MAX = 16
"""The most namespaces of one answer."""


class GoneRecord(TypedDict):
    """A block that a node no longer has, or that it refused.

    `tier`: the tier of its last copy, None if it never had one. `cause`: the name of a `GoneCause`. `uses`: how often it was used,
    its store included; at most 255. `standing`: if an eviction policy chose the block, its value as a share of the lowest value that
    stayed; None if it is not known.
    """

    node: str
    tier: str | None
    cause: str
    age_s: float
    uses: int
    standing: float | None


class Whereabouts(TypedDict):
    """One block: the tier in which the asked node has it, the other nodes that have it, or why it is gone.

    `silent`: the nodes that had the block when they last reported, and that do not answer now.
    """

    tier: str | None
    nodes: list[str]
    silent: list[str]
    gone: GoneRecord | None


class Explanation(TypedDict):
    """A node's answer. `blocks`: one entry for each key of the question, in the same order.

    `recorded_s`: for how many seconds back the node has recorded every block that went. `directory`: False if the coordinator did not
    answer, so that nothing is known of other nodes.
    """

    node: str
    blocks: list[Whereabouts]
    recorded_s: float
    directory: bool


class KnownNamespace(TypedDict):
    """A namespace that a node knows, as its workers described it: `ModelInfo.as_message`."""

    layout: dict[str, Any]
    weights: str
    rope: bytes | None
    rope_halves: bool
    namespace: dict[str, Any]
