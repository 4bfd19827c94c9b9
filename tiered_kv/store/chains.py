"""Parent links between blocks. A link exists only where the depths fit, so that following links always ends.

A link leads from a block to its parent, which may not be known yet. All linked children of a block have the same depth.
A block that is itself linked has a depth one less than its children. So depths fall along every path of links, and no path is a cycle.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from tiered_kv.blocks import BlockInfo
from tiered_kv.keys import BlockKey
from tiered_kv.store.movement import Block


class Chains:
    """The parent links of the store machine's `blocks`.

    A parent named by a worker, a disk folder or a checkpoint is a claim until it is linked.

    A block of unknown depth waits until its parent's depth is known. Until then it has no link.
    """

    def __init__(self, blocks: dict[BlockKey, Block]) -> None:
        self._blocks = blocks
        self._children: Counter[BlockKey] = Counter()  # number of linked children, also of unknown parents
        self._child_depth: dict[BlockKey, int] = {}
        self._waiting: dict[BlockKey, dict[BlockKey, None]] = {}  # by parent: children that need its depth

    def add(self, key: BlockKey, parent: BlockKey | None, root: BlockKey | None, depth: int | None) -> Block:
        """Add a block, or complete a block whose parent or depth was unknown. Returns the block.

        If the block's parent and depth are known already, they are kept, and the arguments are ignored.
        """
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = Block(parent, root)
        elif block.depth is None and (depth is not None or block.parent is None):  # a block found after a restart may lack its chain
            self._stop_waiting(key, block)
            block.parent, block.root = parent, root
        else:
            return block
        if depth is None or key in self._waiting:
            self._settle(key, depth)
        else:
            self._place(key, block, depth)
        return block

    def remove(self, key: BlockKey, block: Block) -> None:
        """Forget the link of a removed block. The links of its children stay."""
        parent = block.link
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent], self._child_depth[parent]
        self._stop_waiting(key, block)

    def is_last_block(self, key: BlockKey) -> bool:
        """Returns whether the block has no known child."""
        return key not in self._children and key not in self._waiting

    def to(self, last_block: BlockKey | None) -> frozenset[BlockKey]:
        """Returns the keys of the block `last_block` and of its ancestors, as far as they are known and linked."""
        chain = set()
        while last_block is not None and (block := self._blocks.get(last_block)) is not None:
            chain.add(last_block)
            last_block = block.link
        return frozenset(chain)

    def misplaced(self, claims: Sequence[BlockInfo]) -> str | None:
        """Check the blocks of one commit: every depth must be one more than its parent's.

        Returns the text of the first error, or None if there is none.
        """
        depths: dict[BlockKey, int | None] = {}
        if self._are_in_order(claims, depths):
            return None
        for key, _, _, depth in claims:
            if depths.setdefault(key, depth) != depth:
                return f"block {key.hex()} is committed twice, at the depths {depths[key]} and {depth}"
        for key, parent, _, depth in claims:
            above = self._blocks.get(parent) if parent is not None else None
            known = above.depth if above is not None and above.depth is not None else depths.get(parent) if parent is not None else -1
            if known is None and depth == 0 and parent is not None:
                return f"block {key.hex()} has parent {parent.hex()} and depth 0, but only a block without a parent has depth 0"
            if known is not None and depth != known + 1:
                of = f"parent {parent.hex()} at depth {known}" if parent is not None else "no parent"
                return f"block {key.hex()} has {of}, so its depth must be {known + 1}, got {depth}"
        return None

    def _are_in_order(self, claims: Iterable[BlockInfo], depths: dict[BlockKey, int | None]) -> bool:
        """Returns True if the depth of each claim fits its parent, which is known or claimed earlier in the list.

        This is the fast path of `misplaced`, in one pass. Writes the depth of each key to `depths`. False proves nothing: a
        parent may come later in the list.
        """
        blocks = self._blocks
        for key, parent, _, depth in claims:
            if parent is None:
                known: int | None = -1
            else:
                above = blocks.get(parent)
                known = depths.get(parent) if above is None or above.depth is None else above.depth
            if known is None or depth != known + 1 or depths.setdefault(key, depth) != depth:
                return False
        return True

    def _settle(self, key: BlockKey, depth: int | None) -> None:
        """Set the depth and the link of a block, and then of the blocks that waited for its depth."""
        due: list[tuple[BlockKey, int | None]] = [(key, depth)]
        while due:
            key, depth = due.pop()
            block = self._blocks[key]
            block.depth = self._depth_from_parent(block) if depth is None else depth
            if block.depth is None:
                if block.parent is not None:
                    self._waiting.setdefault(block.parent, {})[key] = None
                continue
            self._place(key, block, block.depth)
            due += [(child, block.depth + 1) for child in self._waiting.pop(key, ())]

    def _place(self, key: BlockKey, block: Block, depth: int) -> None:
        """Set the depth of a block, and link it to its parent if that contradicts no other link."""
        block.depth = depth
        parent = block.parent
        if parent is not None and self._fits(key, parent, depth):
            block.linked = True
            self._children[parent] += 1
            self._child_depth[parent] = depth

    def _depth_from_parent(self, block: Block) -> int | None:
        """Returns the depth that follows from the parent's depth, or None if the parent's depth is unknown."""
        if block.parent is None:
            return 0 if block.root is not None else None
        above = self._blocks.get(block.parent)
        return above.depth + 1 if above is not None and above.depth is not None else None

    def _fits(self, key: BlockKey, parent: BlockKey, depth: int) -> bool:
        """Returns whether the block `key` of known `depth` can be linked to `parent` without contradicting an existing link."""
        if parent == key:
            return False
        above = self._blocks.get(parent)
        if above is not None and above.depth is not None and above.depth + 1 != depth:
            return False
        return self._child_depth.get(parent, depth) == depth == self._child_depth.get(key, depth + 1) - 1

    def _stop_waiting(self, key: BlockKey, block: Block) -> None:
        if block.parent is None:
            return
        others = self._waiting.get(block.parent)
        if others is not None and key in others:
            del others[key]
            if not others:
                del self._waiting[block.parent]

    def check(self) -> None:
        """Assert that depths fall along all links, and that the counters agree with the blocks."""
        links = {key: block.link for key, block in self._blocks.items() if block.link is not None}
        assert links.keys() == {key for key, block in self._blocks.items() if block.linked}, "a block is linked to no parent"
        for key, parent in links.items():
            depth, above = self._blocks[key].depth, self._blocks.get(parent)
            assert depth is not None, f"block {key.hex()} has a link but no depth"
            assert self._child_depth[parent] == depth, f"block {key.hex()} has another depth than its siblings"
            fits = above is None or above.link is None or above.depth == depth - 1
            assert fits, f"block {key.hex()} is not one deeper than its parent"
        assert self._children == Counter(links.values())
        assert self._children.keys() == self._child_depth.keys()
        waiting = {(key, block.parent) for key, block in self._blocks.items() if block.depth is None and block.parent is not None}
        assert waiting == {(key, parent) for parent, keys in self._waiting.items() for key in keys}
        assert all(self._waiting.values())
