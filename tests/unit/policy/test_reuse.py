"""Tests of the reuse index: hazards against counts by hand, the Gittins index against all stopping ages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.policy import reuse
from tiered_kv.policy.reuse import CLASSES, ENDED, OCTAVES, ROWS, ReuseModel, gittins, hazards, merge_statistics

NONE = np.zeros(0, np.int64)
HAZARDS = st.lists(st.floats(0, 0.97), min_size=OCTAVES, max_size=OCTAVES)
EDGES_S = [0.0] + [reuse.FIRST_S * 2.0**n for n in range(OCTAVES - 1)]
ENDS_S = [*EDGES_S[1:], 2 * EDGES_S[-1]]


def octave(age_s: float) -> int:
    return max(at for at, edge_s in enumerate(EDGES_S) if edge_s <= age_s)


def rows(table: np.ndarray) -> np.ndarray:
    return table.reshape(ROWS, OCTAVES)


def learned(*intervals: tuple[int, float, int]) -> ReuseModel:
    model = ReuseModel()
    for kind, age_s, count in intervals:
        model.ended(np.full(count, kind), np.full(count, age_s))
    return model


def test_without_data_the_index_falls_with_age_as_in_lru():
    table = rows(ReuseModel().table(NONE, NONE.astype(float)))
    assert (np.diff(table[:CLASSES, 1:], axis=1) < 0).all()
    assert (table[:CLASSES] == table[0]).all(), "it must be the same for every class"


@given(HAZARDS)
def test_the_index_is_the_best_ratio_over_all_stopping_ages(hazard):
    index = gittins(np.array([hazard]))[0]
    for start in range(OCTAVES):
        best, alive, held_s = 0.0, 1.0, 0.0
        for octave in range(start, OCTAVES):
            used = alive * hazard[octave]
            held_s += (ENDS_S[octave] - EDGES_S[octave]) * (alive - used / 2)
            alive -= used
            best = max(best, (1 - alive) / held_s)
        assert index[start] == pytest.approx(best)


def test_much_data_outweighs_the_prior():
    used, open_ = np.zeros((1, OCTAVES)), np.zeros((1, OCTAVES))
    used[0, 4], used[0, 6], open_[0, 6] = 400_000, 300_000, 300_000
    hazard = hazards(used, open_)[0]
    assert hazard[4] == pytest.approx(0.4, abs=0.01)
    assert hazard[6] == pytest.approx(300_000 / (600_000 - 150_000), abs=0.01)
    assert hazard[3] < 0.001


def test_open_intervals_count_as_censored():
    used = np.zeros((1, OCTAVES))
    used[0, 3] = 10_000
    alone = hazards(used, np.zeros((1, OCTAVES)))[0, 3]
    open_ = np.zeros((1, OCTAVES))
    open_[0, 8] = 10_000
    assert hazards(used, open_)[0, 3] == pytest.approx(alone / 2, rel=0.05)


def test_a_class_with_few_observations_is_shrunk_to_its_coarser_class():
    kind, sibling = 0, 1  # the same uses and gap, but another answer length
    model = learned((kind, 100.0, 50_000))
    table = rows(model.table(NONE, NONE.astype(float)))
    assert table[sibling] == pytest.approx(table[kind], rel=0.2)
    empty = rows(ReuseModel().table(NONE, NONE.astype(float)))
    assert abs(table[sibling] - empty[sibling]).max() > 10 * abs(table[sibling] - table[kind]).max()


def test_blocks_used_again_after_a_pause_are_worth_more_at_that_age():
    table = rows(learned((7, 12.0, 20_000), (9, 0.2, 20_000)).table(NONE, NONE.astype(float)))
    before, at, after = table[7][[octave(1.0), octave(8.0), octave(120.0)]]
    assert at > before > after


def test_old_counts_fade():
    model = learned((7, 12.0, 1000))
    for _ in range(600):
        model.fade()
    assert model.table(NONE, NONE.astype(float)) == pytest.approx(ReuseModel().table(NONE, NONE.astype(float)), rel=0.01)


def test_blocks_of_ended_chains_are_worth_nothing():
    assert not rows(learned((7, 12.0, 1000)).table(NONE, NONE.astype(float)))[ENDED].any()


@pytest.mark.parametrize("within_s", [0.1, 3.0, 100.0, 1e9])
def test_an_expected_use_raises_the_index_until_it_is_due(within_s):
    table = rows(learned((7, 12.0, 1000)).table(NONE, NONE.astype(float)))
    row = table[reuse.expected_kind(within_s)]
    due = next((octave for octave in range(OCTAVES) if ENDS_S[octave] > within_s), OCTAVES - 1)
    usual = table[reuse.expected_kind(0.0)]
    assert (row[1 : due + 1] >= usual[1 : due + 1]).all()
    assert row[due] >= 0.9 / (ENDS_S[due] - EDGES_S[due]) * 0.999
    assert (row[due + 1 :] == usual[due + 1 :]).all()


def test_every_combination_of_buckets_is_a_kind_and_can_be_split_again():
    kinds = {
        int(reuse.kinds(np.array([uses], np.uint8), gap, hot, answer)[0])
        for uses in (1, 2, 3, 5, 9, 17)
        for gap in range(reuse.GAPS)
        for hot in range(reuse.HOTS)
        for answer in range(reuse.ANSWERS)
    }
    assert kinds == set(range(CLASSES))
    assert reuse.inherited(int(reuse.kinds(np.array([200], np.uint8), 3, 5, 2)[0])) == (3, 5)
    assert reuse.inherited(ENDED) == (0, 0)
    assert reuse.answered(np.array([1, 4, ENDED]), 300).tolist() == [2, 5, ENDED]


def test_statistics_of_nodes_add_up():
    one, two, both = learned((7, 12.0, 500)), learned((7, 12.0, 300), (30, 1.0, 50)), learned((7, 12.0, 800), (30, 1.0, 50))
    open_ = (np.array([7, 8]), np.array([5.0, 900.0]))
    merged = merge_statistics([one.statistics(*open_), two.statistics(NONE, NONE.astype(float))])
    assert merged == both.statistics(*open_)
    alone = ReuseModel()
    alone.adopt(merged)
    assert alone.table(NONE, NONE.astype(float)) == pytest.approx(both.table(*open_))


def test_adopted_statistics_replace_earlier_ones_and_are_not_passed_on():
    model = learned((7, 12.0, 500))
    own = model.statistics(NONE, NONE.astype(float))
    model.adopt(learned((9, 1.0, 10)).statistics(NONE, NONE.astype(float)))
    model.adopt(merge_statistics([]))
    assert model.statistics(NONE, NONE.astype(float)) == own
    assert (model.table(NONE, NONE.astype(float)) == learned((7, 12.0, 500)).table(NONE, NONE.astype(float))).all()


def test_statistics_are_a_few_tens_of_kilobytes():
    model = ReuseModel()
    for kind in range(CLASSES):
        model.ended(np.array([kind]), np.array([3.0]))
    assert len(model.statistics(NONE, NONE.astype(float))) <= 165_000
    few = learned(*((kind, 3.0, 5) for kind in range(0, CLASSES, 6)))
    assert len(few.statistics(NONE, NONE.astype(float))) <= 30_000


@pytest.mark.parametrize(
    "statistics",
    [b"", b"\x01\x00\x00\x00", b"\x01\x00\x00\x00\xff\xff" + bytes(224), b"\x01\x00\x00\x00\x00\x00" + b"\x00\x00\x00\x7f" * 56, bytes(3)],
)
def test_invalid_statistics_are_refused(statistics):
    with pytest.raises(ValueError):  # noqa: PT011 - numpy raises some of these, with messages of its own
        ReuseModel().adopt(statistics)


def test_a_hot_bucket_given_to_another_prefix_has_no_counts():
    kind = int(reuse.kinds(np.array([4], np.uint8), 2, 5, 1)[0])
    model = learned((kind, 12.0, 500), (0, 12.0, 5))
    model.forget_hot(5)
    assert model.statistics(NONE, NONE.astype(float)) == learned((0, 12.0, 5)).statistics(NONE, NONE.astype(float))


def test_the_chance_of_a_use_equals_the_counted_share():
    model = learned((7, 10.0, 60_000), (7, 1000.0, 20_000))
    model.lost_sight(np.full(20_000, 7), np.full(20_000, 5000.0))
    model.table(NONE, NONE.astype(float))
    assert model.chance(7, 1.0, 60.0) == pytest.approx(0.6, abs=0.02)
    assert model.chance(7, 100.0, 3000.0) == pytest.approx(0.5, abs=0.02), "half of those not used in the first minute"
    assert model.chance(7, 1.0, 3000.0) == pytest.approx(0.8, abs=0.02)
    assert model.chance(7, 100.0, 0.0) == 0.0


def test_the_chance_of_hinted_blocks_is_as_hinted():
    model = ReuseModel()
    assert model.chance(ENDED, 10.0, 1e6) == 0.0
    assert model.chance(reuse.expected_kind(60.0), 10.0, 60.0) == 1.0
