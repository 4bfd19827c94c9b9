"""Checks of a node's answers: offsets of extents that a worker may pack into."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.memory.extents import ALIGNMENT
from tiered_kv.protocol.answers import CHECKS, are_booleans, are_offsets, is_explanation
from tiered_kv.tiers.host import HEADER_BYTES

NBYTES = 2 * ALIGNMENT
ARENA_BYTES = 12 * ALIGNMENT
FIRST = HEADER_BYTES % ALIGNMENT
OFFSETS = (
    st.integers(-2, 14).map(lambda number: FIRST + number * ALIGNMENT)
    | st.integers(-9, ARENA_BYTES + 9)
    | st.sampled_from([True, None, 1.0])
)


@given(answer=st.lists(OFFSETS, max_size=6), requested=st.integers(0, 6))
def test_offsets_are_right_if_each_is_whole_aligned_and_within_and_no_two_overlap(answer: list, requested: int) -> None:
    are_whole = all(type(each) is int for each in answer)
    fit = are_whole and all(each % ALIGNMENT == FIRST and 0 <= each <= ARENA_BYTES - NBYTES for each in answer)
    are_apart = fit and all(abs(first - second) >= NBYTES for first, second in combinations(answer, 2))
    assert are_offsets(answer, requested, NBYTES, ARENA_BYTES) == (are_apart and len(answer) <= requested)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [([], True), ([True, False], True), ([True] * 3, False), ([True, 1], False), ([None], False), ((True,), False), (None, False)],
)
def test_booleans(answer: object, is_right: bool) -> None:
    assert are_booleans(answer, 2) is is_right


GONE = {"node": "n0", "tier": "disk", "cause": "reclaimed", "age_s": 1.5, "uses": 2, "standing": None}
BLOCK = {"tier": None, "nodes": ["n1"], "silent": [], "gone": GONE}
EXPLANATION = {"node": "n0", "blocks": [BLOCK, {**BLOCK, "tier": "host", "gone": None}], "recorded_s": 3.0, "directory": True}


def test_an_explanation_has_an_entry_of_the_right_types_for_each_block() -> None:
    assert is_explanation(EXPLANATION, 2)
    assert not is_explanation(EXPLANATION, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        [],
        {**EXPLANATION, "node": 1},
        {**EXPLANATION, "recorded_s": "long"},
        {**EXPLANATION, "directory": None},
        {**EXPLANATION, "blocks": [BLOCK, None]},
        *(
            {**EXPLANATION, "blocks": [BLOCK, {**BLOCK, name: value}]}
            for name, value in {"tier": 3, "nodes": "n1", "silent": [7], "gone": 1}.items()
        ),
        *({**EXPLANATION, "blocks": [BLOCK, {**BLOCK, "gone": {**GONE, name: {}}}]} for name in GONE),
        {**EXPLANATION, "blocks": [BLOCK, {**BLOCK, "gone": {"node": "n0"}}]},
    ],
)
def test_an_explanation_of_other_types_is_refused(wrong: object) -> None:
    assert not is_explanation(wrong, 2)


@pytest.mark.parametrize("wrong", [None, {}, [1], [{}], [{"namespace": {}, "layout": []}], [{"namespace": {}, "layout": {}}] * 17])
def test_namespaces_of_other_types_are_refused(wrong: object) -> None:
    assert not CHECKS["namespaces"](wrong)
    assert CHECKS["namespaces"]([{"namespace": {}, "layout": {}}])
