"""The device tier (hot): raw extents of a device pool, without headers, because no block of this tier outlives the node."""

import torch

from tiered_kv import blocks
from tiered_kv.memory.pool import DevicePool
from tiered_kv.tiers.extent import ExtentTier


class DeviceTier(ExtentTier):
    """Allocates extents for payloads in a device pool, which the caller closes. An offset is that of a payload in the pool's tensor.

    The cap is the pool's size and cannot be exceeded. A restarted node starts with an empty tier. Wait for copies from or to
    an extent before you free it.
    """

    name = blocks.Tier.DEVICE.label

    def __init__(self, pool: DevicePool) -> None:
        self.pool = pool
        super().__init__(pool.nbytes)

    def payload(self, offset: int, nbytes: int) -> torch.Tensor:
        """Returns the payload as a uint8 device tensor that shares the pool's memory."""
        return self.pool.extent(offset, nbytes)

    def close(self) -> None:
        """Does nothing: the caller that opened the pool closes it."""
