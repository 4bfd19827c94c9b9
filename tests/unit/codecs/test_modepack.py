"""Tests of mode packing: any rows unpack as packed, to every dtype, and damaged bytes raise ValueError at most."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from tiered_kv.codecs.calibrated.base import alphabet
from tiered_kv.codecs.calibrated.row_packing import LIMITS, pack, unpack

WHOLE = alphabet(torch.float32)


def round_trip(codes: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
    rows = np.arange(len(codes)) if places is None else places
    out = np.zeros((rows.max(initial=-1) + 1, codes.shape[1]), np.float32)
    unpack(memoryview(pack(codes)), rows, out, WHOLE)
    return out


@st.composite
def rows(draw) -> np.ndarray:
    shape = draw(st.integers(0, 12)), draw(st.integers(1, 70))
    limits = draw(stn.arrays(np.int32, (shape[0], 1), elements=st.sampled_from(LIMITS)))
    any_codes = draw(stn.arrays(np.int32, shape, elements=st.integers(-32767, 32767), fill=st.integers(-1, 1)))
    return np.clip(any_codes, -limits, limits).astype(np.int16)


@settings(deadline=None)
@given(rows())
def test_any_rows_unpack_as_packed(codes: np.ndarray) -> None:
    assert np.array_equal(round_trip(codes), codes)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 64])
def test_every_mode_unpacks_at_its_limits(limit: int, tokens: int) -> None:
    codes = np.random.default_rng(limit).integers(-limit, limit, (50, tokens), endpoint=True).astype(np.int16)
    codes[0], codes[1] = limit, -limit
    assert np.array_equal(round_trip(codes), codes)


def test_rows_are_written_at_their_indices_and_rows_of_zeros_are_not_written() -> None:
    codes = np.array([[3, -4], [0, 0], [1, 1]], np.int16)
    out = np.full((6, 2), 9, np.float32)
    filled = unpack(memoryview(pack(codes)), np.array([5, 2, 0]), out, WHOLE)
    assert sorted(filled.tolist()) == [0, 5]
    assert out.tolist() == [[1, 1], [9, 9], [9, 9], [9, 9], [9, 9], [3, -4]]


def test_codes_as_bf16_are_exact_up_to_256() -> None:
    codes = np.arange(-256, 257, dtype=np.int16)[None]
    out = np.zeros(codes.shape, np.uint16)
    unpack(memoryview(pack(codes)), np.arange(1), out, alphabet(torch.bfloat16))
    assert np.array_equal(torch.from_numpy(out).view(torch.bfloat16).float().numpy(), codes)


def test_small_rows_cost_a_part_of_a_byte() -> None:
    generator = np.random.default_rng(0)
    spread = np.geomspace(4, 0.05, 2000)[:, None]
    codes = np.rint(generator.normal(size=(2000, 64)) * spread).astype(np.int16)
    per_row = [(np.unique(row, return_counts=True)[1] / 64) for row in codes]
    ideal_bits = sum(-64 * (p * np.log2(p)).sum() for p in per_row)
    assert len(pack(codes)) * 8 < 1.25 * ideal_bits


@settings(deadline=None, max_examples=300)
@given(rows(), st.data())
def test_damaged_bytes_raise_value_error_or_unpack_to_finite_numbers(codes: np.ndarray, data) -> None:
    packed = bytearray(pack(codes))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    damaged = bytes(packed[: data.draw(st.sampled_from([len(packed), at, len(packed) - 1]))])
    out = np.zeros(codes.shape, np.float32)
    try:
        unpack(memoryview(damaged), np.arange(len(codes)), out, WHOLE)
    except ValueError:
        return
    assert len(damaged) == len(packed) and np.isfinite(out).all()


@pytest.mark.parametrize("damaged", [b"", bytes(23), bytes(24) + b"x"])
def test_bytes_of_the_wrong_size_are_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError, match="bytes"):
        unpack(memoryview(damaged), np.arange(1), np.zeros((1, 4), np.float32), WHOLE)


def test_an_invalid_mode_is_refused() -> None:
    packed = bytearray(pack(np.ones((1, 4), np.int16)))
    packed[24] = 7
    with pytest.raises(ValueError, match="mode"):
        unpack(memoryview(bytes(packed)), np.arange(1), np.zeros((1, 4), np.float32), WHOLE)
