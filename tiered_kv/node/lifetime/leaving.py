"""The end of a node: it lists its blocks by value and writes blocks in memory to disk. Another node takes over its blocks."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tiered_kv.blocks import Tier
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.handover import EndReport, Inventory, ModelMessages
from tiered_kv.protocol.messages import BlockRun
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.store import events as ev
from tiered_kv.store.engine import IN_MEMORY
from tiered_kv.store.movement import Block

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

log = logging.getLogger(__name__)

RUN_BLOCKS_MAX = 256
STALLED_S = 1.0
PULL_AGAIN_S = 0.02
FLUSH_BLOCKS = 64
"""The number of blocks that are given to the disk's thread at once. The deadline is checked after each batch."""


def inventory(node: "Node") -> Inventory:
    """Returns the node's blocks, the most valuable first: blocks in memory in the order of its policy, then blocks in lower tiers.

    Blocks that only a mounted checkpoint has are left out: other nodes have mounted it too. Holds the engine's lock for about 5 µs a block.
    """
    with node.running():
        node.engine.drain_touches()
        return Inventory(list(_runs(_ranked(node), node.engine.machine.blocks)), _models(node))


def take_over(node: "Node", runs: Sequence[BlockRun], models: ModelMessages, wait_s: float) -> int:
    """Pull blocks from a node that is about to end. Returns, summed over the runs, how many leading blocks it then has."""
    for root in {run.root for run in runs} & models.keys():
        _introduce(node, root, models[root])
    deadline_s = time.monotonic() + wait_s
    return sum(_pull_whole(node, run, deadline_s) for run in runs)


def _pull_whole(node: "Node", run: BlockRun, deadline_s: float) -> int:
    """Pull a run again and again until this node has all its blocks, time is up, or no block has arrived for STALLED_S.

    One pull may not be enough, because room appears only as fast as the disk writes. Returns how many leading blocks this node has.
    """
    have, progress_s = 0, time.monotonic()
    while (left_s := _left(deadline_s)) > 0:
        count = node.pull(run, left_s)
        if count > have:
            have, progress_s = count, time.monotonic()
        if have == len(run.keys) or time.monotonic() - progress_s > STALLED_S:
            break
        time.sleep(PULL_AGAIN_S)
    return have


def flush(node: "Node", within_s: float) -> tuple[int, int]:
    """Write blocks that are not on disk to the disk tier, the most valuable first, until all are written or time is up.

    Returns how many blocks were written, and their bytes on disk. Does nothing unless the node has a disk whose folder stays.
    """
    if within_s <= 0 or not (node.storage.disk and node.storage.keeps_disk):
        return 0, 0
    deadline_s = time.monotonic() + within_s
    machine = node.engine.machine
    with node.running():
        node.engine.drain_touches()
        unsaved = [key for key in _ranked(node) if Tier.DISK not in machine.blocks[key].copies]
    for start in range(0, len(unsaved), FLUSH_BLOCKS):
        if not _is_written(node, unsaved[start : start + FLUSH_BLOCKS], deadline_s):
            break
    with node.engine.lock:
        saved = [machine.blocks[key].copies[Tier.DISK] for key in unsaved if machine.has(key, Tier.DISK)]
        return len(saved), sum(location.stored_bytes for location in saved)


def _is_written(node: "Node", keys: list[BlockKey], deadline_s: float) -> bool:
    """Copy blocks to disk. Returns whether all copies have ended by the deadline, with or without success."""
    blocks = node.engine.machine.blocks
    with node.engine.lock:
        node.engine.handle([ev.Ending(keys)])
        return node.engine.freed.wait_for(lambda: not any(_is_copied(blocks.get(key)) for key in keys), _left(deadline_s))


def end(node: "Node", flush_s: float) -> EndReport:
    """Flush the node within `flush_s`, close it, and delete its files. Returns how many blocks were kept, flushed and lost."""
    flushed, flushed_bytes = flush(node, flush_s)
    stays = Tier.DISK if node.storage.keeps_disk else None
    with node.engine.lock:
        found = [(block.copies.get(stays) if stays else None, block.best) for block in node.engine.machine.blocks.values()]
    kept = [location.stored_bytes for location, _ in found if location is not None]
    lost = [best.stored_bytes for location, best in found if location is None and best.tier is not Tier.CHECKPOINT]
    node.close(remove=True)
    return EndReport(node.node_id, len(kept), sum(kept), flushed, flushed_bytes, len(lost), sum(lost))


def _left(deadline_s: float) -> float:
    return max(deadline_s - time.monotonic(), 0.0)


def _is_copied(block: Block | None) -> bool:
    """Returns whether the block is being copied to disk."""
    return block is not None and block.copying_to is Tier.DISK


def _ranked(node: "Node") -> list[BlockKey]:
    """Returns the keys of all blocks, the most valuable first, except those that only a checkpoint has. Call with the engine's lock."""
    machine, now_s = node.engine.machine, node.clock.now_s()
    order = dict.fromkeys(key for tier in IN_MEMORY for key in machine.ranked(tier, now_s))
    below = [key for key, block in machine.blocks.items() if key not in order and min(block.copies) is not Tier.CHECKPOINT]
    below.sort(key=lambda key: (-machine.blocks[key].uses, machine.blocks[key].depth or 0))
    return [*order, *below]


def _runs(keys: Sequence[BlockKey], blocks: dict[BlockKey, Block]) -> Iterator[BlockRun]:
    """Yields the blocks as runs, in the order of their first blocks. Leaves out blocks whose root or depth is not known."""
    made: list[BlockRun] = []
    open_at: dict[BlockKey, int] = {}  # by last key of a run: its number
    for key in keys:
        block = blocks[key]
        if block.root is None or block.depth is None:
            continue
        at = open_at.pop(block.parent, None) if block.parent is not None else None
        run = made[at] if at is not None else None
        if run is not None and (run.root, run.nbytes) == (block.root, block.best.raw_bytes) and len(run.keys) < RUN_BLOCKS_MAX:
            run.keys.append(key)
        else:
            at = len(made)
            made.append(BlockRun(block.root, block.best.raw_bytes, block.parent, [key], block.depth))
        assert at is not None
        open_at[key] = at
    yield from made


def _models(node: "Node") -> ModelMessages:
    return {root: info.as_message() for root, info in node.storage.encoder.models().items()}


def _introduce(node: "Node", root: BlockKey, message: dict[str, Any]) -> None:
    """Introduce a model that came with another node's blocks. If that fails, its blocks are kept like those of an unknown model."""
    if root in node.storage.encoder.models():
        return
    try:
        node.introduce(root, ModelInfo.of_message(message))
    except TieredKVError as error:
        log.warning("a model whose blocks are handed over cannot be used here: %s", error)
