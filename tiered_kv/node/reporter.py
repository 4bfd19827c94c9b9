"""A node's reports to the coordinator: changes at once, otherwise a heartbeat, and the whole inventory on request."""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from tiered_kv.clock import Clock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.learning import Learning
from tiered_kv.protocol.epochs import Epoch
from tiered_kv.protocol.messages import NodeInfo, NodeStats
from tiered_kv.protocol.peer_transport import Holders, Link
from tiered_kv.protocol.probes import Probe, Variants
from tiered_kv.protocol.reports import Report

log = logging.getLogger(__name__)

KEYS_PER_REPORT = 50_000
JOIN_WITHIN_S = 3.0  # for a report in progress when the node closes
GATHER_S = 0.02
"""How long changes are gathered before they are reported: a report takes the engine's lock, which the next store or pull needs."""
STATISTICS_EVERY_S = 10.0
"""How often a report includes the policy's statistics. The first report after an inventory includes them too."""


class Epochs(Protocol):
    """The node's weight epochs, as the reporter knows them (`NodeEpochs`)."""

    def everything(self) -> list[Epoch]:
        """Returns the epochs to report."""

    def adopt(self, epochs: Sequence[Epoch]) -> None:
        """Merge the epochs that the coordinator knows."""


class Reporter:
    """A thread that reports to the coordinator which blocks were added and removed. After a failed report, it sends the whole inventory.

    It is also the circuit breaker for requests to the coordinator: after one fails, no other is sent until a report succeeds
    (`reachable`). Until then the index shows no peers, so that workers send no look-ups to their node either.
    """

    def __init__(
        self,
        link: Link,
        node: str,
        heartbeat_s: float,
        take_changes: Callable[[], dict[BlockKey, bool]],
        inventory: Callable[[], list[BlockKey]],
        describe: Callable[[], tuple[NodeInfo, NodeStats]],
        set_peers: Callable[[int], None],
        learning: Learning,
        probes: Callable[[], list[tuple[BlockKey, Variants]]],
        epochs: Epochs,
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
        self._epochs = epochs
        self._clock = clock
        self._statistics_due_s = float("-inf")
        self._number = 0
        self._turn = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tkv-report", daemon=True)
        self.reachable = False

    def start(self) -> None:
        """Report once, so that the coordinator knows the node when this returns, and continue in the background."""
        self._report_guarded()
        self._thread.start()

    def wake(self) -> None:
        """Have the thread report changes now."""
        self._wake.set()

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        """As `Link.locate`. Raises (kind `transport`) at once while the coordinator is unreachable."""
        if not self.reachable:
            raise TieredKVError(Kind.TRANSPORT, "the coordinator is unreachable: it did not answer the last request")
        try:
            return self._link.locate(keys, wait_s)
        except TieredKVError as error:
            self._set_unreachable(error)
            self.wake()  # perhaps only this request was slow: a report finds out
            raise

    def holders(self, keys: list[BlockKey], wait_s: float) -> Holders:
        """As `Link.holders`. Raises (kind `transport`) at once while the coordinator is unreachable."""
        if not self.reachable:
            raise TieredKVError(Kind.TRANSPORT, "the coordinator is unreachable: it did not answer the last request")
        return self._link.holders(keys, wait_s)

    def probe(self, root: BlockKey, known: Variants, probe: Probe) -> Variants:
        """As `Link.probe`. Raises (kind `transport`) at once while the coordinator is unreachable."""
        if not self.reachable:
            raise TieredKVError(Kind.TRANSPORT, "the coordinator is unreachable: it did not answer the last request")
        return self._link.probe(root, known, probe)

    def report_once(self) -> None:
        """Send the changes since the last report, or the whole inventory if a report was lost."""
        with self._turn:
            self._report()

    def _report(self) -> None:
        try:
            if self._number and self._send(self._number, *_split(self._take_changes())):
                return
            self._take_changes()  # drop them: they are part of the inventory
            keys = self._inventory()
            for number, start in enumerate(range(0, max(len(keys), 1), KEYS_PER_REPORT)):
                self._send(number, keys[start : start + KEYS_PER_REPORT], [])
        except TieredKVError as error:
            self._set_unreachable(error)

    def _set_unreachable(self, error: TieredKVError) -> None:
        if self.reachable:
            log.warning("the coordinator does not answer: %s", error)
        self.reachable = False
        self._set_peers(0)

    def _send(self, number: int, added: list[BlockKey], removed: list[BlockKey]) -> bool:
        self._number = 0  # until the report has arrived: after any failure the next one is a whole inventory
        info, stats = self._describe()
        now_s = self._clock.now_s()
        due = number > 0 and now_s >= self._statistics_due_s  # never with an inventory, which is repeated while there is no coordinator
        statistics = self._learning.statistics() if due else None
        probes = None if number else self._probes()  # a coordinator that missed a report may have lost them
        answer = self._link.report(Report(self._node, number, added, removed, info, stats, statistics, probes, self._epochs.everything()))
        self.reachable = True
        self._number = number + 1
        self._set_peers(answer.peers)
        if due or not number:
            self._statistics_due_s = now_s + STATISTICS_EVERY_S if due else now_s
        if answer.others is not None:
            self._learning.adopt(answer.others)
        if answer.epochs is not None:
            self._epochs.adopt(answer.epochs)
        return not answer.resync

    def _run(self) -> None:
        while not self._closed.is_set():
            if self._wake.wait(self._heartbeat_s):
                self._closed.wait(GATHER_S)
            self._wake.clear()
            if not self._closed.is_set():
                self._report_guarded()

    def _report_guarded(self) -> None:
        """Report once. Any error is logged: the thread must not end while the node is open."""
        try:
            self.report_once()
        except Exception:
            log.exception("reporting to the coordinator failed")

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_WITHIN_S)


def _split(changes: dict[BlockKey, bool]) -> tuple[list[BlockKey], list[BlockKey]]:
    added = [key for key, visible in changes.items() if visible]
    removed = [key for key, visible in changes.items() if not visible]
    return added, removed
