"""Reconstruction of the uses of chains from touches of single blocks."""

from tests.unit.store.world import depth_of, key_of, parent_of
from tiered_kv.store.movement import Block
from tiered_kv.store.runs import REPEATS_MAX, uses_of

BLOCKS = {key_of(number): Block(parent_of(number), None, depth_of(number), linked=number > 1) for number in range(1, 32)}
NAMES = {key_of(number): number for number in range(1, 100)}


def uses(*touched: tuple[int, int, int]) -> list[list[int]]:
    """Returns the runs, as block numbers, for touches (number, count, tick)."""
    found = list(uses_of([(key_of(number), count, tick) for number, count, tick in touched], BLOCKS, 3.0))
    assert all(use.now_s == 3.0 for use in found)
    return [[NAMES[key] for key in use.keys] for use in found]


def test_a_chain_touched_deepest_first_is_one_use_root_first() -> None:
    assert uses((8, 1, 1), (4, 1, 2), (2, 1, 3), (1, 1, 4)) == [[1, 2, 4, 8]]


def test_two_chains_one_after_the_other_are_two_uses() -> None:
    assert uses((4, 1, 1), (2, 1, 2), (7, 1, 3), (3, 1, 4), (1, 1, 5)) == [[2, 4], [1, 3, 7]]


def test_a_gap_in_time_or_in_the_chain_ends_a_run() -> None:
    assert uses((4, 1, 1), (2, 1, 9)) == [[4], [2]]
    assert uses((8, 1, 1), (2, 1, 2)) == [[8], [2]]


def test_a_prefix_touched_more_often_was_also_used_alone() -> None:
    assert uses((4, 1, 5), (2, 3, 6), (1, 3, 7)) == [[1, 2], [1, 2], [1, 2, 4]]


def test_the_uses_counted_for_a_prefix_are_capped() -> None:
    assert uses((1, 1000, 1)) == [[1]] * REPEATS_MAX


def test_unknown_blocks_are_separate_runs() -> None:
    assert uses((64, 1, 1), (32, 1, 2)) == [[64], [32]]
    assert uses() == []
