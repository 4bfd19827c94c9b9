"""Exchange of learned statistics between the eviction policies of several nodes.

A node sends its counts to the coordinator and gets the sum of the other nodes' counts. While the coordinator does not answer, the node
uses the last sum. Policies that do not learn exchange nothing.
"""

import logging
import threading

from tiered_kv.clock import Clock
from tiered_kv.config import Config
from tiered_kv.policy import EvictionPolicy, History, create_history, create_policy
from tiered_kv.policy.blockhistory import BlockHistory
from tiered_kv.protocol.messages import LearningStats

log = logging.getLogger(__name__)


class Learning:
    """One node's side of the exchange. Thread-safe: `lock` is the engine's, which also guards the history."""

    def __init__(self, history: History, lock: threading.RLock, clock: Clock) -> None:
        self._history = history if isinstance(history, BlockHistory) else None
        self._lock = lock
        self._clock = clock
        self._adopted_s: float | None = None

    def statistics(self) -> bytes | None:
        """Returns this node's counts, some tens of KB, or None if the policy does not learn. Holds the lock for about 3 ms."""
        if self._history is None:
            return None
        with self._lock:
            return self._history.statistics()

    def adopt(self, others: bytes) -> None:
        """Use the other nodes' counts as soon as the policy computes its next reuse table. Invalid counts are logged and ignored."""
        if self._history is None:
            return
        try:
            with self._lock:
                self._history.adopt(others)
                self._adopted_s = self._clock.now_s()
        except (ValueError, TypeError) as error:
            log.warning("invalid statistics of other nodes from the coordinator are ignored: %s", error)

    def stats(self) -> LearningStats:
        """Returns how many blocks the policy remembers, and the age of the other nodes' counts in seconds.

        The number is None if the policy does not learn. The age is None if no counts of other nodes were adopted.
        """
        if self._history is None:
            return {"known_blocks": None, "adopted_age_s": None}
        age_s = None if self._adopted_s is None else self._clock.now_s() - self._adopted_s
        return {"known_blocks": self._history.blocks, "adopted_age_s": age_s}


def history_of(config: Config) -> History:
    """Returns a history for these settings. Only the policy `adaptive` needs one that remembers uses."""
    return create_history() if config.policy == "adaptive" else History()


def policy_of(config: Config, history: History, capacity_bytes: int) -> EvictionPolicy:
    """Returns the eviction policy that these settings name, for one tier in memory."""
    return create_policy(
        config.policy, history, capacity_bytes, cost_weight=config.cost_weight, block_tokens=config.block_tokens, seed=config.seed
    )
