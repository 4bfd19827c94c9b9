"""The interface of disk and objects tier: frames are appended to large segments and removed by whole segments."""

from abc import abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from tiered_kv.blocks import BlockInfo, Location
from tiered_kv.codecs.base import Buffer
from tiered_kv.codecs.frame import Frame
from tiered_kv.keys import BlockKey
from tiered_kv.tiers.base import StorageTier


class Record(NamedTuple):
    """A frame to write: its bytes in any number of buffers (see `encode_frame`), and the facts needed to find it again.

    Parent and root in `info` let a restarted node rebuild the chain; the depth is not written.
    """

    info: BlockInfo
    buffers: Sequence[Buffer]
    codec: int
    raw_bytes: int

    @property
    def key(self) -> BlockKey:
        """The block's key."""
        return self.info.key


class Refusal(StrEnum):
    """The reason why a frame was not written."""

    FULL = "full"  # no room under the cap now
    TOO_LARGE = "too large"  # larger than the cap allows at any time
    NO_SPACE = "no space"  # the file system or the user's quota is full
    IO_ERROR = "i/o error"


class AppendResult(NamedTuple):
    """The result for one appended frame: its location, or why it was refused. Exactly one of the two is None."""

    location: Location | None
    refused: Refusal | None


class RecoveredBlock(NamedTuple):
    """A block found in the segments of a former owner, without its depth. `error`: its coding error, 0 if none or unknown."""

    info: BlockInfo
    location: Location
    error: float = 0.0

    @property
    def key(self) -> BlockKey:
        """The block's key."""
        return self.info.key


class LogTier(StorageTier):
    """A tier of append-only segments. Calls of `append` run one at a time; `read` never waits for them."""

    segment_bytes: int
    """Approximate size of a full segment."""
    _capacity_bytes: int
    _used_bytes: int

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    @abstractmethod
    def max_frame_bytes(self) -> int:
        """Size in bytes of the largest frame that the tier can store."""

    @property
    @abstractmethod
    def next_segment(self) -> int:
        """The number of the next segment. Every block that was written so far is in a segment with a lower number."""

    @abstractmethod
    def append(self, records: Sequence[Record]) -> list[AppendResult]:
        """Write frames. Returns for each, in order, its location or why it was refused. No part of a refused frame can ever be read."""

    @abstractmethod
    def read(self, location: Location, key: BlockKey, namespace: bytes | None = None) -> Frame:
        """Read and verify the frame at `location`.

        Raises (kinds `storage`, `corrupt`) if the frame is missing or damaged. The caller counts both as a miss.
        """

    def carried(self, location: Location) -> float | None:
        """Returns the coding error in the frame header at `location`, without verifying the frame.

        Returns None if that would take a network request.
        """
        return None

    @abstractmethod
    def forget(self, location: Location) -> bool:
        """Drop the block at `location`. Returns False if no block was there."""

    @abstractmethod
    def recovered(self) -> list[RecoveredBlock]:
        """Returns the blocks that a former owner of the tier left, oldest first. They stay until `forget`.

        Call this once, before any other method.
        """

    @abstractmethod
    def needs_reclaim(self, nbytes: int, count: int | None = None) -> int | None:
        """Returns the segment to remove next (`reclaim`), if `count` frames of `nbytes` in total may not fit.

        Returns None if all frames fit, or if no segment can be reclaimed. Without `count`, frames of at least 1 KiB are assumed.
        """

    @abstractmethod
    def oldest_sealed(self) -> int | None:
        """Returns the oldest segment that is not being written, or None."""

    @abstractmethod
    def keys_in(self, segment: int) -> list[BlockKey]:
        """Returns the keys of a segment's live blocks, in the order written; [] if the segment no longer exists."""

    @abstractmethod
    def reclaim(self, segment: int) -> int:
        """Remove a sealed segment with all its blocks. Returns the bytes that this freed."""
