"""Runs: records (frames to write) that are appended together, as neighbouring frames of one segment."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from tiered_kv.codecs.base import byte_view
from tiered_kv.codecs.frame import carried_error
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, Entry
from tiered_kv.tiers.disk.segment_table import room
from tiered_kv.tiers.log import Record


class Unwritten(NamedTuple):
    """A record that is not written yet, its buffers as views, and the size of its frame in bytes."""

    record: Record
    views: list[memoryview]
    stored_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes in the segment: the entry and its frame."""
        return ENTRY_BYTES + self.stored_bytes

    def entry(self, offset: int) -> Entry:
        """Returns the entry to write for the frame. `offset`: the byte of the segment at which the frame will begin."""
        (key, parent, root, _), _, codec, raw_bytes = self.record
        return Entry(key, parent, root, codec, offset, self.stored_bytes, raw_bytes, carried_error(self.views[0]) or 0.0)


def unwritten(record: Record) -> Unwritten:
    """Prepare a record for writing. Raises ValueError if it has no bytes."""
    views = [byte_view(buffer) for buffer in record.buffers]
    nbytes = sum(map(len, views))
    if not nbytes:
        raise ValueError(f"append: a record must have bytes, got a frame without bytes for block {record.key.hex()}")
    return Unwritten(record, [view for view in views if len(view)], nbytes)


def that_fit(frames: Sequence[Unwritten], start: int, rows: int, file_bytes: int) -> list[Unwritten]:
    """Returns the leading frames that fit into a segment from byte `start` on.

    `rows`: how many frames the segment has already. `file_bytes`: how many bytes of the cap the segment may take.
    """
    ends = accumulate((frame.nbytes for frame in frames), initial=start)
    next(ends)
    fitting = 0
    for end in ends:
        if room(end, rows + fitting + 1) > file_bytes:
            break
        fitting += 1
    return list(frames[:fitting])
