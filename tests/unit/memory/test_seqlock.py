"""Interleavings of one writer and one reader, step by step. The tests set the writer's words directly."""

import pytest
import torch

from tiered_kv.blocks import Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory import words as w


def words_of(node):
    """Returns the words of all slots as the writer sees them."""
    return node.index._views.slot_words


def test_a_slot_that_is_being_written_is_a_miss_after_one_retry(node, key, location):
    slot = node.index.put(key(1), location(1))
    words_of(node)[slot * 8] += 1
    assert node.view.lookup(key(1)) is None
    assert (node.view.lookups, node.view.retries) == (1, 1)
    words_of(node)[slot * 8] += 1
    assert node.view.lookup(key(1)) is not None
    assert (node.view.lookups, node.view.retries) == (2, 1)


def test_blocks_after_a_slot_that_is_being_written_are_found(node, key, location):
    first = node.index.put(key(1, home=5), location(1))
    node.index.put(key(2, home=5), location(2))
    words_of(node)[first * 8] += 1
    assert node.view.lookup(key(2, home=5)) is not None
    words_of(node)[first * 8] += 1


def test_a_block_removed_during_its_read_is_invalid(node, key, location):
    node.index.put(key(1), location(1))
    slot = node.view.lookup(key(1))
    node.index.remove(key(1))
    assert not node.view.valid(slot)
    assert node.view.lookup(key(1)) is None


def test_a_slot_reused_for_another_block_is_invalid(node, key, location):
    node.index.put(key(1, home=3), location(1))
    slot = node.view.lookup(key(1, home=3))
    node.index.remove(key(1, home=3))
    assert node.index.put(key(2, home=3), location(1)) == slot.index
    assert not node.view.valid(slot)


def test_a_slot_reused_again_for_the_same_block_is_invalid(node, key, location):
    node.index.put(key(1), location(1))
    slot = node.view.lookup(key(1))
    node.index.remove(key(1))
    assert node.index.put(key(1), location(1)) == slot.index
    assert not node.view.valid(slot)
    assert node.view.valid(node.view.lookup(key(1)))


def test_a_block_that_moved_to_another_tier_is_invalid(node, key, location):
    node.index.put(key(1), location(1))
    slot = node.view.lookup(key(1))
    node.index.put(key(1), Location(Tier.DISK, 0, 1, 0, 512, 512))
    assert not node.view.valid(slot)
    assert node.view.lookup(key(1)).tier == Tier.DISK


def test_writing_the_same_entry_again_does_not_invalidate_readers(node, key, location):
    node.index.put(key(1), location(1))
    slot = node.view.lookup(key(1))
    node.index.put(key(1), location(1))
    assert node.view.valid(slot)


def test_a_shifted_block_is_invalid_in_its_old_slot_and_found_in_its_new_one(node, key, location):
    node.index.put(key(1, home=7), location(1))
    node.index.put(key(2, home=7), location(2))
    slot = node.view.lookup(key(2, home=7))
    node.index.remove(key(1, home=7))
    assert not node.view.valid(slot)
    moved = node.view.lookup(key(2, home=7))
    assert moved.index == slot.index - 1 and moved[2:] == slot[2:]


class Interrupting:
    """The words of a view. Runs the writer's action between two loads of a sequence number."""

    def __init__(self, words, at_load, action):
        self._words, self._at_load, self._action, self._loads = words, at_load, action, 0

    def __getitem__(self, word):
        self._loads += 1
        if self._loads == self._at_load:
            self._action()
        return self._words[word]


@pytest.mark.parametrize("at_load", [1, 2, 3, 4])
@pytest.mark.parametrize("act", ["replace", "remove", "reuse", "half"])
def test_a_write_between_any_two_loads_of_a_lookup_causes_at_most_a_miss(node, key, location, at_load, act):
    """Load 1 is before the read of the key, load 2 is after it, and loads 3 and 4 are those of the retry."""
    mine, other = key(1, home=2), key(2, home=2)
    old, new = location(1), location(2)
    slot = node.index.put(mine, old)

    def write():
        if act == "replace":
            node.index.put(mine, new)
        elif act == "half":
            words_of(node)[slot * 8] += 1
            words_of(node)[slot * 8 + 6] = new.offset
        else:
            node.index.remove(mine)
            if act == "reuse":
                node.index.put(other, new)

    real = node.view._words
    node.view._words = Interrupting(real, at_load, write)
    found = node.view.lookup(mine)
    node.view._words = real
    if found is None:
        assert act != "replace"
    elif at_load > 2:  # the second load came first, so the lookup was over before the writer acted
        assert Location(*found[2:]) == old and node.view.valid(found)
    else:
        assert act == "replace" and Location(*found[2:]) == new and node.view.valid(found)
    if act == "half" and words_of(node)[slot * 8] & 1:
        words_of(node)[slot * 8 + 6] = old.offset
        words_of(node)[slot * 8] += 1


def test_bytes_copied_while_the_extent_was_reused_are_detected(node, key, location):
    node.view.extent(512, 512).fill_(1)
    node.index.put(key(1), location(1))
    slot = node.view.lookup(key(1))
    half = node.view.extent(slot.offset, 256).clone()
    node.index.remove(key(1))
    node.view.extent(512, 512).fill_(2)
    node.index.put(key(2), location(1))
    rest = node.view.extent(slot.offset + 256, 256).clone()
    assert not torch.equal(half, rest)
    assert not node.view.valid(slot)


def test_a_damaged_table_without_an_empty_slot_ends_in_a_miss(node, key):
    words = words_of(node)
    for slot in range(node.files.slots):
        words[slot * 8 + 5] = 2
    assert node.view.lookup(key(1)) is None
    for slot in range(node.files.slots):
        words[slot * 8 + 5] = 0


def test_a_fence_can_be_called_any_number_of_times():
    for _ in range(3):
        w.fence()


def test_extents_are_views_of_the_arena(node):
    arena = node.view.arena
    assert arena.dtype == torch.uint8 and len(arena) == node.view.arena_bytes
    node.view.extent(1000, 24).fill_(9)
    assert arena[1000:1024].eq(9).all()
    run = node.view.extents(4096, 1024, 3, 100)
    assert run.shape == (3, 100) and run.stride() == (1024, 1)
    run[2].fill_(5)
    assert node.view.extent(4096 + 2048, 100).eq(5).all() and not arena[4096 + 2148]


def test_extents_out_of_bounds_are_rejected(node):
    size = node.view.arena_bytes
    node.view.extents(0, 0, 1, size)
    for call, arguments in [
        (node.view.extent, (size - 10, 11)),
        (node.view.extent, (-1, 1)),
        (node.view.extents, (0, 512, size // 512 + 1, 512)),
        (node.view.extents, (0, 512, 0, 512)),
        (node.view.extents, (0, -512, 2, 512)),
    ]:
        with pytest.raises(TieredKVError) as caught:
            call(*arguments)
        assert caught.value.kind is Kind.MEMORY


def test_a_closed_view_raises_and_its_tensors_stay_valid(node, key, location):
    node.index.put(key(1), location(1))
    slot = node.view.lookup(key(1))
    kept = node.view.extent(512, 512)
    node.view.close()
    node.view.close()
    kept.fill_(3)
    for use in (
        lambda: node.view.lookup(key(1)),
        lambda: node.view.valid(slot),
        lambda: node.view.touch([slot]),
        lambda: node.view.extent(0, 1),
        lambda: node.view.live,
        lambda: node.view.guard([(0, 1)], 1).__enter__(),
    ):
        with pytest.raises(TieredKVError) as caught:
            use()
        assert caught.value.kind is Kind.CLOSED
    node.view.check()
