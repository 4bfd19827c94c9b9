"""What the policies of several nodes learn from each other: a node's counts go to the coordinator, the sum of the others' comes back.

A node goes on with the last sum when the coordinator is away. Policies that learn nothing tell nothing.
"""

import logging
import threading

from tiered_kv.clock import Clock
from tiered_kv.config import Config
from tiered_kv.policy import EvictionPolicy, History, create_history, create_policy
from tiered_kv.policy.blockhistory import BlockHistory

log = logging.getLogger(__name__)


class Learning:
    """The part of one node; thread-safe by `lock`, the engine's, which also guards the history."""

    def __init__(self, history: History, lock: threading.RLock, clock: Clock) -> None:
        self._history = history if isinstance(history, BlockHistory) else None
        self._lock = lock
        self._clock = clock
        self._adopted_s: float | None = None

    def statistics(self) -> bytes | None:
        """What this node has counted, some tens of KB; None where nothing is learned. About 3 ms under the lock."""
        if self._history is None:
            return None
        with self._lock:
            return self._history.statistics()

    def adopt(self, others: bytes) -> None:
        """Learn from the others' counts from the next table on. What is none is logged and left."""
        if self._history is None:
            return
        try:
            with self._lock:
                self._history.adopt(others)
                self._adopted_s = self._clock.now_s()
        except (ValueError, TypeError) as error:
            log.warning("what the coordinator says that others have learned is not used: %s", error)

    def stats(self) -> dict:
        """How many blocks the policy remembers, and how old what it has of others is, in seconds; None: it learns nothing, has nothing."""
        if self._history is None:
            return {"known_blocks": None, "adopted_age_s": None}
        age_s = None if self._adopted_s is None else self._clock.now_s() - self._adopted_s
        return {"known_blocks": self._history.blocks, "adopted_age_s": age_s}


def history_of(config: Config) -> History:
    """The history that these settings ask for: only adaptive learns from one, for the others the machine's counts will do."""
    return create_history() if config.policy == "adaptive" else History()


def policy_of(config: Config, history: History, capacity_bytes: int) -> EvictionPolicy:
    """The policy that these settings ask for, for one tier in memory."""
    return create_policy(
        config.policy, history, capacity_bytes, cost_weight=config.cost_weight, block_tokens=config.block_tokens, seed=config.seed
    )
