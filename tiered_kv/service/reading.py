"""Where a worker reads blocks: the node's shared memory and its disk segments, both without asking the node.

A block of the host tier is copied first and believed after: its slot's sequence number must be what it was before the
copy (a seqlock). A block on disk is believed because its frame's checksum binds it to its key.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from tiered_kv.blocks import Location, Tier
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.layout import KVLayout
from tiered_kv.memory.view import NodeView, Slot
from tiered_kv.service.packing import ArenaBlocks, Run, runs_of
from tiered_kv.tiers.segments import SegmentReader

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A block of a prompt that the index shows."""

    key: BlockKey
    slot: Slot


class BlockSource:
    """One worker's view of its node's blocks, for one layout."""

    def __init__(self, view: NodeView, segments: SegmentReader | None, layout: KVLayout) -> None:
        self._view = view
        self._segments = segments
        self._layout = layout
        self.arena = ArenaBlocks(view.arena, layout)
        self.invalidated = 0
        """Blocks that were changed while they were copied, so that the copy was thrown away."""

    def find(self, keys: Sequence[BlockKey]) -> list[Found]:
        """The leading keys that the index shows. About 0.7 µs a block, no call."""
        if not self._view.live:
            return []
        return list(map(Found, keys, self._view.lookup_leading(keys, self._layout.block_bytes)))

    def lookup_all(self, keys: Sequence[BlockKey]) -> list[Slot | None]:
        """For every key what the index shows."""
        if not self._view.live:
            return [None] * len(keys)
        return [self._view.lookup(key) for key in keys]

    def read(self, found: Sequence[Found], kv_L2HND: torch.Tensor, expired: Callable[[], bool]) -> list[Found]:
        """Copy the found blocks to the first tokens of `kv`; those that came whole, up to the first that did not.

        Disk blocks count as missing once `expired()`.
        """
        done = 0
        while done < len(found):
            if found[done].slot.tier == Tier.HOST:
                end = done
                while end < len(found) and found[end].slot.tier == Tier.HOST:
                    end += 1
                good = self._read_host(found[done:end], done, kv_L2HND)
            else:
                end, good = done + 1, int(not expired() and self._read_disk(found[done], done, kv_L2HND))
            if done + good < end and self._read_again(found[done + good].key, done + good, kv_L2HND, expired):
                good += 1
                end = done + good
            done += good
            if done < end:
                break
        return list(found[:done])

    def _read_host(self, found: Sequence[Found], first: int, kv: torch.Tensor) -> int:
        """Copy blocks of the arena; how many of them, from the first on, did not change during the copy."""
        for run in runs_of([each.slot.offset for each in found], first):
            self.arena.unpack(run, kv)
        _settle(kv)
        valid = self._view.valid
        for count, each in enumerate(found):
            if not valid(each.slot):
                self.invalidated += 1
                return count
        return len(found)

    def _read_disk(self, found: Found, block: int, kv: torch.Tensor) -> bool:
        if self._segments is None:
            return False
        slot = found.slot
        location = Location(Tier.DISK, slot.codec, slot.segment, slot.offset, slot.stored_bytes, slot.raw_bytes)
        try:
            raw = torch.empty(self._layout.block_bytes, dtype=torch.uint8)
            self._segments.read(location, found.key).decode(raw)
        except TieredKVError as error:
            log.info("block %s is not readable on disk: %s", found.key.hex(), error)
            return False
        ArenaBlocks(raw, self._layout).unpack(Run(block, 0, 0, 1), kv)
        return True

    def _read_again(self, key: BlockKey, block: int, kv: torch.Tensor, expired: Callable[[], bool]) -> bool:
        """One more try for a block that moved while it was read: it may be in another place by now."""
        found = self.find([key])
        if not found:
            return False
        if found[0].slot.tier == Tier.HOST:
            return self._read_host(found, block, kv) == 1
        return not expired() and self._read_disk(found[0], block, kv)

    def touch(self, used: Sequence[Found | Slot]) -> None:
        """Tell the policy what was used, the deepest block first."""
        if used:
            self._view.touch([each.slot if isinstance(each, Found) else each for each in reversed(used)])

    def tally(self, asked: int, hit: int) -> None:
        """Add to the node's count of blocks asked for and blocks had."""
        self._view.tally(asked, hit)

    @property
    def generation(self) -> int:
        """Which of the node's lives this is; read it before reserving, for `guard`."""
        return self._view.generation

    def guard(self, ranges: Sequence[tuple[int, int]], generation: int) -> AbstractContextManager[bool]:
        """Hold the reserved (offset, bytes) ranges of the arena while packing; false when the node has another life by now."""
        return self._view.guard(ranges, generation)

    @property
    def peers(self) -> int:
        """Other nodes that live, as far as this one knows."""
        return self._view.peers if self._view.live else 0

    @property
    def reason_of_miss(self) -> str:
        """Why a block that the index does not show is a miss."""
        return "not stored here, or evicted" if self._view.live else "the node is closed"

    @property
    def retries(self) -> int:
        """Look-ups and reads that met a block being changed."""
        return self._view.retries + self.invalidated

    def close(self) -> None:
        """Give mapped memory and open segments back."""
        self.arena = None
        self._view.close()
        if self._segments is not None:
            self._segments.close()


def _settle(kv: torch.Tensor) -> None:
    """Wait until the copies into `kv` have happened; on the CPU they have."""
    if kv.device.type != "cpu":
        torch.accelerator.synchronize(kv.device)
