"""Tests of packed codes: every code unpacks at its position, and the packed size is the stated one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from tiered_kv.codecs.packing import pack, packed_bytes, unpack


@given(st.sampled_from([4, 6, 8]), st.integers(1, 70), st.data())
def test_codes_unpack_as_packed(bits: int, count: int, data: st.DataObject) -> None:
    codes = data.draw(stn.arrays(np.uint8, count, elements=st.integers(0, 2**bits - 1)))
    packed = pack(codes, bits)
    assert (packed.dtype, len(packed)) == (np.uint8, packed_bytes(count, bits))
    assert np.array_equal(unpack(packed, count, bits), codes)


@pytest.mark.parametrize(("bits", "codes", "nbytes"), [(8, 7, 7), (6, 4, 3), (6, 5, 6), (4, 2, 1), (4, 3, 2), (4, 1, 1)])
def test_sizes(bits: int, codes: int, nbytes: int) -> None:
    assert packed_bytes(codes, bits) == nbytes


def test_unpacked_codes_are_in_new_memory() -> None:
    packed = np.arange(6, dtype=np.uint8)
    unpack(packed, 6, 8)[0] = 9
    assert packed[0] == 0
