"""What every tier must do. Subclass in a test module and say how a tier is made, filled and relieved."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import pytest

from tiered_kv import blocks
from tiered_kv.blocks import Location
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.log import LogTier, Record, Refusal


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


class LogTierContract(TierContract):
    """What every tier of append-only segments must do beside that. Its locations are its blocks."""

    @abstractmethod
    def record(self, number: int, nbytes: int) -> Record:
        """Block `number` as a frame of `nbytes`, with a parent and a root; always the same."""

    def put(self, tier: LogTier, number: int, nbytes: int) -> Location | None:
        return tier.append([self.record(number, nbytes)])[0].location

    def take_away(self, tier: LogTier, block: Location) -> None:
        assert tier.forget(block)

    def put_all(self, tier: LogTier, numbers: range, nbytes: int = 4096) -> dict[bytes, Location]:
        """Append blocks in one batch, for which there must be room; where each lies."""
        records = [self.record(number, nbytes) for number in numbers]
        return {record.key: answer.location for record, answer in zip(records, tier.append(records), strict=True)}

    def assert_holds(self, tier: LogTier, held: dict[bytes, Location]) -> None:
        for key, location in held.items():
            assert tier.read(location, key).key == key

    def test_every_record_has_its_answer(self, tier: LogTier) -> None:
        records = [self.record(0, 4096), self.record(1, tier.max_frame_bytes + 1), self.record(2, 4096)]
        answers = tier.append(records)
        assert [answer.refused for answer in answers] == [None, Refusal.TOO_LARGE, None]
        self.assert_holds(tier, {record.key: answer.location for record, answer in zip(records, answers, strict=True) if answer.location})

    def test_the_largest_frame_fits_into_an_empty_tier(self, tier: LogTier) -> None:
        assert self.put(tier, 0, tier.max_frame_bytes) is not None

    def test_a_block_is_read_under_its_own_key_only(self, tier: LogTier) -> None:
        (key, location), (other, _) = self.put_all(tier, range(2)).items()
        assert tier.read(location, key).raw_bytes == location.raw_bytes
        with pytest.raises(TieredKVError) as caught:
            tier.read(location, other)
        assert caught.value.kind is Kind.CORRUPT

    def test_a_block_is_forgotten_once(self, tier: LogTier) -> None:
        location = self.put(tier, 0, 4096)
        assert [tier.forget(location), tier.forget(location)] == [True, False]

    def test_room_is_made_oldest_first_until_it_is_enough(self, tier: LogTier) -> None:
        keys = [self.record(number, 4096).key for number in range(len(self.fill(tier, 4096)))]
        while (segment := tier.needs_reclaim(4 * 4096)) is not None:
            gone = tier.keys_in(segment)
            assert gone == keys[: len(gone)]
            keys = keys[len(gone) :]
            assert tier.reclaim(segment) > 0
            assert tier.keys_in(segment) == []
        self.assert_holds(tier, self.put_all(tier, range(1000, 1004)))

    def test_the_next_owner_finds_everything_with_its_ancestry(self, tier: LogTier, tmp_path: Path) -> None:
        assert tier.recovered() == []
        records = {record.key: record for record in (self.record(number, 4096) for number in range(12))}
        held = self.put_all(tier, range(12))
        self.leave(tier)
        with self.make(tmp_path) as heir:
            recovered = heir.recovered()
            assert [block.info for block in recovered] == [record.info for record in records.values()]
            assert {block.key: block.location for block in recovered} == held
            assert heir.recovered() == []
            self.assert_holds(heir, held)
            heir.check()
            assert all(heir.forget(location) for location in held.values())

    @abstractmethod
    def leave(self, tier: LogTier) -> None:
        """Close the tier so that another can be made of what it holds."""
