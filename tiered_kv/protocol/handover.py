"""The messages of a node that is about to end: the blocks that it hands over, and what became of its blocks."""

from typing import Any, NamedTuple

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.messages import BlockRun

ModelMessages = dict[BlockKey, dict[str, Any]]
"""By root, the description of a model (`ModelFacts.as_message`)."""


class Inventory(NamedTuple):
    """The blocks of a node, the most worth keeping first, and the descriptions of their models."""

    runs: list[BlockRun]
    models: ModelMessages


class EndReport(NamedTuple):
    """What became of a node's blocks when it closed.

    kept: blocks on a disk whose folder stays. flushed: those of them that were written at the end. lost: blocks that are gone. `error`:
    why the node could not be closed in order, or empty.
    """

    node: str
    kept: int = 0
    kept_bytes: int = 0
    flushed: int = 0
    flushed_bytes: int = 0
    lost: int = 0
    lost_bytes: int = 0
    error: str = ""
