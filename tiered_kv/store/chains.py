"""Which block is behind which: links that are made only where depths fit, so that whoever follows them comes to an end.

A link is from a block to its parent, which may be one that nobody has told yet. All linked children of a block have one depth, and a block
that is linked itself is less deep by one than its children. So depths fall along every way of links, and none of them is a cycle.
"""

from collections import Counter
from collections.abc import Iterable

from tiered_kv.keys import BlockKey
from tiered_kv.store.movement import Block


class Chains:
    """The links of the machine's `blocks`. What a worker, a disk folder or a checkpoint says of parents is a claim until it is a link.

    A block whose depth nobody has said waits for its parent's; until then it has no link.
    """

    def __init__(self, blocks: dict[BlockKey, Block]) -> None:
        self._blocks = blocks
        self._children: Counter[BlockKey] = Counter()  # linked ones, also of a block that is not known
        self._child_depth: dict[BlockKey, int] = {}
        self._waiting: dict[BlockKey, dict[BlockKey, None]] = {}  # by the parent whose depth they need

    def add(self, key: BlockKey, parent: BlockKey | None, root: BlockKey | None, depth: int | None) -> Block:
        """Returns the block, with the place that is claimed for it where nothing better was known."""
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = Block(parent, root)
        elif block.depth is None and (depth is not None or block.parent is None):  # what was found after a restart may have no past
            self._stop_waiting(key, block)
            block.parent, block.root = parent, root
        else:
            return block
        self._settle(key, depth)
        return block

    def remove(self, key: BlockKey, block: Block) -> None:
        """Forget the link of a block that is not known any more; those of its children stay."""
        if block.linked:
            self._children[block.parent] -= 1
            if not self._children[block.parent]:
                del self._children[block.parent], self._child_depth[block.parent]
        self._stop_waiting(key, block)

    def is_tail(self, key: BlockKey) -> bool:
        """Whether no block behind it is known."""
        return key not in self._children and key not in self._waiting

    def to(self, tail: BlockKey | None) -> frozenset[BlockKey]:
        """The block and its ancestors, as far up as they are known and linked."""
        chain = set()
        while tail is not None and (block := self._blocks.get(tail)) is not None:
            chain.add(tail)
            tail = block.link
        return frozenset(chain)

    def misplaced(self, claims: Iterable[tuple[BlockKey, BlockKey | None, int]]) -> str | None:
        """Says what is wrong with (key, parent, depth) of one commit; None if every depth is one more than its parent's."""
        claims = list(claims)
        depths: dict[BlockKey, int] = {}
        for key, _, depth in claims:
            if depths.setdefault(key, depth) != depth:
                return f"block {key.hex()} is committed at the depths {depths[key]} and {depth}"
        for key, parent, depth in claims:
            above = self._blocks.get(parent) if parent is not None else None
            known = above.depth if above is not None and above.depth is not None else depths.get(parent) if parent is not None else -1
            if known is None and depth == 0:
                return f"block {key.hex()} has the parent {parent.hex()} and the depth 0, which is that of a block without a parent"
            if known is not None and depth != known + 1:
                of = f"the parent {parent.hex()} at depth {known}" if parent is not None else "no parent"
                return f"block {key.hex()} has {of}, so that its depth must be {known + 1}, got {depth}"
        return None

    def _settle(self, key: BlockKey, depth: int | None) -> None:
        """Give a block its depth and its link, and then those that waited for it."""
        due = [(key, depth)]
        while due:
            key, depth = due.pop()
            block = self._blocks[key]
            block.depth = self._depth_behind(block) if depth is None else depth
            if block.depth is None:
                if block.parent is not None:
                    self._waiting.setdefault(block.parent, {})[key] = None
                continue
            if self._fits(key, block):
                block.linked = True
                self._children[block.parent] += 1
                self._child_depth[block.parent] = block.depth
            due += [(child, block.depth + 1) for child in self._waiting.pop(key, ())]

    def _depth_behind(self, block: Block) -> int | None:
        """The depth that follows from a block's parent; None if that is not known."""
        if block.parent is None:
            return 0 if block.root is not None else None
        above = self._blocks.get(block.parent)
        return above.depth + 1 if above is not None and above.depth is not None else None

    def _fits(self, key: BlockKey, block: Block) -> bool:
        """Whether a block of known depth can be linked to its parent without a doubt about any other link."""
        if block.parent is None or block.parent == key:
            return False
        above = self._blocks.get(block.parent)
        if above is not None and above.depth is not None and above.depth + 1 != block.depth:
            return False
        return self._child_depth.get(block.parent, block.depth) == block.depth == self._child_depth.get(key, block.depth + 1) - 1

    def _stop_waiting(self, key: BlockKey, block: Block) -> None:
        others = self._waiting.get(block.parent) if block.parent is not None else None
        if others is not None and key in others:
            del others[key]
            if not others:
                del self._waiting[block.parent]

    def check(self) -> None:
        """Assert that depths fall along all links, and that what is kept in two places agrees."""
        linked = {key: block for key, block in self._blocks.items() if block.linked}
        for key, block in linked.items():
            above = self._blocks.get(block.parent)
            assert block.depth is not None, f"block {key.hex()} has a link and no depth"
            assert self._child_depth[block.parent] == block.depth, f"block {key.hex()} is not as deep as its siblings"
            assert above is None or not above.linked or above.depth + 1 == block.depth, f"block {key.hex()} is not behind its parent"
        assert self._children == Counter(block.parent for block in linked.values())
        assert self._children.keys() == self._child_depth.keys()
        waiting = {(key, block.parent) for key, block in self._blocks.items() if block.depth is None and block.parent is not None}
        assert waiting == {(key, parent) for parent, keys in self._waiting.items() for key in keys}
        assert all(self._waiting.values())
