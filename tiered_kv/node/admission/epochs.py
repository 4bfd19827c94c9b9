"""A node's weight epochs: checked where a block becomes visible, published to readers, and raised on all nodes of the cluster.

After `adopt` has returned, this node neither shows nor admits blocks of an ended epoch. Readers that looked up such a block discard it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.node.admission.roots import RootBook, RootInfo
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.messages import NamespaceStats, TenantStats
from tiered_kv.protocol.peer_transport import SPREAD_WITHIN_S, Link
from tiered_kv.store import events as ev
from tiered_kv.store.quotas import Quotas

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

log = logging.getLogger(__name__)

AT_ONCE = 500
"""The most blocks that are dropped while the engine's lock is held once. Dropping them takes some milliseconds."""
AHEAD_MS_MAX = 24 * 3600 * 1000
"""A worker may report an epoch that its node has forgotten. An epoch further in the future than this is a worker's error, and ignored."""
SETTLE_S = 1.0
PURGE_WITHIN_S = 60.0
"""If its caller has not ended a purge after this time, the node ends it, and admits blocks of the purged families again."""


class Purge(NamedTuple):
    """A running purge of these families. It ends at `until_s` on the node's clock, or earlier if its caller ends it."""

    families: frozenset[bytes]
    until_s: float


class NodeEpochs:
    """The weight epochs of one node. Thread-safe.

    `folders`: where the book of roots is saved. `link`: the node's link to the coordinator and the peers, None if it has none.
    """

    def __init__(self, node: "Node", folders: Iterable[Path], link: Link | None, now_s: Callable[[], float]) -> None:
        self._node, self._link, self._now_s = node, link, now_s
        self.book = RootBook(folders)
        self._turn = threading.RLock()  # one change at a time; taken before the engine's lock
        self._purges: list[Purge] = []
        self._publish()

    def everything(self) -> list[Epoch]:
        """Returns the present epoch of every family whose epoch was ever raised."""
        return self.book.epochs.everything()

    def is_closed(self, root: BlockKey | None) -> bool:
        """Returns whether the node now refuses to make blocks below a root visible. Call with the engine's lock."""
        return root in self._node.engine.machine.endings.roots

    def tenant_of(self, root: BlockKey | None) -> str:
        """Returns the tenant of a root, or "" if the root is not known."""
        info = self.book.facts(root)
        return info.tenant if info is not None else ""

    def learn(self, root: BlockKey, namespace: Namespace | None) -> None:
        """Record the namespace of a root, as named by a worker or by a mounted checkpoint."""
        if namespace is None:
            return
        facts = RootInfo.of(namespace)
        is_new = self.book.learn(root, facts)
        if 0 < facts.number <= time.time() * 1000 + AHEAD_MS_MAX:
            self.adopt([Epoch(facts.family, facts.number, 0)])
        if is_new:
            with self._turn:
                self.book.save()
                if self.book.has_ended(facts) or any(facts.family in each.families for each in self._purges):
                    self._drop([root])

    def adopt(self, epochs: Sequence[Epoch]) -> None:
        """Merge the epochs that another process knows. Then drop the blocks of ended epochs."""
        with self._turn:
            if self.book.epochs.adopt(epochs):
                self._apply()

    def new_epoch(self, families: list[bytes], keep: bool) -> tuple[int, list[str]]:
        """Raise the epochs of families on all nodes. Returns their number, and the nodes that did not confirm it in time.

        Raises (kind `transport`), with nothing changed, if the coordinator does not answer.
        """
        if self._link is None:
            with self._turn:
                raised = self.book.epochs.raised(families, int(time.time() * 1000), keep=keep)
                self._apply()
            return raised[0].number, []
        raised, nodes = self._link.raise_epoch(families, keep)
        self.adopt(raised)
        others = [node for node in nodes if node != self._node.node_id]
        return raised[0].number, self._link.spread(others, raised, SPREAD_WITHIN_S)

    def recovered(self, found: Sequence[ev.Recovered]) -> None:
        """Drop recovered blocks whose epoch has ended. Also drop blocks that were purged, but whose bytes are still in a lower tier."""
        old = []
        for each in found:
            facts = self.book.facts(each.info.root)
            if facts and each.location.segment < facts.purged_below.get(int(each.location.tier), 0):
                old.append(each)
        with self._turn, self._node.engine.lock:
            handle = self._node.engine.handle
            roots = list({each.info.root for each in old if each.info.root is not None})
            handle([ev.Ended(roots, [each.key for each in old]), ev.Reopened(roots)])
            self._drop(self.book.ended())
            if self.book.forget_segments(self._next_segments()):
                self.book.save()

    # Purges

    def purge(self, families: Sequence[bytes]) -> int:
        """Drop all blocks of these families, of every epoch, and admit none until `end_purge`. Returns how many were dropped."""
        with self._turn:
            self._purges.append(Purge(frozenset(families), self._now_s() + PURGE_WITHIN_S))
            roots = self.book.of_families(families)
            dropped = self._drop(roots)
            self.book.purged(roots, self._next_segments())
            self.book.save()
        return dropped

    def end_purge(self, families: Sequence[bytes]) -> None:
        """Admit blocks of these families again as soon as no dropped block is still being copied: within SETTLE_S, or at a later beat."""
        with self._turn:
            done = frozenset(families)
            self._purges = [each._replace(until_s=-inf) if each.families == done else each for each in self._purges]
        with self._node.engine.lock:
            self._node.engine.freed.wait_for(lambda: not self._node.engine.machine.endings, SETTLE_S)
        self.beat()

    def beat(self) -> None:
        """End the purges whose time is over, unless a dropped block is still being copied: then leave them for a later beat."""
        if not self._purges or self._node.engine.machine.endings:
            return
        with self._turn:
            over = [each for each in self._purges if each.until_s < self._now_s()]
            self._purges = [each for each in self._purges if each not in over]
            still = frozenset().union(*(each.families for each in self._purges))
            roots = self.book.of_families(frozenset().union(*(each.families for each in over)) - still)
            self.book.purged(roots, self._next_segments())
            self.book.save()
            self._node.engine.handle([ev.Reopened([root for root in roots if root not in self.book.ended()])])

    def _next_segments(self) -> dict[int, int]:
        return {int(tier): log_tier.next_segment for tier, log_tier in self._node.storage.logs.items()}

    # Changes

    def _apply(self) -> None:
        """Save the book of roots, publish its epochs to readers, and drop the blocks of ended epochs."""
        self.book.save()
        with self._node.engine.lock:
            ended = self.book.ended()
            self._node.engine.handle([ev.Ended(ended)])
            self._publish()
        self._drop(ended)
        self._node.report_soon()

    def _publish(self) -> None:
        self._node.storage.index.set_epochs([(each.family, each.number) for each in self.everything()])

    def _drop(self, roots: Sequence[BlockKey]) -> int:
        """Admit no more blocks below these roots, and drop those that exist, AT_ONCE at a time. Returns how many existed."""
        engine, wanted = self._node.engine, set(roots)
        with engine.lock:
            engine.handle([ev.Ended(roots)])
            keys = [key for key, block in engine.machine.blocks.items() if block.root in wanted] if wanted else []
        for end in range(len(keys), 0, -AT_ONCE):  # children were added after their parents
            engine.handle([ev.Ended((), keys[max(end - AT_ONCE, 0) : end])])
        return len(keys)

    def namespaces(self) -> list[NamespaceStats]:
        """Returns the known families, ready for JSON: `family` and `weights` (their starts), `tenant`, and the present `epoch`."""
        families = {facts.family: facts for facts in self.book.everything().values()}
        return [
            {"family": family.hex(), "weights": facts.weights, "tenant": facts.tenant, "epoch": self.book.epochs.number(family)}
            for family, facts in sorted(families.items())
        ]


def tenant_stats(quotas: Quotas) -> dict[str, dict[str, TenantStats]]:
    """Returns by tenant and tier: the bytes used, the number of blocks, and the quota in bytes (None without one).

    The tenant "" stands for blocks of unknown models.
    """
    found: dict[str, dict[str, TenantStats]] = {}
    for tenant, tier in sorted({*quotas.bytes, *quotas.limits}):
        blocks, limit = quotas.blocks[tenant, tier], quotas.limits.get((tenant, tier))
        if blocks or limit is not None:
            stats: TenantStats = {"used_bytes": quotas.bytes[tenant, tier], "blocks": blocks, "quota_bytes": limit}
            found.setdefault(tenant, {})[tier.label] = stats
    return found
