"""The device tier on a CPU pool: extents of the pool, a hard cap, and payloads that the pool's readers can read."""

from pathlib import Path

import pytest
import torch

from tests.contracts.tier import TierContract
from tests.unit.tiers.records import content_of
from tiered_kv.memory.pool import DevicePool
from tiered_kv.tiers.device import DeviceTier

NBYTES = 64 << 10


class TestDeviceTier(TierContract):
    @pytest.fixture(autouse=True)
    def pools(self):
        self.opened: list[DevicePool] = []
        yield
        for pool in self.opened:
            pool.close()

    def make(self, folder: Path) -> DeviceTier:
        self.opened.append(DevicePool.create("cpu", NBYTES, folder))
        return DeviceTier(self.opened[-1])

    def put(self, tier: DeviceTier, number: int, nbytes: int) -> int | None:
        offsets = tier.reserve(nbytes, 1)
        if not offsets:
            return None
        tier.pool.copy_in(offsets[0], content_of(number, nbytes)).wait()
        return offsets[0]

    def take_away(self, tier: DeviceTier, block: int) -> None:
        tier.free(block)

    def test_payloads_are_what_other_openers_of_the_pool_read(self, tier, tmp_path):
        offsets = tier.reserve(5000, 3)
        for number, offset in enumerate(offsets):
            tier.payload(offset, 5000).copy_(content_of(number, 5000))
        with DevicePool.open(tmp_path) as reader:
            for number, offset in enumerate(offsets):
                assert torch.equal(reader.extent(offset, 5000), content_of(number, 5000))

    def test_the_cap_counts_rounding(self, tier):
        offsets = tier.reserve(1, 1000)
        assert len(offsets) == NBYTES // 512
        assert tier.used_bytes == tier.capacity_bytes == NBYTES

    def test_blocks_of_a_run_are_contiguous(self, tier):
        assert tier.reserve(4096, 4) == [0, 4096, 8192, 12288]

    @pytest.mark.parametrize(("nbytes", "fits"), [(1, True), (NBYTES, True), (NBYTES + 1, False)])
    def test_the_tier_reports_what_can_ever_fit(self, tier, nbytes, fits):
        assert tier.fits(nbytes) is fits
        assert bool(tier.reserve(nbytes, 1)) is fits
