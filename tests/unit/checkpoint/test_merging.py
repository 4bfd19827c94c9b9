"""Several nodes' blocks as one list: whole chains only, the hottest first, every parent before its children."""

from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.checkpoint.merge import assign_writers, merge, without_descendants
from tiered_kv.keys import KEY_BYTES
from tiered_kv.node.checkpoints.steps import Snapshot, SnapshotEntry

ROOT, OTHER = bytes(KEY_BYTES), bytes([9]) * KEY_BYTES
CHAIN = 5


def key_of(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def seen(number: int, hits: int = 0, tier: int = 2, codec: int = 0, root: bytes = ROOT) -> SnapshotEntry:
    """Block `number`: every CHAIN numbers are a chain."""
    chain, depth = divmod(number, CHAIN)
    parent = key_of(chain * CHAIN + depth - 1) if depth else None
    return SnapshotEntry(key_of(number), parent, root, depth, tier, codec, 100, 100, hits)


def snapshot(*blocks: SnapshotEntry) -> Snapshot:
    return Snapshot(list(blocks), {})


def numbers(blocks) -> list[int]:
    return [int.from_bytes(block.best.key, "big") for block in blocks]


@given(st.lists(st.dictionaries(st.integers(0, 29), st.tuples(st.integers(0, 9), st.integers(1, 3), st.integers(0, 2))), max_size=3))
def test_chains_are_whole_and_ordered_by_heat(nodes) -> None:
    snapshots = {
        f"n{node}": snapshot(*(seen(number, hits, tier, codec) for number, (hits, tier, codec) in held.items()))
        for node, held in enumerate(nodes)
    }
    whole = merge(snapshots, {ROOT})
    there = {number for held in nodes for number in held}
    expected = {number for number in there if all(above in there for above in range(number // CHAIN * CHAIN, number))}
    assert set(numbers(whole.blocks)) == expected
    assert whole.orphans == len(there) - len(expected)
    before: set[int] = set()
    for block, number in zip(whole.blocks, numbers(whole.blocks), strict=True):
        assert block.depth == number % CHAIN
        assert number % CHAIN == 0 or number - 1 in before
        assert block.hits == sum(held[number][0] for held in nodes if number in held)
        assert sorted(block.holders) == [f"n{node}" for node, held in enumerate(nodes) if number in held]
        before.add(number)
    heats = [block.heat for block in whole.blocks]
    assert heats == sorted(heats, reverse=True)
    shares = assign_writers(whole.blocks)
    assert sorted(key for keys in shares.values() for key in keys) == sorted(block.best.key for block in whole.blocks)
    assert all(node in block.holders for node, keys in shares.items() for block in whole.blocks if block.best.key in keys)


def test_the_hottest_chain_comes_first_and_of_equals_the_last_used() -> None:
    told = snapshot(*map(seen, (5, 6)), *map(seen, (0, 1)), seen(10, 4), seen(11, 3))
    assert numbers(merge({"a": told}, {ROOT}).blocks) == [10, 11, 5, 6, 0, 1]


def test_the_best_copy_is_exact_then_near_and_its_holder_writes_first() -> None:
    whole = merge({"a": snapshot(seen(0, tier=2, codec=3)), "b": snapshot(seen(0, tier=3)), "c": snapshot(seen(0, tier=2))}, {ROOT})
    [block] = whole.blocks
    assert (block.best.tier, block.best.codec, block.holders[0]) == (2, 0, "c")


def test_a_parent_below_another_root_is_none_and_other_roots_are_left_out() -> None:
    whole = merge({"a": snapshot(seen(0, root=OTHER), seen(1), seen(5), seen(10, root=OTHER))}, {ROOT, OTHER})
    assert numbers(whole.blocks) == [5, 0, 10] or sorted(numbers(whole.blocks)) == [0, 5, 10]
    assert whole.orphans == 1
    assert numbers(merge({"a": snapshot(seen(0, root=OTHER), seen(5))}, {ROOT}).blocks) == [5]


def test_blocks_on_several_nodes_are_written_by_each_about_equally() -> None:
    both = [seen(number) for number in range(20)]
    whole = merge({"a": snapshot(*both), "b": snapshot(*both)}, {ROOT})
    assert sorted(map(len, assign_writers(whole.blocks).values())) in ([9, 11], [10, 10])
    assert assign_writers([]) == {}


def test_what_is_missing_takes_all_behind_it_along() -> None:
    whole = merge({"a": snapshot(*map(seen, range(10)))}, {ROOT})
    assert set(numbers(without_descendants(whole.blocks, {key_of(6)}))) == {*range(5), 5}
