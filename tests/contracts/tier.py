"""What every tier must do. Subclass in a test module and say how a tier is made, filled and relieved."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import pytest

from tiered_kv import blocks


class TierContract:
    """A suite; a block is known by whatever `put` returns."""

    @abstractmethod
    def make(self, folder: Path) -> Any:
        """A new, empty tier that holds at least two blocks of 4096 bytes."""

    @abstractmethod
    def put(self, tier: Any, number: int, nbytes: int) -> object | None:
        """Place the block `number`; None if the tier has no room for it."""

    @abstractmethod
    def take_away(self, tier: Any, block: object) -> None:
        """Give the block's room back."""

    @pytest.fixture
    def tier(self, tmp_path: Path):
        tier = self.make(tmp_path)
        yield tier
        tier.check()
        tier.close()

    def fill(self, tier: Any, nbytes: int) -> list[object]:
        placed: list[object] = []
        while (block := self.put(tier, len(placed), nbytes)) is not None:
            placed.append(block)
            assert tier.used_bytes <= tier.capacity_bytes
        return placed

    def test_has_a_known_name(self, tier: Any) -> None:
        assert tier.name in [known.label for known in blocks.Tier]

    def test_counts_what_it_holds(self, tier: Any) -> None:
        before = tier.used_bytes
        assert self.put(tier, 0, 4096) is not None
        assert before + 4096 <= tier.used_bytes <= tier.capacity_bytes
        tier.check()

    def test_a_full_tier_refuses_and_stays_below_its_cap(self, tier: Any) -> None:
        assert len(self.fill(tier, 4096)) >= 2
        assert self.put(tier, 10_000, 4096) is None
        tier.check()

    def test_a_block_that_can_never_fit_is_refused(self, tier: Any) -> None:
        before = tier.used_bytes
        assert self.put(tier, 0, tier.capacity_bytes + 1) is None
        assert tier.used_bytes == before

    def test_room_that_is_given_back_is_used_again(self, tier: Any) -> None:
        for block in self.fill(tier, 4096):
            self.take_away(tier, block)
        tier.check()
        assert self.put(tier, 20_000, 4096) is not None

    def test_closing_twice_does_nothing(self, tier: Any) -> None:
        tier.close()
        tier.close()
