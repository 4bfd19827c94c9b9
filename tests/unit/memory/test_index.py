"""The shared index: it equals a dict when read through another mapping; touches; limits."""

import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_kv.blocks import Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.index import IndexWriter
from tiered_kv.memory.shared import NodeFiles
from tiered_kv.memory.view import NodeView

SLOTS = 64

operations = st.lists(
    st.tuples(st.sampled_from(["put", "put", "remove", "touch"]), st.integers(0, 45), st.integers(0, 3)),
    max_size=160,
)
# Homes at the end of the table let clusters wrap round; few homes make them long.
homes = st.lists(st.sampled_from([0, 1, 5, 6, 61, 62, 63]), min_size=46, max_size=46)


@given(operations, homes)
@settings(max_examples=150, deadline=None)
def test_every_reader_sees_the_same_as_a_dict(key, location, operations, homes):
    with tempfile.TemporaryDirectory() as folder:
        files = NodeFiles.create(folder, "c", "n", 1 << 17)
        assert files.slots == SLOTS
        index, view = IndexWriter(files), NodeView.open(files.directory)
        model, touched = {}, {}
        try:
            for operation, number, variant in operations:
                name = key(number, homes[number])
                if operation == "put":
                    place = location(number * 4 + variant)
                    slot = index.put(name, place)
                    assert (slot is None) == (name not in model and len(model) == index.capacity_blocks)
                    if slot is not None:
                        model[name] = place
                elif operation == "remove":
                    assert index.remove(name) == (model.pop(name, None) is not None)
                    touched.pop(name, None)
                elif found := view.lookup(name):
                    view.touch([found])
                    touched.pop(name, None)  # the latest is the last
                    touched[name] = None
                assert len(index) == view.blocks == len(model)
            for number, home in enumerate(homes):
                name = key(number, home)
                slot = view.lookup(name)
                assert index.get(name) == model.get(name) == (slot and Location(*slot[2:]))
                assert slot is None or view.valid(slot)
            assert dict(index.items()) == model
            assert [name for name, _, _ in index.harvest()] == list(touched)
            index.check()
        finally:
            view.close()
            index.close()
            files.close()


@pytest.mark.parametrize("weakly_ordered", [False, True])
def test_all_fields_are_read_as_written(node, key, weakly_ordered, monkeypatch):
    monkeypatch.setattr("tiered_kv.memory.words.WEAKLY_ORDERED", weakly_ordered)
    place = Location(Tier.DISK, 255, 2**32 - 1, 2**62 + 5, 2**32 - 1, 2**32 - 2)
    index = node.index.put(key(2**64 - 1), place)
    slot = node.view.lookup(key(2**64 - 1))
    assert slot == (index, 2, *place)
    assert node.view.valid(slot) and node.index.get(key(2**64 - 1)) == place


@pytest.mark.parametrize(
    "wrong",
    [{"codec": 256}, {"segment": 2**32}, {"offset": -1}, {"stored_bytes": 0}, {"stored_bytes": 2**32}, {"raw_bytes": 2**32}, {"tier": 0}],
)
def test_a_location_too_large_for_a_slot_is_rejected(node, key, location, wrong):
    with pytest.raises(TieredKVError) as caught:
        node.index.put(key(1), location(1)._replace(**wrong))
    assert caught.value.kind is Kind.MEMORY
    assert len(node.index) == 0


def test_a_full_index_refuses_new_blocks_and_still_replaces_old_ones(node, key, location):
    capacity = node.index.capacity_blocks
    assert capacity == node.files.slots // 2
    for number in range(capacity):
        assert node.index.put(key(number), location(number)) is not None
    assert node.index.put(key(capacity), location(capacity)) is None
    assert node.view.lookup(key(capacity)) is None
    assert node.index.put(key(0), location(capacity)) is not None
    assert node.index.get(key(0)) == location(capacity)
    assert node.index.remove(key(1)) and node.index.put(key(capacity + 1), location(1)) is not None


def test_harvest_returns_touched_blocks_once_oldest_first(node, key, location):
    for number in range(5):
        node.index.put(key(number), location(number))
    slots = [node.view.lookup(key(number)) for number in range(5)]
    assert node.index.harvest() == []
    node.view.touch([slots[3], slots[1], slots[0]])
    node.view.touch([slots[3]])
    assert [(name, count) for name, count, _ in node.index.harvest()] == [(key(1), 1), (key(0), 1), (key(3), 2)]
    assert node.index.harvest() == []
    node.view.touch([slots[4]])
    node.view.touch([slots[4]])
    assert [(name, count) for name, count, _ in node.index.harvest()] == [(key(4), 2)]


def test_touches_move_and_end_with_their_block(node, key, location):
    for number in (1, 2, 3):
        node.index.put(key(number, home=9), location(number))
    node.view.touch([node.view.lookup(key(number, home=9)) for number in (3, 1)])
    node.index.remove(key(1, home=9))
    node.index.put(key(4, home=9), location(4))
    assert [(name, count) for name, count, _ in node.index.harvest()] == [(key(3, home=9), 1)]


def test_a_replaced_block_keeps_its_touches(node, key, location):
    node.index.put(key(1), location(1))
    node.view.touch([node.view.lookup(key(1))])
    node.index.put(key(1), Location(Tier.DISK, 0, 3, 77, 512, 512))
    assert [name for name, _, _ in node.index.harvest()] == [key(1)]


def test_a_slow_reader_sets_the_tick_back_without_losing_touches(node, key, location):
    for number in (1, 2, 3):
        node.index.put(key(number), location(number))
    header = node.view._header
    node.view.touch([node.view.lookup(key(1))] * 10)
    assert len(node.index.harvest()) == 1
    header[16] = 3  # stored late by a reader that had loaded it early
    node.view.touch([node.view.lookup(key(2))])
    assert [name for name, _, _ in node.index.harvest()] == [key(2)]
    node.view.touch([node.view.lookup(key(1))] * 10)
    header[16] = 2
    node.view.touch([node.view.lookup(key(3))])
    assert [name for name, _, _ in node.index.harvest()] == [key(3), key(1)]
    assert header[16] == 14


def test_a_touch_of_a_removed_block_counts_for_no_block(node, key, location):
    node.index.put(key(1), location(1))
    slot = node.view.lookup(key(1))
    node.index.remove(key(1))
    node.view.touch([slot])
    assert node.index.harvest() == []


def test_counts_wrap_instead_of_failing(node, key, location):
    node.index.put(key(1), location(1))
    slot = node.view.lookup(key(1))
    node.view._views.counts[slot.index] = 2**32 - 1
    node.view.touch([slot, slot])
    assert node.view._views.counts[slot.index] == 1


def test_readers_learn_the_nodes_state_from_the_header(node, key, location):
    assert (node.view.generation, node.view.live, node.view.peers, node.view.heartbeat_ns, node.view.blocks) == (1, True, 0, 0, 0)
    node.index.set_peers(3)
    node.index.beat(12345)
    node.index.put(key(1), location(1))
    assert (node.view.peers, node.view.heartbeat_ns, node.view.blocks) == (3, 12345, 1)
    node.index.close_state()
    assert not node.view.live
