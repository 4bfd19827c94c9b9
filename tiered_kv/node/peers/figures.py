"""The figures of a node's transfers with its peers."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping

from tiered_kv.errors import TieredKVError
from tiered_kv.protocol.messages import PairStats, PeerStats

COORDINATOR = "coordinator"
"""The name under which the figures list the coordinator's directory among the peers."""
PEERS_MAX = 64
"""The most peers of which figures are kept: those used last."""


class PeerFigures:
    """Counts of one node's transfers with its peers. Thread-safe."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._failed_at_s: dict[str, float] = {}
        self._lock = threading.Lock()
        self._pairs: OrderedDict[str, PairStats] = OrderedDict()
        self._sums: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def fetched(self, peer: str, blocks: int, nbytes: int, seconds: float, *, is_whole: bool) -> None:
        """Count blocks that a peer has sent. `is_whole`: the transfer did not fail, so the peer's last failure is forgotten."""
        with self._lock:
            pair = self._pair(peer)
            self._sums["fetched_bytes"] += nbytes
            pair["blocks"] += blocks
            pair["bytes"] += nbytes
            pair["seconds"] += seconds
            if is_whole:
                pair.pop("last_failure", None)

    def failed(self, peer: str, error: TieredKVError) -> None:
        """Count a failed request to a peer."""
        reason = reason_of(error)
        with self._lock:
            self._sums["checksum_failures"] += reason == "checksum"
            pair = self._pair(peer)
            pair["failures"][reason] = pair["failures"].get(reason, 0) + 1
            pair["last_failure"] = str(error)
            self._failed_at_s[peer] = self._now_s()

    def served(self, blocks: int, nbytes: int) -> None:
        """Count blocks that were sent to a peer."""
        with self._lock:
            self._sums.update(blocks=blocks, bytes=nbytes)

    def located(self) -> None:
        """Count a successful look-up in the directory over its socket. The directory's last failure is forgotten."""
        with self._lock:
            self._sums["located"] += 1
            if COORDINATOR in self._pairs:
                self._pairs[COORDINATOR].pop("last_failure", None)

    def stats(self, address: str | None, refused: Mapping[str, int]) -> PeerStats:
        """Returns all figures, ready for JSON. `refused`: callers that the listener refused, by reason."""
        with self._lock:
            return {
                "address": address,
                "peers": {peer: self._copied(peer, pair) for peer, pair in self._pairs.items()},
                "fetched_bytes": self._sums["fetched_bytes"],
                "checksum_failures": self._sums["checksum_failures"],
                "served_blocks": self._sums["blocks"],
                "served_bytes": self._sums["bytes"],
                "located": self._sums["located"],
                "refused": dict(refused),
            }

    def _copied(self, peer: str, pair: PairStats) -> PairStats:
        copied = pair.copy()
        copied["failures"] = dict(pair["failures"])
        if "last_failure" in pair:
            copied["last_failure_age_s"] = self._now_s() - self._failed_at_s[peer]
        return copied

    def _pair(self, peer: str) -> PairStats:
        pair = self._pairs.pop(peer, None) or {"blocks": 0, "bytes": 0, "seconds": 0.0, "failures": {}}
        self._pairs[peer] = pair
        while len(self._pairs) > PEERS_MAX:
            self._failed_at_s.pop(self._pairs.popitem(last=False)[0], None)
        return pair


def reason_of(error: TieredKVError) -> str:
    """Returns the word under which the figures count an error: its `reason`, or else its kind."""
    return str(error.context.get("reason", error.kind.value))
