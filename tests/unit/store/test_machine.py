"""Single decisions of the store machine for host and disk, one test each."""

import pytest

from tests.unit.store.story import DISK, HOST, ROOT, Story
from tests.unit.store.world import HOST_BYTES, key_of
from tiered_kv.blocks import BlockInfo
from tiered_kv.store import events as ev


@pytest.fixture
def story() -> Story:
    return Story(HOST, DISK)


def test_a_demoted_block_is_shown_on_disk_before_its_host_bytes_are_free(story: Story) -> None:
    story.commit(1)
    story.need()
    assert story.tiers(1) == {HOST}, "until the copy is there"
    copy = story.world.copies.pop()
    said = story.tell(ev.Copied(copy.key, story.world.place(DISK, copy.key)))
    assert [type(each) for each in said] == [ev.Show, ev.Free]


def test_a_promoted_block_keeps_its_disk_copy_so_that_its_eviction_writes_nothing(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.use(1)
    copy = story.world.copies.pop()
    story.tell(ev.Copied(copy.key, story.world.place(HOST, copy.key)))
    assert story.tiers(1) == {HOST, DISK}
    story.need()
    assert story.tiers(1) == {DISK}
    assert not story.world.copies
    assert story.machine.counts["host_freed"] == 1


def test_a_block_on_disk_is_promoted_once_however_often_it_is_touched(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.use(1)
    story.use(1)
    assert len(story.world.copies) == 1


def test_a_block_that_the_disk_refused_stays_until_memory_is_needed(story: Story) -> None:
    story.commit(1)
    story.need()
    story.tell(ev.CopyFailed(story.world.copies.pop().key, DISK))
    assert story.tiers(1) == {HOST}
    story.need()
    assert story.tiers(1) == set()
    assert not story.world.copies
    assert (story.machine.counts["demote_failed"], story.machine.counts["dropped"]) == (1, 1)


def test_a_growing_chain_may_be_demoted_but_is_not_dropped_for_itself(story: Story) -> None:
    story.commit(2, 1)
    story.tell(ev.Needed(HOST, 1, key_of(2)))
    story.tell(ev.CopyFailed(story.world.copies.pop().key, DISK))
    assert story.tell(ev.Needed(HOST, 1, key_of(2))) == []
    assert story.tiers(2) == {HOST}


def test_a_block_that_is_read_keeps_its_host_bytes(story: Story) -> None:
    story.commit(1)
    story.tell(ev.Needed(HOST, 1), ev.Pinned(key_of(1)))
    copy = story.world.copies.pop()
    story.tell(ev.Copied(copy.key, story.world.place(DISK, copy.key)))
    assert story.tell(ev.Needed(HOST, HOST_BYTES), ev.Crowded(1)) == []
    assert story.tiers(1) == {HOST, DISK}
    story.tell(ev.Unpinned(key_of(1)), ev.Needed(HOST, HOST_BYTES))
    assert story.tiers(1) == {DISK}


def test_a_block_may_be_removed_from_disk_during_a_read_and_stored_again(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.tell(ev.Pinned(key_of(1)))
    story.lose(1)
    story.commit(1)
    story.tell(ev.Unpinned(key_of(1)), ev.Needed(HOST, 1))
    assert len(story.world.copies) == 1, "no pin is left"


def test_a_late_failure_does_not_remove_a_newer_copy(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.use(1)
    late = story.world.copies.pop()
    story.lose(1)
    story.commit(1)
    story.demote(1)
    story.tell(ev.CopyFailed(late.key, late.target), ev.Lost(late.key, late.source))
    assert story.tiers(1) == {DISK}


def test_a_late_promotion_of_a_recommitted_block_is_discarded(story: Story) -> None:
    story.commit(1)
    story.demote(1)
    story.use(1)
    late = story.world.copies.pop()
    story.commit(1)
    said = story.tell(ev.Copied(late.key, story.world.place(HOST, late.key)))
    assert [type(each) for each in said] == [ev.Free]
    assert story.tiers(1) == {HOST, DISK}


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_late_promotion_does_not_end_the_protection_of_a_demotion(story: Story, succeeds: bool) -> None:
    story.commit(1)
    story.demote(1)
    story.use(1)
    late = story.world.copies.pop()
    story.lose(1)
    story.commit(1)
    story.need()
    story.tell(ev.Copied(late.key, story.world.place(HOST, late.key)) if succeeds else ev.CopyFailed(late.key, late.target))
    assert story.tell(ev.Needed(HOST, 1), ev.Crowded(1)) == []
    assert len(story.world.copies) == 1


def test_a_block_found_on_disk_after_a_restart_learns_its_parent(story: Story) -> None:
    story.tell(ev.Recovered(BlockInfo(key_of(2), None, None), story.world.place(DISK, key_of(2))))
    story.commit(2)
    block = story.machine.blocks[key_of(2)]
    assert (block.parent, block.root) == (key_of(1), ROOT)


def test_a_full_index_drops_blocks_of_all_tiers_but_not_the_growing_chain(story: Story) -> None:
    story.commit(2, 1, 3)
    story.demote(2)
    story.use(2)
    copy = story.world.copies.pop()
    story.tell(ev.Copied(copy.key, story.world.place(HOST, copy.key)))
    story.tell(ev.Crowded(3, key_of(3)))
    assert [story.tiers(number) for number in (1, 2, 3)] == [{HOST}, set(), {HOST}]


def test_without_a_disk_blocks_are_dropped_leaf_first() -> None:
    story = Story(HOST)
    story.commit(1, 2, 4)
    story.tell(ev.Needed(HOST, 2 * HOST_BYTES))
    assert [bool(story.tiers(number)) for number in (1, 2, 4)] == [True, False, False]
