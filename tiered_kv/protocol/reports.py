"""A node's report to the coordinator, sent with each heartbeat, and the coordinator's answer."""

from typing import NamedTuple

from tiered_kv.keys import BlockKey
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.messages import NodeInfo, NodeStats
from tiered_kv.protocol.probes import Variants


class Report(NamedTuple):
    """A node's report. `number` counts the node's reports; a gap means that one was lost. Number 0 lists all blocks of the node.

    `added`, `removed`: blocks added and removed since the report before. `statistics`: the counts of the node's eviction policy, sent
    now and then; None in other reports, and in all if the policy does not learn. `probes`: the node's probes, with number 0 only.
    `epochs`: the weight epochs that the node knows.
    """

    node: str
    number: int
    added: list[BlockKey]
    removed: list[BlockKey]
    info: NodeInfo
    stats: NodeStats
    statistics: bytes | None = None
    probes: list[tuple[BlockKey, Variants]] | None = None
    epochs: list[Epoch] | None = None


class Answer(NamedTuple):
    """The coordinator's answer. `peers`: the number of other live nodes. `resync`: the node must report all its blocks, with number 0.

    `epochs`: the weight epochs that the cluster knows, None if they equal those of the report.
    `others`: the sum of the other nodes' statistics, for a node that has just sent its own; None if no other node has sent any.
    `addresses`: the address of each node's streams; None if no address has changed since the coordinator's last answer. `directory`:
    the address for look-ups without Ray, as "HOST:PORT"; None if the coordinator has none.
    """

    peers: int
    resync: bool
    others: bytes | None = None
    epochs: list[Epoch] | None = None
    addresses: dict[str, str] | None = None
    directory: str | None = None
