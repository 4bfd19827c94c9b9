"""A writer that is killed at any write of a word, the next writer, which repairs the index, and readers that run meanwhile."""

import pytest

from tiered_kv.blocks import Location, Tier
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.shared import NodeFiles


def restarted(node) -> tuple[NodeFiles, IndexWriter]:
    files = NodeFiles.attach(node.files.directory, writer=True)
    return files, IndexWriter(files)


class Killed(Exception):
    """Raised at the write at which the writer is killed."""


class DyingWords:
    """The words of a writer that is killed just before its n-th write."""

    def __init__(self, words, stores_left):
        self._words, self.stores_left = words, stores_left

    def __getitem__(self, word):
        return self._words[word]

    def __setitem__(self, word, value):
        if not self.stores_left:
            raise Killed
        self.stores_left -= 1
        self._words[word] = value


def test_a_restart_keeps_every_block_and_bumps_the_generation(start_node, kill, key, location):
    first = start_node()
    assert first.view.generation == 1
    for number in range(100):
        first.index.put(key(number), location(number))
    first.view.touch([first.view.lookup(key(number)) for number in (7, 3)])
    slots = [first.view.lookup(key(number)) for number in range(100)]
    kill(first)
    assert first.view.lookup(key(5)) is not None
    second = start_node()
    assert second.index.generation == first.view.generation == 2
    rebuilt = second.index.rebuild()
    assert rebuilt.kept == 100 and not any(rebuilt[1:])
    assert dict(second.index.items()) == {key(number): location(number) for number in range(100)}
    assert all(first.view.valid(slot) for slot in slots)
    assert [name for name, _, _ in second.index.harvest()] == [key(7), key(3)]


def test_the_state_distinguishes_a_shutdown_from_a_crash(start_node, kill):
    first = start_node()
    first.index.close_state()
    kill(first)
    assert not first.view.live
    start_node()
    assert first.view.live


def test_a_block_that_was_being_written_is_dropped(start_node, kill, key, location):
    first = start_node()
    for number in (1, 2, 3):
        first.index.put(key(number, home=4), location(number))
    slot = first.view.lookup(key(2, home=4))
    first.index._views.slot_words[slot.index * 8] += 1
    kill(first)
    second = start_node()
    assert second.index.rebuild()[:2] == (2, 1)
    assert [first.view.lookup(key(number, home=4)) is None for number in (1, 2, 3)] == [False, True, False]
    assert not first.view.valid(slot)


@pytest.mark.parametrize("home", [4, 252])
@pytest.mark.parametrize("stores", range(14))
@pytest.mark.parametrize("operation", ["put", "replace", "remove"])
def test_a_writer_killed_before_any_write_loses_at_most_that_block(start_node, kill, key, location, operation, stores, home):
    first = start_node()
    others = {key(number, home=home + number // 3): location(number) for number in range(8)}
    mine = key(50, home=home)
    if operation != "put":
        first.index.put(mine, location(50))
    for name, place in others.items():
        first.index.put(name, place)
    first.index._words = DyingWords(first.index._words, stores)
    try:
        if operation == "remove":
            first.index.remove(mine)
        else:
            first.index.put(mine, location(51))
    except Killed:
        pass
    kill(first)
    for name, place in others.items():
        seen = first.view.lookup(name)
        assert seen is None or Location(*seen[2:]) == place
    second = start_node()
    second.index.rebuild()
    second.index.check()
    kept = dict(second.index.items())
    found = kept.pop(mine, None)
    before, after = (None if operation == "put" else location(50)), (None if operation == "remove" else location(51))
    assert found in (None, before, after)
    assert kept == others
    for name, place in kept.items():
        assert Location(*first.view.lookup(name)[2:]) == place


def damage(node, slot: int, word: int, value: int) -> None:
    node.index._views.slot_words[slot * 8 + word] = value


def test_extents_out_of_bounds_and_unknown_tiers_are_dropped(start_node, kill, key, location):
    first = start_node()
    slots = [first.index.put(key(number), location(number)) for number in range(5)]
    first.index.put(key(9), Location(Tier.DISK, 0, 4, 2**40, 512, 512))
    damage(first, slots[0], 6, first.files.arena_bytes - 511)
    damage(first, slots[1], 6, 2**63)
    damage(first, slots[2], 5, 77)
    damage(first, slots[3], 7, 0)
    kill(first)
    second = start_node()
    rebuilt = second.index.rebuild()
    assert (rebuilt.kept, rebuilt.out_of_bounds) == (2, 4)
    assert {name for name, _ in second.index.items()} == {key(4), key(9)}


def test_host_extents_that_overlap_are_all_dropped(start_node, kill, key, location):
    first = start_node()
    first.index.put(key(1), location(0, stored_bytes=5000))
    first.index.put(key(2), location(1))
    first.index.put(key(3), location(4))
    first.index.put(key(4), location(40))
    first.index.put(key(5), location(40)._replace(tier=Tier.DISK))
    kill(first)
    second = start_node()
    rebuilt = second.index.rebuild()
    assert (rebuilt.kept, rebuilt.overlapping) == (2, 3)
    assert {name for name, _ in second.index.items()} == {key(4), key(5)}


def copy_slot(node, source: int, target: int) -> None:
    words = node.index._views.slot_words
    words[target * 8 + 1 : target * 8 + 8] = words[source * 8 + 1 : source * 8 + 8]


@pytest.mark.parametrize("equal", [True, False])
def test_two_slots_with_one_key_become_at_most_one(start_node, kill, key, location, equal):
    first = start_node()
    first.index.put(key(1, home=4), location(1))
    copy_slot(first, 4, 5)
    if not equal:
        damage(first, 5, 6, 0)
    kill(first)
    second = start_node()
    rebuilt = second.index.rebuild()
    assert (rebuilt.kept, rebuilt.duplicate) == ((1, 1) if equal else (0, 2))
    assert second.index.get(key(1, home=4)) == (location(1) if equal else None)


def test_unreachable_blocks_are_inserted_again(start_node, kill, key, location):
    first = start_node()
    first.index.put(key(1, home=4), location(1))
    first.index.put(key(2, home=9), location(2))
    copy_slot(first, 4, 20)
    damage(first, 4, 5, 0)
    assert first.view.lookup(key(1, home=4)) is None
    kill(first)
    second = start_node()
    rebuilt = second.index.rebuild()
    assert (rebuilt.kept, rebuilt.moved) == (2, 1)
    assert first.view.lookup(key(1, home=4)) is not None


@pytest.mark.parametrize("torn", [(0, 255), (254, 255, 0), (254, 0, 1), (255, 1)])
def test_several_torn_slots_are_never_shown(start_node, kill, key, location, torn):
    """These are more torn slots than one killed writer can leave. They wrap around the end of the table."""
    first = start_node()
    numbers = range(5)
    for number in numbers:
        first.index.put(key(number, home=254), location(number))
    assert first.files.slots == 256
    dropped = {bytes(first.index._key(slot)) for slot in torn}
    for slot in torn:
        damage(first, slot, 0, first.index._views.slot_words[slot * 8] + 1)
        damage(first, slot, 6, 4096)
    kill(first)
    second = start_node()
    second.index.rebuild()
    expected = {key(number, home=254): location(number) for number in numbers}
    assert dict(second.index.items()) == {name: place for name, place in expected.items() if name not in dropped}
