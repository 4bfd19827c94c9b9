"""What a node reports to the coordinator with each heartbeat, and what it hears back."""

from typing import NamedTuple

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.probes import Variants


class Report(NamedTuple):
    """What a node tells with a heartbeat. `number` counts the node's reports; a gap means that one was lost.

    `statistics`: what its policy has counted, now and then; None in between, and of a policy that learns nothing. `probes`: those
    that it knows, with number 0.
    """

    node: str
    number: int
    added: list[BlockKey]
    removed: list[BlockKey]
    info: dict
    stats: dict
    statistics: bytes | None = None
    probes: list[tuple[BlockKey, Variants]] | None = None


class Answer(NamedTuple):
    """What the node hears: how many other nodes live, and whether it must send its whole inventory.

    `others`: to a node that told its statistics the sum of the others'; None where no other has told any yet.
    """

    peers: int
    resync: bool
    others: bytes | None = None
