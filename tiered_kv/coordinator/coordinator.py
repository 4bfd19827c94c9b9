"""The coordinator as plain Python: membership, directory of blocks, figures, and the statistics of the nodes' policies.

After a restart it rebuilds all of them from the nodes' reports.
"""

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from tiered_kv.clock import Clock
from tiered_kv.coordinator.directory import Directory
from tiered_kv.keys import BlockKey
from tiered_kv.policy.reuse import merge_statistics
from tiered_kv.protocol.epochs import Epoch, EpochBook
from tiered_kv.protocol.messages import LiveNode, NodeInfo, NodeStats
from tiered_kv.protocol.peer_transport import Holders
from tiered_kv.protocol.probes import Probe, ProbeBook, Variants
from tiered_kv.protocol.reports import Answer, Report

log = logging.getLogger(__name__)

STATISTICS_BYTES_MAX = 1 << 20
LOST_MAX = 1024
KEYS_AT_ONCE = 2000
"""The most keys of a report that are entered in the directory while the lock is held once. This takes some milliseconds."""


@dataclass
class Member:
    """A live node. `number`: the number of its last report. `seen_s`: when that report arrived.

    `statistics`: the last policy statistics that the node sent, if any. `told`: the version of the list of addresses that was
    last sent to the node.
    """

    info: NodeInfo
    stats: NodeStats
    number: int
    seen_s: float
    statistics: bytes | None = None
    told: int = -1


class Coordinator:
    """Tracks the live nodes and the blocks that each holds. Thread-safe.

    A node that sends no report for `node_timeout_s` is treated as lost until its next report. After a restart, all state is rebuilt
    from the nodes' reports.
    """

    def __init__(self, clock: Clock, node_timeout_s: float) -> None:
        self._clock = clock
        self._timeout_s = node_timeout_s
        self._members: dict[str, Member] = {}
        self._lost: dict[str, float] = {}  # by lost node: the time of its last report
        self._directory = Directory()
        self._lock = threading.Lock()
        self._probes = ProbeBook()
        self._epochs = EpochBook()
        self._addresses: dict[str, str] = {}  # by live node: the address of its streams
        self._addresses_version = 0

    def report(self, report: Report) -> Answer:
        """Process a node's report. Returns the answer to it.

        Report 0 lists all blocks of the node and replaces what was known of the node. After a gap in the numbers, the answer requests
        a report 0.
        """
        for root, variants in report.probes or ():
            self._probes.adopt(root, variants)
        if report.epochs is not None:
            self._epochs.adopt(report.epochs)
        statistics = _valid_statistics(report)
        epochs = self._epochs.everything()
        answer = self._take(report, statistics)._replace(epochs=None if epochs == report.epochs else epochs)
        if statistics is None or answer.resync:
            return answer
        with self._lock:
            others = [member.statistics for node, member in self._members.items() if node != report.node and member.statistics]
        return answer._replace(others=merge_statistics(others)) if others else answer

    def _take(self, report: Report, statistics: bytes | None) -> Answer:
        with self._lock:
            self._drop_silent()
            member = self._members.get(report.node)
            now_s = self._clock.now_s()
            if report.number == 0:
                self._directory.add_node(report.node)
                known = member.statistics if member else None
                self._lost.pop(report.node, None)
                member = self._members[report.node] = Member(report.info, report.stats, 0, now_s, statistics=known)
            elif member is None or report.number != member.number + 1:
                return self._answer(report.node, member, resync=True)
            member.number, member.seen_s = report.number, now_s
            member.info, member.stats = report.info, report.stats
            self._note_address(report.node, report.info.get("peer_address"))
            if statistics is not None:
                member.statistics = statistics
        self._update(report)
        with self._lock:
            return self._answer(report.node, member, resync=False)

    def _update(self, report: Report) -> None:
        """Record a report's keys in the directory, KEYS_AT_ONCE at a time, so that look-ups need not wait for all of them."""
        for start in range(0, max(len(report.added), len(report.removed)), KEYS_AT_ONCE):
            part = slice(start, start + KEYS_AT_ONCE)
            with self._lock:
                if report.node in self._members:
                    self._directory.update(report.node, report.added[part], report.removed[part])
            time.sleep(0)  # let another thread have the lock

    def _answer(self, node: str, member: Member | None, *, resync: bool) -> Answer:
        """Returns the answer to a report. It has the addresses of all nodes if they have changed since the last answer to this node."""
        is_told = member is not None and member.told == self._addresses_version
        if member is not None:
            member.told = self._addresses_version
        return Answer(self._peers(node), resync=resync, addresses=None if is_told else dict(self._addresses))

    def _note_address(self, node: str, address: str | None) -> None:
        """Record the address of a node's streams, None if it has no streams."""
        if self._addresses.get(node) == address:
            return
        if address is None:
            del self._addresses[node]
        else:
            self._addresses[node] = address
        self._addresses_version += 1

    def addresses_of(self, nodes: Iterable[str]) -> dict[str, str]:
        """Returns the stream address of each of these nodes that has streams."""
        with self._lock:
            return {node: self._addresses[node] for node in nodes if node in self._addresses}

    def locate(self, asker: str, keys: list[BlockKey]) -> list[list[str]]:
        """Returns, for each key, the live nodes except `asker` that hold its block. Stops before the first key that no such node holds."""
        with self._lock:
            self._drop_silent()
            return self._directory.locate(keys, asker)

    def holders(self, asker: str, keys: list[BlockKey]) -> Holders:
        """Returns the nodes other than `asker` that have or had each block: live ones, and lost ones as of their last report.

        The blocks of lost nodes are known until the directory needs their entries for other blocks.
        """
        with self._lock:
            self._drop_silent()
            live, silent = self._directory.everywhere(keys, asker)
            return Holders(sorted(self._members.keys() - {asker}), live, silent)

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        """Find the variant of a model by its `probe` (KV of a few tokens).

        Also merges in the variants of `root` that the calling node knows.

        A variant is one of several models of one root that compute different KV. Returns all variants. If none matches the
        probe, a new one is added, unless the root has VARIANTS_MAX already.
        """
        self._probes.adopt(root, known)
        self._probes.match(root, probe)
        return self._probes.variants(root)

    def raise_epoch(self, families: list[bytes], keep: bool, now_ms: int) -> tuple[list[Epoch], list[str]]:
        """Raise the weight epochs of model families (EVERY: of all). Returns the new epochs, and the ids of all live and lost nodes.

        All these nodes must adopt the epochs. A node that cannot be reached now gets them with the answer to its next report. `now_ms`:
        Unix time.
        """
        raised = self._epochs.raised(families, now_ms, keep=keep)
        with self._lock:
            self._drop_silent()
            return raised, sorted({*self._members, *self._lost})

    def nodes(self) -> list[LiveNode]:
        """Returns a record of each live node: its info, figures, and the age of its last report in seconds."""
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

    def directory_size(self) -> tuple[int, int]:
        """Returns how many pairs of block and node the directory has, and its memory in bytes."""
        with self._lock:
            return len(self._directory), self._directory.nbytes

    def reporting(self) -> set[str]:
        """Returns the ids of the live nodes."""
        with self._lock:
            self._drop_silent()
            return set(self._members)

    def lost(self) -> dict[str, float]:
        """Returns the seconds since the last report of each lost node. A node that left with `forget` is not lost."""
        with self._lock:
            self._drop_silent()
            now_s = self._clock.now_s()
            return {node: now_s - seen_s for node, seen_s in sorted(self._lost.items())}

    def forget(self, node: str) -> None:
        """Remove a node that leaves on purpose, so that it does not count as lost."""
        with self._lock:
            self._members.pop(node, None)
            self._lost.pop(node, None)
            self._directory.drop_node(node)
            self._note_address(node, None)

    def check(self) -> None:
        """Assert that the directory is consistent."""
        with self._lock:
            self._directory.check()

    def _peers(self, node: str) -> int:
        return len(self._members.keys() - {node})

    def _drop_silent(self) -> None:
        oldest_s = self._clock.now_s() - self._timeout_s
        for node in [node for node, member in self._members.items() if member.seen_s < oldest_s]:
            self._lost[node] = self._members.pop(node).seen_s
            self._directory.lose_node(node)
            self._note_address(node, None)
        while len(self._lost) > LOST_MAX:
            del self._lost[next(iter(self._lost))]


def _valid_statistics(report: Report) -> bytes | None:
    """Returns the statistics in a report; None if it has none, or if they cannot be merged with other nodes' statistics."""
    if report.statistics is None:
        return None
    try:
        if len(report.statistics) > STATISTICS_BYTES_MAX:
            raise ValueError(f"they must be at most {STATISTICS_BYTES_MAX} bytes, got {len(report.statistics)}")
        merge_statistics([report.statistics])
    except (ValueError, TypeError) as error:
        log.warning("the statistics of node %s are ignored: %s", report.node, error)
        return None
    return report.statistics
