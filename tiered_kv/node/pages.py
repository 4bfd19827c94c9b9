"""Pages of one layout in the host memory of a node of this process: reserved, filled token by token, and then blocks like others.

A page is the extent of a block. Until it is full it belongs to the slab's session; then it is committed under its key, and held
where it is (`Node.hold`) for as long as somebody's block table names it.
"""

import os
from collections.abc import Sequence

import torch

from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.layout import KVLayout
from tiered_kv.node.node import Node


class Slab:
    """The pages of one layout below one root. Not thread-safe."""

    def __init__(self, node: Node, layout: KVLayout, root: BlockKey) -> None:
        self._node = node
        self._layout = layout
        self._root = root
        self._session = node.open_session()

    def take(self, keys: Sequence[BlockKey | None]) -> list[int] | None:
        """A page for each of these blocks (None: one that is not full yet), by their offsets; None if not all can be had."""
        wanted = [key or os.urandom(KEY_BYTES) for key in keys]
        taken: list[int] = []
        while len(taken) < len(wanted):
            more = self._session.reserve(self._layout.block_bytes, wanted[len(taken) :], None)
            if not more:
                self.drop(taken)
                return None
            taken += more
        return taken

    def drop(self, offsets: Sequence[int]) -> None:
        """Give pages back that are not full."""
        self._session.release(list(offsets))

    def page(self, offset: int) -> torch.Tensor:
        """The page at `offset` as (L, 2, H, T, D); shares the slab's memory, and must not be kept."""
        payload = self._node.storage.host.payload(offset, self._layout.block_bytes)
        return payload.view(self._layout.torch_dtype).view(self._layout.block_shape)

    def publish(self, key: BlockKey, parent: BlockKey | None, depth: int, offset: int) -> bool:
        """Make a full page the block of `key`, and hold it; one that is there already is held instead, and the page is free.

        False where the index has no room; the page is free then.
        """
        with self._node.running():
            added = self._session.commit(self._root, self._layout.block_bytes, [(key, parent, offset, depth)])
            return bool(added) and bool(self._node.hold([key]))

    def hold(self, keys: Sequence[BlockKey]) -> int:
        """Hold the leading blocks that are in memory; how many."""
        return len(self._node.hold(keys))

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """End one `hold` of each block, the deepest first: they may leave now."""
        self._node.let_go(list(reversed(keys)))

    def offsets(self, keys: Sequence[BlockKey]) -> list[int]:
        """Where held blocks lie."""
        offsets = self._node.hold(keys)
        self._node.let_go(keys[: len(offsets)])
        return offsets

    def close(self) -> None:
        """Give back all pages that are not full."""
        self._session.close()
