"""Least recently used.

Touched deepest block first, this is the leaf-first LRU of a radix tree (SGLang's RadixCache; Zheng et al. 2024).
"""

from collections.abc import Iterator

from tiered_kv.keys import BlockKey
from tiered_kv.policy.base import EvictionPolicy


class LRUPolicy(EvictionPolicy):
    """Gives up the block whose last use is longest ago. O(1) a use."""

    def __init__(self) -> None:
        super().__init__()
        self._order: dict[BlockKey, None] = {}

    def _added(self, key: BlockKey) -> None:
        self._order[key] = None

    def _touched(self, key: BlockKey) -> None:
        del self._order[key]
        self._order[key] = None

    def _removed(self, key: BlockKey) -> None:
        del self._order[key]

    def _ranked(self) -> Iterator[BlockKey]:
        return iter(self._order)
