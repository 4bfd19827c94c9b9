"""First in, first out.

The baseline of every caching study. Yang et al., FIFO can be Better than LRU (HotOS 2023), shows when it is good.
"""

from collections.abc import Sequence

from tiered_kv.policy.base import Key
from tiered_kv.policy.lru import LRUPolicy


class FIFOPolicy(LRUPolicy):
    """Evicts the leaf that has been resident longest. Uses change nothing."""

    def _added(self, keys: Sequence[Key], nbytes: int) -> None:
        self._used.update(zip(reversed(keys), self._tick))

    def _touched(self, keys: Sequence[Key]) -> None:
        pass
