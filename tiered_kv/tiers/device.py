"""The device tier (hot): extents of a device pool, raw, without headers, for nothing of it outlives the node."""

import torch

from tiered_kv import blocks
from tiered_kv.memory.pool import DevicePool
from tiered_kv.tiers.extent import ExtentTier


class DeviceTier(ExtentTier):
    """Extents for payloads in a pool, which is the caller's to close. Offsets are those of payloads in the pool's tensor.

    The cap is the pool's size and cannot be passed. A restarted node starts with an empty tier. Copies from or to an
    extent must have been waited for before it is freed.
    """

    name = blocks.Tier.DEVICE.label

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool
        super().__init__(pool.nbytes)

    def payload(self, offset: int, nbytes: int) -> torch.Tensor:
        """The payload as a uint8 tensor on the device; shares the pool's memory."""
        return self.pool.extent(offset, nbytes)

    def close(self) -> None:
        """Nothing to let go of: the pool is closed by whoever opened it."""
