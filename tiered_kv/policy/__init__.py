"""Eviction policies: which block leaves a tier first. Owns the ranking of resident blocks and the history it uses.

May import: keys, errors, blocks; numpy.
Must never know: torch, the clock, random without a seed, codecs, tiers, files. Pure and deterministic.
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
"""The names that `create_policy` accepts."""


def create_history() -> History:
    """Returns a history that remembers uses, for the policy `adaptive` and for all decisions that need evidence of reuse."""
    return BlockHistory()


def create_policy(
    name: str, history: History, capacity_bytes: int, *, cost_weight: float = 0.0, block_tokens: int = 0, seed: int = 0
) -> EvictionPolicy:
    """Returns a new policy for one tier of `capacity_bytes`. `name` is the name in settings, already checked by `Config`.

    `history` is the node's history, shared by all its tiers. Only `adaptive` uses the other arguments. `cost_weight` is 0 (all
    tokens cost the same) to 1 (the cost of a token is its prefill FLOPs, which grow with its position). `block_tokens` is the
    number of tokens in a block. `seed`: of the random samples among which `adaptive` looks for victims.
    """
    if name == "adaptive":
        assert isinstance(history, BlockHistory), "the policy adaptive needs the history of create_history"
        return AdaptivePolicy(history, cost_per_block=cost_weight * block_tokens / COST_TOKENS, seed=seed)
    return _CLASSICS[name](history, capacity_bytes)
