"""Policy: which block leaves a tier first. Owns the ranking of resident blocks, nothing that moves bytes.

May import: keys, errors, blocks.
Never knows: torch, the clock, random without a seed, codecs, tiers. Pure Python, deterministic.
"""

from tiered_kv.policy.base import EvictionPolicy
from tiered_kv.policy.lru import LRUPolicy

__all__ = ["EvictionPolicy", "LRUPolicy", "create_policy"]

_POLICIES = {"lru": LRUPolicy}


def create_policy(name: str) -> EvictionPolicy:
    """A fresh policy by the name used in settings; `Config` has checked the name."""
    return _POLICIES[name]()
