"""Compressing blocks in place in host memory: the choice of blocks, the time, and the results."""

import pytest

from tests.unit.store.story import HOST, Story
from tests.unit.store.world import CODED_BYTES, HOST_BYTES, key_of, machine_of
from tiered_kv.blocks import BlockInfo, Tier
from tiered_kv.store import events as ev
from tiered_kv.store.shrinking import FULL_SHARE, STAGING_BYTES_MAX, Shrinking, staging_bytes


@pytest.fixture
def story() -> Story:
    """Host memory for eight blocks. Compression starts with the seventh block, because six are three quarters."""
    made = Story(HOST, host=8)
    made.machine = machine_of({HOST: 8 * HOST_BYTES}, shrinks=True)
    return made


def asked(story: Story) -> list[int]:
    """Returns the blocks for which compression is requested and not done, in the order of the requests."""
    numbers = {key_of(number): number for number in range(1, 64)}
    assert all(copy.target is copy.source.tier is Tier.HOST for copy in story.world.copies)
    return [numbers[copy.key] for copy in story.world.copies]


def code(story: Story, number: int) -> list[ev.Instruction]:
    """Finish the compression of this block, which then takes CODED_BYTES."""
    (copy,) = (copy for copy in story.world.copies if copy.key == key_of(number))
    story.world.copies.remove(copy)
    return story.tell(ev.Copied(copy.key, story.world.place(HOST, copy.key, coded=True)))


def test_nothing_is_compressed_before_memory_fills_up(story: Story) -> None:
    story.commit(1, 2, 3, 4, 5, 6)
    assert asked(story) == []
    story.commit(7)
    assert asked(story) == [1, 2, 3], "fewer would not gain what is above three quarters: of a block 44 bytes are expected"


def test_without_a_codec_nothing_is_compressed() -> None:
    story = Story(HOST, host=8)
    story.commit(*range(1, 9))
    story.need()
    assert asked(story) == []


def test_recently_used_blocks_are_compressed_last(story: Story) -> None:
    story.commit(1, 2, 3, 4, 5, 6)
    story.use(1, 2)
    story.commit(7)
    assert asked(story) == [3, 4, 5]


def test_the_deepest_block_of_a_run_is_compressed_first(story: Story) -> None:
    keys = [key_of(number) for number in (1, 2, 4, 8, 16, 32, 33)]
    story.tell(ev.Committed(bytes(32), None, keys, [story.world.place(HOST, key) for key in keys], 0.0))
    assert asked(story) == [33, 32, 16]


def test_a_compressed_block_takes_only_its_own_bytes(story: Story) -> None:
    story.commit(1, 2, 3, 4, 5, 6, 7)
    shown = code(story, 2)
    assert [type(each) for each in shown] == [ev.Show, ev.Free]
    assert story.machine.bytes_by_tier[HOST] == 6 * HOST_BYTES + CODED_BYTES
    assert story.machine.counts["shrunk"] == 1
    code(story, 1)
    story.commit(8)
    assert 1 not in asked(story), "coded twice"


def test_all_blocks_are_compressed_before_one_is_evicted(story: Story) -> None:
    story.commit(1, 2, 3, 4)
    story.need(HOST_BYTES)
    assert asked(story) == [1, 2, 3]
    story.need(HOST_BYTES)
    assert asked(story) == [1, 2, 3, 4]
    story.need(HOST_BYTES)
    assert len(story.machine.blocks) == 4, "each of these asks for what it needs, and leaves more"
    for number in (1, 2, 3, 4):
        code(story, number)
    story.need(HOST_BYTES)
    assert len(story.machine.blocks) == 2


def test_room_for_compressed_blocks_is_made_by_other_blocks_only(story: Story) -> None:
    story.commit(1, 2, 3, 4)
    story.need(HOST_BYTES, shrink=False)
    assert (asked(story), len(story.machine.blocks)) == ([], 3)


def test_a_block_that_is_being_read_stays_and_is_requested_again(story: Story) -> None:
    story.commit(1, 2, 3, 4, 5, 6, 7)
    story.tell(ev.Pinned(key_of(1)))
    story.world.pinned.append(key_of(1))
    assert [type(each) for each in code(story, 1)] == [ev.Free]
    story.world.pinned.remove(key_of(1))
    story.tell(ev.Unpinned(key_of(1)))
    code(story, 2)
    story.need(2 * HOST_BYTES)
    assert 1 in asked(story)


def test_after_a_failure_for_lack_of_room_nothing_is_tried_until_there_is_room(story: Story) -> None:
    story.commit(1, 2, 3, 4, 5, 6, 7)
    for copy in list(story.world.copies):
        story.world.copies.remove(copy)
        story.tell(ev.CopyFailed(copy.key, HOST))
    story.commit(8)
    assert asked(story) == []
    story.need(1, shrink=False)
    story.commit(9)
    assert asked(story)


def test_a_block_that_does_not_shrink_is_tried_once(story: Story) -> None:
    story.commit(1, 2, 3, 4, 5, 6, 7)
    for copy in list(story.world.copies):
        story.world.copies.remove(copy)
        story.tell(ev.CopyFailed(copy.key, HOST, again=False))
    story.commit(8)
    assert not {1, 2, 3} & set(asked(story))
    story.machine.shrinking.retry_all()
    story.need(HOST_BYTES)
    assert {1, 2, 3} & set(asked(story)), "another codec may do better"


def test_the_expected_gain_follows_earlier_gains() -> None:
    shrinking = Shrinking(1000)
    for number in range(4):
        shrinking.add(key_of(number), 100)
    assert [gain for _, gain in shrinking.choose(60, lambda key: False)] == [44, 44]
    shrinking.done(key_of(0), 20)
    shrinking.done(key_of(1), 20)
    assert [gain for _, gain in shrinking.choose(1, lambda key: False)] == [80]
    shrinking.check({key_of(2): 100, key_of(3): 100})


def test_a_copy_has_the_depth_of_its_block(story: Story) -> None:
    key, location = key_of(4), story.world.place(HOST, key_of(4))
    story.tell(ev.Committed(bytes(32), key_of(2), [key], [location], 0.0, 7))
    below = [key_of(8), key_of(16)]
    story.tell(ev.Committed(bytes(32), key, below, [story.world.place(HOST, each) for each in below], 0.0))
    story.tell(ev.Needed(HOST, 8 * HOST_BYTES))
    assert {copy.key: (copy.info.depth, copy.is_last_block) for copy in story.world.copies} == {
        key: (7, False),
        below[0]: (8, False),
        below[1]: (9, True),
    }


def test_blocks_recovered_without_parents_have_no_depth(story: Story) -> None:
    story.tell(ev.Recovered(BlockInfo(key_of(4), key_of(2), bytes(32)), story.world.place(HOST, key_of(4))))
    story.tell(ev.Needed(HOST, 8 * HOST_BYTES))
    assert [copy.info.depth for copy in story.world.copies] == [None]


def test_the_staging_area_is_a_small_part_of_memory() -> None:
    assert staging_bytes(1 << 30) == 64 << 20
    assert staging_bytes(1 << 40) == STAGING_BYTES_MAX
    assert staging_bytes(0) == 0
    assert FULL_SHARE < 1
