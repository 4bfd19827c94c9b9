"""What disk and object storage have in common: frames appended to large segments, removed by whole segments."""

from abc import abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from tiered_kv.blocks import Location
from tiered_kv.codecs.base import Buffer
from tiered_kv.codecs.frame import Frame
from tiered_kv.keys import BlockKey
from tiered_kv.tiers.base import Tier


class Record(NamedTuple):
    """A frame to be written: its bytes in any number of buffers (see `encode_frame`), and what must be known to find it again.

    `parent` and `root` (None: not known) let a restarted node know the chain.
    """

    key: BlockKey
    buffers: Sequence[Buffer]
    codec: int
    raw_bytes: int
    parent: BlockKey | None = None
    root: BlockKey | None = None


class Refused(StrEnum):
    """Why a frame was not written."""

    FULL = "full"  # under the cap there is no room now
    TOO_LARGE = "too large"  # under the cap there can never be room
    NO_SPACE = "no space"  # the file system is full, or the user's quota
    IO_ERROR = "i/o error"


class Appended(NamedTuple):
    """Where a frame lies now, or why it does not: exactly one of the two is None."""

    location: Location | None
    refused: Refused | None


class Recovered(NamedTuple):
    """A block that was found in the segments of a former owner, and the error that it carries (0: none, or not known)."""

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey | None
    location: Location
    error: float = 0.0


class LogTier(Tier):
    """A tier of append-only segments. `append` takes turns; `read` never waits for it."""

    segment_bytes: int
    """About how large a segment becomes."""

    @property
    @abstractmethod
    def max_frame_bytes(self) -> int:
        """The largest frame that there can ever be room for."""

    @abstractmethod
    def append(self, records: Sequence[Record]) -> list[Appended]:
        """Write frames; one answer for each, in order. Nothing of a refused frame can ever be read."""

    @abstractmethod
    def read(self, location: Location, key: BlockKey, namespace: bytes | None = None) -> Frame:
        """The verified frame at `location`; raises (kinds `storage`, `corrupt`) where it is not. Either is a miss."""

    def carried(self, location: Location) -> float | None:
        """The error that the header at `location` says its block carries, not verified; None where that would take a request."""
        return None

    @abstractmethod
    def forget(self, location: Location) -> bool:
        """The block at `location` is not wanted any more; False if it had not been there."""

    @abstractmethod
    def recovered(self) -> list[Recovered]:
        """Blocks of a former owner, oldest first; once, before anything else. They are live until `forget`."""

    @abstractmethod
    def needs_reclaim(self, nbytes: int, count: int | None = None) -> int | None:
        """The segment that must go before `count` frames of `nbytes` in all are sure to fit; None if they do, or nothing is left to go.

        Without `count` they are taken to be of 1 KiB or more each.
        """

    @abstractmethod
    def oldest_sealed(self) -> int | None:
        """The oldest segment that is not being written; None if there is none."""

    @abstractmethod
    def keys_in(self, segment: int) -> list[BlockKey]:
        """Keys of the live blocks of a segment, in the order written; none for a segment that is gone."""

    @abstractmethod
    def reclaim(self, segment: int) -> int:
        """Remove a sealed segment with all its blocks; gives the bytes that are free now."""
