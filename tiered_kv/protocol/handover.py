"""The messages of a node that is about to end: the blocks that it hands over, and how many it kept or lost."""

from typing import Any, NamedTuple

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.messages import BlockRun

ModelMessages = dict[BlockKey, dict[str, Any]]
"""By root, the description of a model (`ModelInfo.as_message`)."""


class Inventory(NamedTuple):
    """The blocks of a node, the most valuable first, and the descriptions of their models."""

    runs: list[BlockRun]
    models: ModelMessages


class EndReport(NamedTuple):
    """How many of a node's blocks were kept or lost when it closed.

    kept: blocks on a disk whose folder stays. flushed: kept blocks that were written to disk only at the end. lost: blocks that are
    gone. `error`: why closing the node failed, empty if it did not.
    """

    node: str
    kept: int = 0
    kept_bytes: int = 0
    flushed: int = 0
    flushed_bytes: int = 0
    lost: int = 0
    lost_bytes: int = 0
    error: str = ""
