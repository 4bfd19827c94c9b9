"""The history and the eviction policies that a node's settings ask for."""

from tiered_kv.config import Config
from tiered_kv.policy import EvictionPolicy, History, create_history, create_policy


def history_of(config: Config) -> History:
    """The history that these settings ask for: only adaptive learns from one, for the others the machine's counts will do."""
    return create_history() if config.policy == "adaptive" else History()


def policy_of(config: Config, history: History, capacity_bytes: int) -> EvictionPolicy:
    """The policy that these settings ask for, for one tier in memory."""
    return create_policy(
        config.policy, history, capacity_bytes, cost_weight=config.cost_weight, block_tokens=config.block_tokens, seed=config.seed
    )
