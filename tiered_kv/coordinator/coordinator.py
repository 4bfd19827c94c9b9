"""The coordinator as plain Python: membership, directory, figures, and what the nodes' policies have counted.

Loses nothing that nodes cannot tell it again.
"""

import logging
import threading
from dataclasses import dataclass, field

from tiered_kv.clock import Clock
from tiered_kv.coordinator.directory import Directory
from tiered_kv.keys import BlockKey
from tiered_kv.policy.reuse import merge_statistics
from tiered_kv.protocol.probes import Probe, ProbeBook, Variants
from tiered_kv.protocol.reports import Answer, Report

log = logging.getLogger(__name__)

STATISTICS_BYTES_MAX = 1 << 20
LOST_MAX = 1024


@dataclass
class Member:
    """A node as the coordinator knows it."""

    info: dict
    number: int
    seen_s: float
    stats: dict = field(default_factory=dict)
    statistics: bytes | None = None


class Coordinator:
    """Knows the nodes and who holds what. A node silent for `node_timeout_s` is taken for gone until it speaks again.

    Thread-safe. All state is rebuilt from the nodes' reports after a restart.
    """

    def __init__(self, clock: Clock, node_timeout_s: float) -> None:
        self._clock = clock
        self._timeout_s = node_timeout_s
        self._members: dict[str, Member] = {}
        self._lost: dict[str, float] = {}  # nodes taken for gone, and when they were last heard of
        self._directory = Directory()
        self._lock = threading.Lock()
        self._probes = ProbeBook()

    def report(self, report: Report) -> Answer:
        """Take a node's heartbeat. Number 0 is a whole inventory and begins anew; after a gap one is asked for."""
        for root, variants in report.probes or ():
            self._probes.adopt(root, variants)
        is_teaching = report.statistics is not None and _are_statistics(report)
        answer = self._take(report, is_teaching)
        if not is_teaching or answer.resync:
            return answer
        with self._lock:
            others = [member.statistics for node, member in self._members.items() if node != report.node and member.statistics]
        return answer._replace(others=merge_statistics(others)) if others else answer

    def _take(self, report: Report, is_teaching: bool) -> Answer:
        with self._lock:
            self._drop_silent()
            member = self._members.get(report.node)
            now_s = self._clock.now_s()
            if report.number == 0:
                self._directory.add_node(report.node)
                known = member.statistics if member else None
                self._lost.pop(report.node, None)
                member = self._members[report.node] = Member(report.info, 0, now_s, statistics=known)
            elif member is None or report.number != member.number + 1:
                return Answer(self._peers(report.node), resync=True)
            member.number, member.seen_s = report.number, now_s
            member.info, member.stats = report.info, report.stats
            if is_teaching:
                member.statistics = report.statistics
            self._directory.update(report.node, report.added, report.removed)
            return Answer(self._peers(report.node), resync=False)

    def locate(self, asking: str, keys: list[BlockKey]) -> list[list[str]]:
        """For the leading `keys` that some other live node holds: which nodes do."""
        with self._lock:
            self._drop_silent()
            return self._directory.locate(keys, asking)

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        """The variants of a root, of which one is within the tolerance of `probe`; `known`: those that the asking node knows."""
        self._probes.adopt(root, known)
        self._probes.match(root, probe)
        return self._probes.variants(root)

    def nodes(self) -> list[dict]:
        """One record a live node: its info, figures, and the age of its last report in seconds."""
        with self._lock:
            self._drop_silent()
            now_s = self._clock.now_s()
            return [
                {
                    **member.info,
                    "node": node,
                    "silent_s": now_s - member.seen_s,
                    "directory_blocks": self._directory.count(node),
                    "stats": member.stats,
                }
                for node, member in sorted(self._members.items())
            ]

    def lost(self) -> dict[str, float]:
        """By node that was taken for gone and did not say goodbye: seconds since it was last heard of."""
        with self._lock:
            self._drop_silent()
            now_s = self._clock.now_s()
            return {node: now_s - seen_s for node, seen_s in sorted(self._lost.items())}

    def forget(self, node: str) -> None:
        """`node` says goodbye."""
        with self._lock:
            self._members.pop(node, None)
            self._lost.pop(node, None)
            self._directory.drop_node(node)

    def check(self) -> None:
        """Assert that directory and membership agree."""
        with self._lock:
            self._directory.check()

    def _peers(self, node: str) -> int:
        return len(self._members.keys() - {node})

    def _drop_silent(self) -> None:
        oldest_s = self._clock.now_s() - self._timeout_s
        for node in [node for node, member in self._members.items() if member.seen_s < oldest_s]:
            self._lost[node] = self._members.pop(node).seen_s
            self._directory.drop_node(node)
        while len(self._lost) > LOST_MAX:
            del self._lost[next(iter(self._lost))]


def _are_statistics(report: Report) -> bool:
    """Whether what the node calls its statistics can be added to others'."""
    try:
        if len(report.statistics) > STATISTICS_BYTES_MAX:
            raise ValueError(f"{len(report.statistics)} bytes are too many")
        merge_statistics([report.statistics])
    except (ValueError, TypeError) as error:
        log.warning("the statistics of node %s are not used: %s", report.node, error)
        return False
    return True
