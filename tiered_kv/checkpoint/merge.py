"""What several nodes hold at their moments, as one list of whole chains, the hottest first."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.writer import Seen, Snapshot


@dataclass(slots=True)
class Block:
    """A block that some nodes hold. `best`: the copy that is nearest to what was stored. `heat`: of it and all that stand behind it."""

    best: Seen
    holders: list[str]
    hits: int
    heat: tuple[int, float]
    depth: int = -1  # -1: not known yet


@dataclass
class Merged:
    """Blocks, the hottest first and every parent before its children; `orphans` are those that were left out, for no one could hit them."""

    blocks: list[Block] = field(default_factory=list)
    orphans: int = 0


def merged(snapshots: Mapping[str, Snapshot], roots: Container[BlockKey]) -> Merged:
    """The blocks of all nodes below these roots whose chains are complete in the cluster.

    Hotter is what was used more often in the cluster, or more lately if that is the same; a block is as hot as the hottest
    that stands behind it. Cost: some 5 µs a block.
    """
    found: dict[BlockKey, Block] = {}
    for node, snapshot in snapshots.items():
        count = len(snapshot.blocks)
        for number, seen in enumerate(snapshot.blocks):
            if seen.root in roots:
                _add(found, node, seen, 1 - number / count)
    whole = [block for key, block in found.items() if _depth(found, key) >= 0]
    for block in sorted(whole, key=lambda block: -block.depth):
        if block.best.parent is not None:
            above = found[block.best.parent]
            above.heat = max(above.heat, block.heat)
    whole.sort(key=lambda block: (-block.heat[0], -block.heat[1], block.depth))
    return Merged(whole, len(found) - len(whole))


def _add(found: dict[BlockKey, Block], node: str, seen: Seen, lately: float) -> None:
    block = found.get(seen.key)
    if block is None:
        found[seen.key] = Block(seen, [node], seen.hits, (seen.hits, lately))
        return
    block.hits += seen.hits
    block.heat = (block.hits, max(block.heat[1], lately))
    if _preference(seen) < _preference(block.best):
        block.best = seen
        block.holders.insert(0, node)
    else:
        block.holders.append(node)


def _preference(seen: Seen) -> tuple[bool, bool, int]:
    """Smaller is better: its place in the chain is known, it lies there as it was stored, it lies in a faster tier."""
    return seen.parent is None and bool(seen.depth), seen.codec != 0, seen.tier


_NO_CHAIN = -2


def _depth(found: Mapping[BlockKey, Block], key: BlockKey) -> int:
    """How many blocks stand before one, if all of them are there and below its root; less than 0 if not. Remembered in the blocks."""
    chain: list[Block] = []
    depth = _NO_CHAIN
    at: BlockKey | None = key
    while at is not None and at in found and len(chain) <= len(found):
        block = found[at]
        if block.depth != -1:
            depth = block.depth
            break
        chain.append(block)
        at = block.best.parent
        if at is None and not block.best.depth:
            depth = -1  # the first of a chain: nothing stands before it
        elif at in found and found[at].best.root != block.best.root:
            break
    for block in reversed(chain):
        depth = depth + 1 if depth != _NO_CHAIN else _NO_CHAIN
        block.depth = depth
    return depth


def assigned(blocks: Sequence[Block]) -> dict[str, list[BlockKey]]:
    """Which node writes which of the blocks, in their order: each some node that holds it, all about as many bytes, chains together."""
    shares: dict[str, list[BlockKey]] = {node: [] for block in blocks for node in block.holders}
    load = dict.fromkeys(shares, 0)
    fair_bytes = sum(block.best.stored_bytes for block in blocks) / max(len(load), 1)
    writer = ""
    for block in blocks:
        if writer not in block.holders or load[writer] > fair_bytes:
            writer = min(block.holders, key=lambda node: load[node])
        load[writer] += block.best.stored_bytes
        shares[writer].append(block.best.key)
    return {node: keys for node, keys in shares.items() if keys}


def closed(blocks: Iterable[Block], missing: set[BlockKey]) -> list[Block]:
    """The blocks without those that are missing, and without all that stand behind one of these."""
    gone = set(missing)
    kept = []
    for block in blocks:
        if block.best.key in gone or block.best.parent in gone:
            gone.add(block.best.key)
        else:
            kept.append(block)
    return kept
