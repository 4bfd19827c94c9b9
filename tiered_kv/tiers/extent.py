"""Shared base of host and device tier: payloads in extents of one memory, with or without a header before each."""

from tiered_kv.memory.extents import ExtentAllocator
from tiered_kv.tiers.base import StorageTier


class ExtentTier(StorageTier):
    """A tier whose blocks are extents of one memory. Every offset is that of a payload, after its header.

    Not thread-safe: the engine's lock guards it.
    """

    header_bytes = 0
    """Bytes of the header before each payload."""

    def __init__(self, nbytes: int) -> None:
        self.extents = ExtentAllocator(nbytes)

    @property
    def capacity_bytes(self) -> int:
        return self.extents.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes in use: payloads, headers, rounding, and reservations not yet committed."""
        return self.extents.used_bytes

    def fits(self, nbytes: int) -> bool:
        """Whether a payload of `nbytes` would fit into the empty tier."""
        return self.header_bytes + nbytes <= self.capacity_bytes

    def reserve(self, nbytes: int, count: int) -> list[int]:
        """Reserve up to `count` extents of `nbytes` each, side by side if possible. Returns their payload offsets."""
        return [offset + self.header_bytes for offset in self.extents.allocate_run(self.header_bytes + nbytes, count)]

    def free(self, offset: int) -> None:
        """Free the extent of the payload at `offset`."""
        self.extents.free(offset - self.header_bytes)

    def check(self) -> None:
        """Assert that the allocator is consistent and the cap holds."""
        self.extents.check()
        assert 0 <= self.used_bytes <= self.capacity_bytes
