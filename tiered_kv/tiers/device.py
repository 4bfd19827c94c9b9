"""The device tier (hot): extents of a device pool, raw, without headers, for nothing of it outlives the node."""

import torch

from tiered_kv import blocks
from tiered_kv.memory.extents import ExtentAllocator
from tiered_kv.memory.pool import DevicePool
from tiered_kv.tiers.base import Tier


class DeviceTier(Tier):
    """Extents for payloads in a pool, which is the caller's to close. Offsets are those of payloads in the pool's tensor.

    Not thread-safe: the engine's lock guards it. The cap is the pool's size and cannot be passed. A restarted node
    starts with an empty tier.
    """

    name = blocks.Tier.DEVICE.label

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool
        self.extents = ExtentAllocator(pool.nbytes)

    @property
    def capacity_bytes(self) -> int:
        return self.extents.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the pool in use, rounding and reservations not yet committed included."""
        return self.extents.used_bytes

    def fits(self, nbytes: int) -> bool:
        """Whether a payload of `nbytes` could be held by the tier if it were empty."""
        return nbytes <= self.capacity_bytes

    def reserve(self, nbytes: int, count: int) -> list[int]:
        """Offsets of up to `count` extents of `nbytes` each, side by side where possible."""
        return self.extents.allocate_run(nbytes, count)

    def free(self, offset: int) -> None:
        """Give the extent at `offset` back. Copies from or to it must have been waited for."""
        self.extents.free(offset)

    def payload(self, offset: int, nbytes: int) -> torch.Tensor:
        """The payload as a uint8 tensor on the device; shares the pool's memory."""
        return self.pool.extent(offset, nbytes)

    def check(self) -> None:
        """Assert that the allocator's books agree, and that the cap holds."""
        self.extents.check()
        assert 0 <= self.used_bytes <= self.capacity_bytes

    def close(self) -> None:
        """Nothing to let go of: the pool is closed by whoever opened it."""
