"""Policy: which block leaves a tier first. Owns the ranking of resident blocks and the history it rests on.

May import: keys, errors, blocks; numpy.
Never knows: torch, the clock, random without a seed, codecs, tiers, files. Pure, deterministic.
"""

from collections.abc import Callable

from tiered_kv.policy.adaptive import COST_TOKENS, AdaptivePolicy
from tiered_kv.policy.arc import ARCPolicy
from tiered_kv.policy.base import EvictionPolicy, Key, RankedPolicy
from tiered_kv.policy.blockhistory import BlockHistory
from tiered_kv.policy.fifo import FIFOPolicy
from tiered_kv.policy.gdsf import GDSFPolicy
from tiered_kv.policy.history import History
from tiered_kv.policy.lfu import LFUPolicy
from tiered_kv.policy.lru import LRUPolicy
from tiered_kv.policy.s3fifo import S3FIFOPolicy
from tiered_kv.policy.sieve import SIEVEPolicy

__all__ = ["POLICY_NAMES", "EvictionPolicy", "History", "Key", "LRUPolicy", "RankedPolicy", "create_history", "create_policy"]

_CLASSICS: dict[str, Callable[[History, int], EvictionPolicy]] = {
    "lru": lambda history, capacity_bytes: LRUPolicy(),
    "lfu": lambda history, capacity_bytes: LFUPolicy(),
    "fifo": lambda history, capacity_bytes: FIFOPolicy(),
    "s3fifo": lambda history, capacity_bytes: S3FIFOPolicy(capacity_bytes),
    "sieve": lambda history, capacity_bytes: SIEVEPolicy(),
    "arc": lambda history, capacity_bytes: ARCPolicy(capacity_bytes),
    "gdsf": lambda history, capacity_bytes: GDSFPolicy(),
}

POLICY_NAMES = (*_CLASSICS, "adaptive")
"""The names that `create_policy` knows."""


def create_history() -> History:
    """A history that remembers: for the policy `adaptive`, and wherever evidence of reuse is asked for."""
    return BlockHistory()


def create_policy(
    name: str, history: History, capacity_bytes: int, *, cost_weight: float = 0.0, block_tokens: int = 0, seed: int = 0
) -> EvictionPolicy:
    """A fresh policy for one tier of `capacity_bytes` by the name used in settings; `Config` has checked the name.

    `history`: the node's, the same for all its tiers. For adaptive alone: `cost_weight` from 0 (every token counts alike)
    to 1 (by its prefill FLOPs, which grow with its position: the tokens of a block), and the `seed` of its samples.
    """
    if name == "adaptive":
        assert isinstance(history, BlockHistory), "the policy adaptive needs the history of create_history"
        return AdaptivePolicy(history, cost_per_block=cost_weight * block_tokens / COST_TOKENS, seed=seed)
    return _CLASSICS[name](history, capacity_bytes)
