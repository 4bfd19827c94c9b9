"""The set of blocks that must not be evicted from a tier in memory now."""

from collections.abc import Container

from tiered_kv.keys import BlockKey
from tiered_kv.store.movement import Block


class Protected(Container[BlockKey]):
    """Blocks that must not be evicted from a tier now: those of the chain being stored, and blocks held for a worker, copied, or read."""

    def __init__(
        self, chain: Container[BlockKey], held: Container[BlockKey], pins: Container[BlockKey], blocks: dict[BlockKey, Block]
    ) -> None:
        self._chain, self._held, self._pins, self._blocks = chain, held, pins, blocks

    def __contains__(self, key: object) -> bool:
        stays = key in self._chain or key in self._held or key in self._pins
        return stays or self._blocks[key].copying_to is not None  # type: ignore[index]
