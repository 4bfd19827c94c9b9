"""Tests of the key table against a dict."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.policy.keytable import KeyTable, tags_of

BATCHES = st.lists(st.lists(st.integers(0, 300), unique=True, min_size=1, max_size=40), max_size=30)


class Owned:
    """A table with the tags that its owner stores. Slots are assigned in order."""

    def __init__(self, slots: int = 10_000) -> None:
        self.tag_of = np.zeros(slots, np.uint64)
        self.table = KeyTable()
        self.used = 0

    def insert(self, keys: list) -> None:
        slots = np.arange(self.used, self.used + len(keys), dtype=np.int32)
        self.used += len(keys)
        self.tag_of[slots] = tags_of(keys)
        self.table.insert(slots, self.tag_of)

    def find(self, keys: list) -> list[int]:
        return self.table.find(tags_of(keys), self.tag_of).tolist()


@given(BATCHES)
def test_finds_inserted_keys_and_no_others(batches):
    owned, expected = Owned(), {}
    for batch in batches:
        new = [number for number in batch if number not in expected]
        expected.update(zip(new, range(len(expected), len(expected) + len(new)), strict=True))
        if new:
            owned.insert(new)
        asked = [*batch, 1000, 1001]
        assert owned.find(asked) == [expected.get(number, -1) for number in asked]
        assert len(owned.table) == len(expected)


def test_keys_with_the_same_place_are_distinguished():
    keys = [number << 40 for number in range(5000)]
    owned = Owned()
    owned.insert(keys)
    assert owned.find(keys) == list(range(5000))
    assert set(owned.find([key + 1 for key in keys])) == {-1}


def test_a_rebuilt_table_has_exactly_the_given_keys():
    owned = Owned()
    owned.insert([1, 2, 3, 4])
    owned.table.rebuild(tags_of([3, 4]), np.array([2, 3], np.int32))
    assert owned.find([1, 3, 4]) == [-1, 2, 3]


NINE = range(9)


@pytest.mark.parametrize(
    "keys",
    [[bytes([n]) * 32 for n in NINE], [n.to_bytes(32, "big") for n in NINE], list(NINE), [str(n) for n in NINE], [b"short", b"other"]],
)
def test_different_keys_have_different_tags(keys):
    tags = tags_of(keys)
    assert tags.dtype == np.uint64
    assert len(set(tags.tolist())) == len(keys)


def test_takes_few_bytes_a_key():
    owned = Owned(200_000)
    for start in range(0, 200_000, 1000):
        owned.insert(list(range(start, start + 1000)))
    assert owned.table.nbytes / 200_000 <= 16
