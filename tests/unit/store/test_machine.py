"""Single decisions of the store machine, each as one story."""

import pytest

from tests.unit.store.world import HOST_BYTES, World, key_of, parent_of
from tiered_kv.blocks import Tier
from tiered_kv.policy import LRUPolicy
from tiered_kv.store import events as ev
from tiered_kv.store.machine import StoreMachine

ROOT = bytes(32)


class Story:
    """A machine and its world; `tell` gives the instructions after they were carried out."""

    def __init__(self, has_disk: bool) -> None:
        self.machine = StoreMachine(LRUPolicy(), has_disk)
        self.world = World()

    def tell(self, *events: ev.Event) -> list[ev.Instruction]:
        said = []
        for event in events:
            instructions = self.machine.handle(event)
            self.world.carry_out(instructions)
            said += instructions
        self.machine.check()
        return said

    def commit(self, *numbers: int) -> None:
        for number in numbers:
            self.tell(ev.Committed(key_of(number), parent_of(number), ROOT, self.world.place(Tier.HOST, key_of(number))))

    def demote(self, number: int) -> None:
        """Let the oldest leaf, which must be `number`, go to disk."""
        self.tell(ev.Needed(Tier.HOST, 1))
        copy = self.world.copies.pop()
        assert (copy.key, copy.target) == (key_of(number), Tier.DISK)
        self.tell(ev.Copied(copy.key, self.world.place(Tier.DISK, copy.key)))

    def tiers(self, number: int) -> set[Tier]:
        block = self.machine.blocks.get(key_of(number))
        return set(block.copies) if block else set()


@pytest.fixture
def story() -> Story:
    return Story(has_disk=True)


def test_a_demoted_block_is_shown_on_disk_before_its_host_bytes_are_free(story: Story) -> None:
    story.commit(1)
    story.tell(ev.Needed(Tier.HOST, 1))
    assert story.tiers(1) == {Tier.HOST}, "until the copy is there"
    copy = story.world.copies.pop()
    said = story.tell(ev.Copied(copy.key, story.world.place(Tier.DISK, copy.key)))
    assert [type(each) for each in said] == [ev.Show, ev.Free]


def test_a_promoted_block_keeps_its_disk_copy_so_that_it_leaves_for_nothing(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.tell(ev.Touched(key_of(1)))
    copy = story.world.copies.pop()
    story.tell(ev.Copied(copy.key, story.world.place(Tier.HOST, copy.key)))
    assert story.tiers(1) == {Tier.HOST, Tier.DISK}
    story.tell(ev.Needed(Tier.HOST, 1))
    assert story.tiers(1) == {Tier.DISK}
    assert not story.world.copies
    assert story.machine.counts["host_freed"] == 1


def test_a_block_on_disk_is_promoted_once_however_often_it_is_touched(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.tell(*[ev.Touched(key_of(1))] * 3)
    assert len(story.world.copies) == 1


def test_a_block_that_the_disk_refused_stays_and_is_dropped_under_pressure(story: Story) -> None:
    story.commit(1)
    story.tell(ev.Needed(Tier.HOST, 1))
    story.tell(ev.CopyFailed(story.world.copies.pop().key, Tier.DISK))
    assert story.tiers(1) == {Tier.HOST}
    story.tell(ev.Needed(Tier.HOST, 1))
    assert story.tiers(1) == set()
    assert not story.world.copies
    assert (story.machine.counts["demote_failed"], story.machine.counts["dropped"]) == (1, 1)


def test_a_growing_chain_may_go_to_disk_but_is_not_dropped_for_itself(story: Story) -> None:
    story.commit(2, 1)
    story.tell(ev.Needed(Tier.HOST, 1, key_of(2)))
    story.tell(ev.CopyFailed(story.world.copies.pop().key, Tier.DISK))
    assert story.tell(ev.Needed(Tier.HOST, 1, key_of(2))) == []
    assert story.tiers(2) == {Tier.HOST}


def test_a_block_that_is_read_keeps_its_host_bytes(story: Story) -> None:
    story.commit(1)
    story.tell(ev.Needed(Tier.HOST, 1), ev.Pinned(key_of(1)))
    copy = story.world.copies.pop()
    story.tell(ev.Copied(copy.key, story.world.place(Tier.DISK, copy.key)))
    assert story.tell(ev.Needed(Tier.HOST, HOST_BYTES), ev.Crowded(1)) == []
    assert story.tiers(1) == {Tier.HOST, Tier.DISK}
    story.tell(ev.Unpinned(key_of(1)), ev.Needed(Tier.HOST, HOST_BYTES))
    assert story.tiers(1) == {Tier.DISK}


def test_a_block_may_go_from_disk_while_it_is_read_and_come_again(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.tell(ev.Pinned(key_of(1)), ev.Lost(key_of(1)))
    story.commit(1)
    story.tell(ev.Unpinned(key_of(1)), ev.Needed(Tier.HOST, 1))
    assert len(story.world.copies) == 1, "no pin is left"


def test_a_late_failure_does_not_take_the_copy_made_since(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.tell(ev.Touched(key_of(1)))
    late = story.world.copies.pop()
    story.tell(ev.Lost(key_of(1)))
    story.commit(1)
    story.demote(1)
    story.tell(ev.CopyFailed(late.key, late.target), ev.Lost(late.key, late.source))
    assert story.tiers(1) == {Tier.DISK}


def test_a_late_promotion_of_a_block_committed_anew_is_thrown_away(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.tell(ev.Touched(key_of(1)))
    late = story.world.copies.pop()
    story.commit(1)
    said = story.tell(ev.Copied(late.key, story.world.place(Tier.HOST, late.key)))
    assert [type(each) for each in said] == [ev.Free]
    assert story.tiers(1) == {Tier.HOST, Tier.DISK}


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_late_promotion_does_not_end_the_protection_of_a_demotion(story: Story, succeeds: bool) -> None:
    story.commit(1)
    story.demote(1)
    story.tell(ev.Touched(key_of(1)))
    late = story.world.copies.pop()
    story.tell(ev.Lost(key_of(1)))
    story.commit(1)
    story.tell(ev.Needed(Tier.HOST, 1))
    story.tell(ev.Copied(late.key, story.world.place(Tier.HOST, late.key)) if succeeds else ev.CopyFailed(late.key, late.target))
    assert story.tell(ev.Needed(Tier.HOST, 1), ev.Crowded(1)) == []
    assert len(story.world.copies) == 1


def test_a_block_found_on_disk_after_a_restart_learns_its_parent(story: Story) -> None:
    story.tell(ev.Committed(key_of(2), None, None, story.world.place(Tier.DISK, key_of(2))))
    story.commit(2)
    block = story.machine.blocks[key_of(2)]
    assert (block.parent, block.root) == (key_of(1), ROOT)


def test_crowding_drops_blocks_from_all_tiers_but_not_the_chain_that_grows(story: Story) -> None:
    story.commit(2, 1, 3)
    story.demote(2)
    story.tell(ev.Touched(key_of(2)))
    copy = story.world.copies.pop()
    story.tell(ev.Copied(copy.key, story.world.place(Tier.HOST, copy.key)))
    story.tell(ev.Crowded(3, key_of(3)))
    assert [story.tiers(number) for number in (1, 2, 3)] == [{Tier.HOST}, set(), {Tier.HOST}]


def test_without_a_disk_blocks_are_dropped_leaf_first() -> None:
    story = Story(has_disk=False)
    story.commit(1, 2, 4)
    story.tell(ev.Needed(Tier.HOST, 2 * HOST_BYTES))
    assert [bool(story.tiers(number)) for number in (1, 2, 4)] == [True, False, False]
