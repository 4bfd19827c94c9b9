"""Commits: makes the blocks visible that a worker or a peer has stored."""

from typing import TYPE_CHECKING

from tiered_kv.blocks import Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.packed import Packed, runs_of_packed
from tiered_kv.store import events as ev

if TYPE_CHECKING:
    from tiered_kv.node.node import Node


def commit(node: "Node", packed: list[Packed], now_s: float, *, note_touches: bool) -> list[bool]:
    """As `Node.commit`. Call with the engine's lock, while the node is open."""
    machine = node.engine.machine
    _check_depths(node, packed)
    if any(map(node.epochs.is_closed, {each.info.root for each in packed})):
        node.free_extents(each.location.offset for each in packed)
        return []
    if note_touches:
        node.engine.note_touches()
    taken = packed[: _index_room_for(node, packed, now_s)]
    added = [not machine.has(each.info.key, Tier.HOST) for each in taken]
    for info, location, error, digest in taken:
        node.storage.sign(location, info, error, digest)
    node.engine.handle(runs_of_packed(taken, now_s))
    node.seals.committed([each.info.key for each in taken if each.digest is None])
    node.seals.mend_slots([each.info.key for each, is_new in zip(taken, added, strict=True) if not is_new])
    if len(taken) < len(packed):
        node.free_extents(each.location.offset for each in packed[len(taken) :])
    return added


def _check_depths(node: "Node", packed: list[Packed]) -> None:
    """Raise (kind `transport`), with all extents freed, if a depth is not the parent's plus 1: the parents might form a cycle."""
    wrong = node.engine.machine.chains.misplaced([each.info for each in packed])
    if wrong is not None:
        node.free_extents(each.location.offset for each in packed)
        raise TieredKVError(Kind.TRANSPORT, f"commit: no block was made visible: {wrong}")


def _index_room_for(node: "Node", blocks: list[Packed], now_s: float) -> int:
    """Make room in the index. Returns how many of the leading blocks it has room for."""
    if len(blocks) <= node.storage.index_room:
        return len(blocks)
    known = node.engine.machine.blocks
    missing = sum(each.info.key not in known for each in blocks) - node.storage.index_room
    if missing <= 0:
        return len(blocks)
    node.engine.handle([ev.Crowded(missing, blocks[0].info.parent, now_s)])
    room = node.storage.index_room
    for count, each in enumerate(blocks):
        room -= each.info.key not in known
        if room < 0:
            return count
    return len(blocks)
