"""Pages of one layout in the host memory of a node in this process.

A page is the extent of one block. It is reserved, filled token by token, and belongs to the allocator's session until it is full. Then it
is committed under its key and becomes a block like any other. `Node.hold` keeps it at its offset as long as a block table names it.
"""

import os
from collections.abc import Sequence

import torch

from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.layout import Layout
from tiered_kv.node.node import Node


class PageAllocator:
    """An allocator of pages for one layout and one root. Not thread-safe."""

    def __init__(self, node: Node, layout: Layout, root: BlockKey) -> None:
        self._node = node
        self._layout = layout
        self._root = root
        self._session = node.open_session()

    def take(self, keys: Sequence[BlockKey | None]) -> list[int] | None:
        """Reserve a page for each key. None stands for a block without a key, because it is not full yet.

        Returns the offsets of the pages, or None if there is no room for all of them.
        """
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
        """Free pages that are not full."""
        self._session.release(list(offsets))

    def page(self, offset: int) -> torch.Tensor:
        """Returns the page at `offset` as (L, 2, H, T, D). The tensor shares the node's memory; do not keep it."""
        payload = self._node.storage.host.payload(offset, self._layout.block_bytes)
        return payload.view(self._layout.torch_dtype).view(self._layout.block_shape)

    def publish(self, key: BlockKey, parent: BlockKey | None, depth: int, offset: int) -> bool:
        """Commit a full page as the block `key`, and hold it. If the block exists already, hold the existing one and free the page.

        Returns False, with the page freed, if the index has no room.
        """
        with self._node.running():
            added = self._session.commit(self._root, self._layout.block_bytes, [(key, parent, offset, depth)])
            return bool(added) and bool(self._node.hold([key]))

    def hold(self, keys: Sequence[BlockKey]) -> int:
        """Hold the leading blocks that are in host memory. Returns how many blocks were held."""
        return len(self._node.hold(keys))

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """End one `hold` of each block, the deepest first. Blocks that nobody else holds may then be evicted."""
        self._node.let_go(list(reversed(keys)))

    def offsets(self, keys: Sequence[BlockKey]) -> list[int]:
        """Returns the offsets of the leading blocks that are in host memory."""
        offsets = self._node.hold(keys)
        self._node.let_go(keys[: len(offsets)])
        return offsets

    def close(self) -> None:
        """Close the session. All pages that are not full are freed."""
        self._session.close()
