"""Bookkeeping of a disk tier: the blocks in each segment, and the bytes that the segment takes from the cap."""

from dataclasses import dataclass, field
from typing import NamedTuple

from tiered_kv import blocks
from tiered_kv.blocks import Location
from tiered_kv.keys import BlockKey
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, Entry, footer_bytes, pack_row
from tiered_kv.tiers.disk.writer import PAGE_BYTES, SegmentWriter


class LiveBlock(NamedTuple):
    """A block that is still stored in its segment: `forget` has not dropped it."""

    key: BlockKey
    stored_bytes: int


@dataclass(eq=False)
class Segment:
    """A segment file of `nbytes`, and its live blocks by offset, in the order written.

    While the segment is being written, it has a `writer`, and `rows` maps each frame's offset to its row of the future footer.
    """

    id: int
    nbytes: int = 0
    writer: SegmentWriter | None = None
    live: dict[int, LiveBlock] = field(default_factory=dict)
    rows: dict[int, bytes] = field(default_factory=dict)

    @property
    def room_bytes(self) -> int:
        """Bytes that the segment takes from the cap, including a footer that is still to be written."""
        return pages(self.nbytes) if self.writer is None else room(self.nbytes, len(self.rows))

    def place(self, entry: Entry) -> Location:
        """Record that a frame was written, so that its block is live. Returns the block's location."""
        self.live[entry.offset] = LiveBlock(entry.key, entry.stored_bytes)
        self.rows[entry.offset] = pack_row(entry)
        return location_of(self.id, entry)

    def check(self) -> None:
        """Assert that blocks and their entries do not overlap, and that a sealed segment has live blocks."""
        if self.writer is None:
            assert self.live, f"segment {self.id} is sealed and has no live block"
            assert not self.rows, f"segment {self.id} is sealed and keeps its rows"
        else:
            assert self.rows.keys() >= self.live.keys(), f"segment {self.id} has blocks without a row"
        end = 0
        for offset, live in sorted(self.live.items()):
            assert offset >= end + ENTRY_BYTES, f"blocks overlap at byte {offset} of segment {self.id}"
            end = offset + live.stored_bytes
        assert end <= self.nbytes, f"a block ends after segment {self.id}"


def pages(nbytes: int) -> int:
    """Returns the bytes that a file of `nbytes` takes from the cap."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def room(end: int, rows: int) -> int:
    """Returns the bytes that a segment takes from the cap, with `rows` frames of which the last ends at `end`."""
    return pages(end + footer_bytes(rows))


def location_of(segment: int, entry: Entry) -> Location:
    """Returns the location of an entry's frame."""
    return Location(blocks.Tier.DISK, entry.codec, segment, entry.offset, entry.stored_bytes, entry.raw_bytes)
