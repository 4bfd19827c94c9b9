"""A door to the eviction policies: the order in which entries leave, for those who keep the entries themselves."""

from collections.abc import Collection, Hashable, Mapping
from enum import Enum
from typing import Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.policy import POLICY_NAMES, History, create_history, create_policy

ENTRY_BYTES = 1


class BaseEvictionStrategy:
    """Ranks entries by a policy of the engine (`tiered_kv.policy`); every entry counts alike. Not thread-safe.

    Say what happens (`add`, `use`, `remove`), then ask (`victims`); or give the access times and counts that you keep yourself
    (`select_eviction_candidates`). `capacity`: entries that there is room for, which some policies want to know.
    """

    name = "lru"

    def __init__(self, capacity: int = 1024, seed: int = 0) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise TieredKVError(Kind.CONFIG, f"capacity must be a whole number of at least 1, not {capacity!r}", setting="capacity")
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
        """An entry is there from now on; one behind a `parent` goes before it."""
        if key in self._policy:
            raise TieredKVError(Kind.CONFIG, f"the entry {key!r} is there already; say use")
        self._history.seen([key], parent, now_s)
        self._policy.add([key], parent, ENTRY_BYTES)

    def use(self, key: Hashable, now_s: float = 0.0) -> None:
        """An entry was used."""
        self._check(key)
        self._history.seen([key], None, now_s)
        self._policy.use([key])

    def remove(self, key: Hashable) -> None:
        """An entry is not there any more."""
        self._check(key)
        self._policy.remove(key)

    def victims(self, count: int = 1, protected: Collection[Hashable] = (), now_s: float = 0.0) -> list[Hashable]:
        """Up to `count` entries that should leave, in this order; none leaves until `remove`."""
        return self._policy.victims(count * ENTRY_BYTES, protected, now_s)[:count] if count > 0 else []

    def select_eviction_candidates(
        self,
        cache: Collection[Hashable],
        access_times: Mapping[Hashable, float],
        access_counts: Mapping[Hashable, int],
        num_to_evict: int,
    ) -> list[Hashable]:
        """The same from times of the last use and counts of uses, which are told to a new policy in the order of the times.

        Counts matter by their order only. What has no time counts as the oldest, what has no count as used once.
        """
        ranks = {count: rank for rank, count in enumerate(sorted({access_counts.get(key, 1) for key in cache}))}
        keys = sorted(cache, key=lambda key: access_times.get(key, float("-inf")))
        told = type(self)(max(self.capacity, len(keys)), self._seed)
        for key in keys:
            told.add(key, access_times.get(key, 0.0))
        for turn in range(1, len(ranks)):
            for key in keys:
                if ranks[access_counts.get(key, 1)] >= turn:
                    told.use(key, access_times.get(key, 0.0))
        if self.name == "lru":  # the last of these uses is the one at the time that was given
            for key in keys:
                told.use(key)
        return told.victims(num_to_evict, now_s=max((access_times.get(key, 0.0) for key in keys), default=0.0))

    def _check(self, key: Hashable) -> None:
        if key not in self._policy:
            raise TieredKVError(Kind.CONFIG, f"there is no entry {key!r}")


class LRUEvictionStrategy(BaseEvictionStrategy):
    """The least recently used goes first."""


class LFUEvictionStrategy(BaseEvictionStrategy):
    """The least often used goes first, of equals the one that was used longest ago."""

    name = "lfu"


class AdaptiveEvictionStrategy(BaseEvictionStrategy):
    """What is least likely to be used soon goes first, as learned from what was said of times; before that as LRU."""

    name = "adaptive"


_CLASSES = {cls.name: cls for cls in (LRUEvictionStrategy, LFUEvictionStrategy, AdaptiveEvictionStrategy)}


def create_eviction_strategy(strategy: Enum | str, capacity: int = 1024, seed: int = 0) -> BaseEvictionStrategy:
    """The strategy of a `CacheStrategy` or of its value; raises (kind `config`) that names those there are."""
    name = getattr(strategy, "value", strategy)
    if name not in POLICY_NAMES:
        raise TieredKVError(Kind.CONFIG, f"strategy must be one of {', '.join(POLICY_NAMES)}, not {name!r}", setting="strategy")
    cls = _CLASSES.get(name) or type(f"{name.upper()}EvictionStrategy", (BaseEvictionStrategy,), {"name": name})
    return cls(capacity, seed)
