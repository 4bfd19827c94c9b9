"""The node's reports to the coordinator: changes at once, a heartbeat otherwise, the whole inventory when asked."""

import logging
import threading
from collections.abc import Callable

from tiered_kv.clock import Clock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.learning import Learning
from tiered_kv.protocol.peer_transport import Link
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Report

log = logging.getLogger(__name__)

KEYS_PER_REPORT = 50_000
JOIN_WITHIN_S = 3.0  # for a report that is under way when the node closes
TEACH_EVERY_S = 10.0
"""How often a report brings the policy's statistics along; also with the first one after an inventory."""


class Reporter:
    """A thread that tells the coordinator which blocks came and went. What could not be told is told later.

    It is also the circuit breaker of questions to the coordinator: one that fails is the last until a report has succeeded
    again (`reachable`). Until then the index says that there are no peers, so that workers do not ask their node either.
    """

    def __init__(
        self,
        link: Link,
        node: str,
        heartbeat_s: float,
        take_changes: Callable[[], dict[BlockKey, bool]],
        inventory: Callable[[], list[BlockKey]],
        describe: Callable[[], tuple[dict, dict]],
        set_peers: Callable[[int], None],
        learning: Learning,
        probes: Callable[[], list[tuple[BlockKey, Variants]]],
        clock: Clock,
    ) -> None:
        self._link = link
        self._node = node
        self._heartbeat_s = heartbeat_s
        self._take_changes = take_changes
        self._inventory = inventory
        self._describe = describe
        self._set_peers = set_peers
        self._learning = learning
        self._probes = probes
        self._clock = clock
        self._teach_again_s = float("-inf")
        self._number = 0
        self._turn = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tkv-report", daemon=True)
        self.reachable = False

    def start(self) -> None:
        """Report once, so that the node is known when this returns, and go on in the background."""
        self._report_guarded()
        self._thread.start()

    def wake(self) -> None:
        """Something changed: report it now."""
        self._wake.set()

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        """Which nodes hold the leading keys, as `Link.locate`. Raises (kind `transport`) at once while the coordinator is silent."""
        if not self.reachable:
            raise TieredKVError(Kind.TRANSPORT, "the coordinator did not answer, and has not been heard of since")
        try:
            return self._link.locate(keys, wait_s)
        except TieredKVError as error:
            self._is_silent(error)
            self.wake()  # it may have been the question that was too slow: this finds out
            raise

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        """As `Link.probe`. Raises (kind `transport`) at once while the coordinator is silent."""
        if not self.reachable:
            raise TieredKVError(Kind.TRANSPORT, "the coordinator did not answer, and has not been heard of since")
        return self._link.probe(root, known, probe)

    def report_once(self) -> None:
        """Send what changed since the last report; the whole inventory first if the coordinator lost count."""
        with self._turn:
            self._report()

    def _report(self) -> None:
        try:
            if self._number and self._send(self._number, *_split(self._take_changes())):
                return
            self._take_changes()  # part of the inventory
            keys = self._inventory()
            for number, start in enumerate(range(0, max(len(keys), 1), KEYS_PER_REPORT)):
                self._send(number, keys[start : start + KEYS_PER_REPORT], [])
        except TieredKVError as error:
            self._is_silent(error)

    def _is_silent(self, error: TieredKVError) -> None:
        if self.reachable:
            log.warning("the coordinator does not answer: %s", error)
        self.reachable = False
        self._set_peers(0)

    def _send(self, number: int, added: list[BlockKey], removed: list[BlockKey]) -> bool:
        self._number = 0  # until it has arrived: after whatever fails the next report is a whole inventory
        info, stats = self._describe()
        now_s = self._clock.now_s()
        due = number > 0 and now_s >= self._teach_again_s  # not with an inventory: that is tried again and again without a coordinator
        statistics = self._learning.statistics() if due else None
        probes = None if number else self._probes()  # a coordinator that lost count may have lost them
        answer = self._link.report(Report(self._node, number, added, removed, info, stats, statistics, probes))
        self.reachable = True
        self._number = number + 1
        self._set_peers(answer.peers)
        if due or not number:
            self._teach_again_s = now_s + TEACH_EVERY_S if due else now_s
        if answer.others is not None:
            self._learning.adopt(answer.others)
        return not answer.resync

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._heartbeat_s)
            self._wake.clear()
            if not self._closing:
                self._report_guarded()

    def _report_guarded(self) -> None:
        """Boundary of the thread: it must not end while the node lives."""
        try:
            self.report_once()
        except Exception:
            log.exception("reporting to the coordinator failed")

    def close(self) -> None:
        """Stop the thread."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_WITHIN_S)


def _split(changes: dict[BlockKey, bool]) -> tuple[list[BlockKey], list[BlockKey]]:
    added = [key for key, visible in changes.items() if visible]
    removed = [key for key, visible in changes.items() if not visible]
    return added, removed
