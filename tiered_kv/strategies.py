"""Public access to the eviction policies: the order of eviction, for code that keeps its own entries."""

from collections.abc import Collection, Hashable, Mapping
from enum import Enum
from typing import Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.policy import POLICY_NAMES, History, create_history, create_policy

ENTRY_BYTES = 1


class BaseEvictionStrategy:
    """Ranks entries by a policy of the engine (`tiered_kv.policy`). All entries have the same size. Not thread-safe.

    Report events (`add`, `use`, `remove`), then call `victims`. Or pass your own access times and counts to
    `select_eviction_candidates`. `capacity`: the number of entries for which there is room; some policies need it.
    """

    name = "lru"

    def __init__(self, capacity: int = 1024, seed: int = 0) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise TieredKVError(Kind.CONFIG, f"capacity must be a whole number of at least 1, got {capacity!r}", setting="capacity")
        self.capacity = capacity
        self._seed = seed
        self._history, self._policy = self._fresh()

    def _fresh(self) -> tuple[History, Any]:
        history = create_history() if self.name == "adaptive" else History()
        return history, create_policy(self.name, history, self.capacity * ENTRY_BYTES, seed=self._seed)

    def __len__(self) -> int:
        return len(self._policy)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._policy

    def add(self, key: Hashable, now_s: float = 0.0, parent: Hashable | None = None) -> None:
        """Add an entry. It is evicted before its `parent`, if it has one."""
        if key in self._policy:
            raise TieredKVError(Kind.CONFIG, f"key must be new, but the entry {key!r} is there already; call use")
        self._history.seen([key], parent, now_s)
        self._policy.add([key], parent, ENTRY_BYTES)

    def use(self, key: Hashable, now_s: float = 0.0) -> None:
        """Record a use of an entry."""
        self._check(key)
        self._history.seen([key], None, now_s)
        self._policy.use([key])

    def remove(self, key: Hashable) -> None:
        """Remove an entry."""
        self._check(key)
        self._policy.remove(key)

    def victims(self, count: int = 1, protected: Collection[Hashable] = (), now_s: float = 0.0) -> list[Hashable]:
        """Returns up to `count` entries to evict, in the order of eviction, none of them `protected`. Entries stay until `remove`."""
        return self._policy.victims(count * ENTRY_BYTES, protected, now_s)[:count] if count > 0 else []

    def select_eviction_candidates(
        self,
        cache: Collection[Hashable],
        access_times: Mapping[Hashable, float],
        access_counts: Mapping[Hashable, int],
        num_to_evict: int,
    ) -> list[Hashable]:
        """Returns `num_to_evict` keys of `cache`, chosen from the time of each key's last use and its number of uses.

        Replays uses to a new policy of this kind, in the order of `access_times`. The higher a key's count, the more of its uses are
        replayed; only the order of the counts matters. A key without a time counts as oldest, one without a count as used once.
        """
        ranks = {count: rank for rank, count in enumerate(sorted({access_counts.get(key, 1) for key in cache}))}
        keys = sorted(cache, key=lambda key: access_times.get(key, float("-inf")))
        replayed = type(self)(max(self.capacity, len(keys)), self._seed)
        for key in keys:
            replayed.add(key, access_times.get(key, 0.0))
        for turn in range(1, len(ranks)):
            for key in keys:
                if ranks[access_counts.get(key, 1)] >= turn:
                    replayed.use(key, access_times.get(key, 0.0))
        if self.name == "lru":  # LRU goes by the last use, so the last uses are in the order of the times
            for key in keys:
                replayed.use(key)
        return replayed.victims(num_to_evict, now_s=max((access_times.get(key, 0.0) for key in keys), default=0.0))

    def _check(self, key: Hashable) -> None:
        if key not in self._policy:
            raise TieredKVError(Kind.CONFIG, f"key must be an entry that was added; there is no entry {key!r}")


class LRUEvictionStrategy(BaseEvictionStrategy):
    """Evicts the least recently used entry first."""


class LFUEvictionStrategy(BaseEvictionStrategy):
    """Evicts the least frequently used entry first. Among equal counts, it evicts the least recently used entry first."""

    name = "lfu"


class AdaptiveEvictionStrategy(BaseEvictionStrategy):
    """Learns from the times of uses, and evicts first what is least likely to be used soon. Until it has learned, evicts as LRU."""

    name = "adaptive"


_CLASSES = {cls.name: cls for cls in (LRUEvictionStrategy, LFUEvictionStrategy, AdaptiveEvictionStrategy)}


def create_eviction_strategy(strategy: Enum | str, capacity: int = 1024, seed: int = 0) -> BaseEvictionStrategy:
    """Returns a new eviction strategy. `strategy`: a member of `CacheStrategy`, or its value such as "lru".

    Raises (kind `config`, with the known names) for any other `strategy`.
    """
    name = getattr(strategy, "value", strategy)
    if name not in POLICY_NAMES:
        raise TieredKVError(Kind.CONFIG, f"strategy must be one of {', '.join(POLICY_NAMES)}, got {name!r}", setting="strategy")
    cls: type[BaseEvictionStrategy] = _CLASSES.get(name) or type(f"{name.upper()}EvictionStrategy", (BaseEvictionStrategy,), {"name": name})
    return cls(capacity, seed)
