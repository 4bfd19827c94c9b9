"""What is appended in one go: records that become frames side by side in one segment."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from tiered_kv.codecs.base import byte_view
from tiered_kv.codecs.frame import carried_error
from tiered_kv.tiers.disk.books import room
from tiered_kv.tiers.disk.footer import ENTRY_BYTES, Entry
from tiered_kv.tiers.log import Record


class Unwritten(NamedTuple):
    """A record, its buffers as views, and the bytes of its frame."""

    record: Record
    views: list[memoryview]
    stored_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes in the segment: the frame and the entry in front of it."""
        return ENTRY_BYTES + self.stored_bytes

    def entry(self, offset: int) -> Entry:
        """What is said of the frame where it will begin at `offset`."""
        key, _, codec, raw_bytes, parent, root = self.record
        return Entry(key, parent, root, codec, offset, self.stored_bytes, raw_bytes, carried_error(self.views[0]) or 0.0)


def unwritten(record: Record) -> Unwritten:
    """A record as it will be written; raises ValueError for one without bytes."""
    views = [byte_view(buffer) for buffer in record.buffers]
    nbytes = sum(map(len, views))
    if not nbytes:
        raise ValueError("a frame without bytes")
    return Unwritten(record, [view for view in views if len(view)], nbytes)


def that_fit(frames: Sequence[Unwritten], start: int, rows: int, file_bytes: int) -> list[Unwritten]:
    """The first frames that fit behind byte `start` of a segment with so many rows, which may take `file_bytes` from the cap."""
    ends = accumulate((frame.nbytes for frame in frames), initial=start)
    next(ends)
    fitting = 0
    for end in ends:
        if room(end, rows + fitting + 1) > file_bytes:
            break
        fitting += 1
    return list(frames[:fitting])
