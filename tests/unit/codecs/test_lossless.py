"""Tests of the lossless codec: every bit pattern of every dtype, planes that shrink and planes that do not, damaged payloads."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from tests.contracts.codec import CodecContract
from tests.unit.codecs.kv import as_bytes, kv_of
from tiered_kv.codecs import LosslessCodec, RawCodec, codec_for
from tiered_kv.codecs.lossless import CHUNK_ITEMS, MIN_GAIN
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES, KVLayout

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class OfWidth(CodecContract):
    """Numbers of one width, and a block whose last number is incomplete."""

    width: int
    sizes = (8000, 100_003)

    @pytest.fixture
    def codec(self) -> LosslessCodec:
        return LosslessCodec(self.width)

    def block(self, nbytes: int) -> torch.Tensor:
        floats = torch.randn(nbytes // self.width + 1, generator=torch.Generator().manual_seed(nbytes), dtype=torch.float64)
        dtype = {1: torch.float8_e5m2, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.width]
        return (floats / 100).to(dtype).view(torch.uint8)[:nbytes].clone()


class TestWidth1(OfWidth):
    width = 1


class TestWidth2(OfWidth):
    width = 2


class TestWidth4(OfWidth):
    width = 4


class TestWidth8(OfWidth):
    width = 8


def round_trip(codec: LosslessCodec, raw: torch.Tensor) -> int:
    """Encodes and decodes a block, and checks that it is bit-identical. Returns the bytes of the payload."""
    encoded = codec.encode(raw)
    out = torch.full_like(raw, 0xA5)
    encoded.codec.decode(encoded.payload, out)
    assert torch.equal(out, raw)
    return encoded.payload.nbytes


@given(st.data(), st.sampled_from(sorted(WORDS)), st.integers(0, 7))
def test_any_bits_decode_identically(data: st.DataObject, width: int, rest: int) -> None:
    few = data.draw(st.lists(st.integers(0, 2 ** (8 * width) - 1), min_size=1, max_size=4))  # so that planes shrink
    items = data.draw(stn.arrays(WORDS[width], st.integers(1, 200), elements=st.sampled_from(few)))
    raw = torch.from_numpy(np.concatenate([items.view(np.uint8), np.arange(rest, dtype=np.uint8)]))
    round_trip(LosslessCodec(width), raw)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"])
def test_every_special_number_keeps_its_bits(dtype: str) -> None:
    width = ITEM_BYTES[dtype]
    bits = 8 * width
    special = [0, 1, 2 ** (bits - 1), 2 ** (bits - 1) + 1, 2**bits - 1, 2 ** (bits - 1) - 1]  # ±0, ±least subnormal, NaNs with payloads
    infinities = torch.tensor([torch.inf, -torch.inf, torch.nan]).to(getattr(torch, dtype)).view(torch.uint8)
    raw = torch.cat([torch.from_numpy(np.array(special, WORDS[width]).view(np.uint8)), infinities]).repeat(500)
    assert round_trip(LosslessCodec(width), raw) < raw.numel() / 2


@pytest.mark.parametrize(("dtype", "least_gain"), [("bfloat16", 1.3), ("float16", 1.08), ("float32", 1.12), ("float8_e4m3fn", 1.1)])
def test_kv_of_every_dtype_shrinks(dtype: str, least_gain: float) -> None:
    layout = KVLayout(2, 2, 64, dtype, 64)
    raw = as_bytes(kv_of(layout))
    assert round_trip(codec_for("lossless", layout), raw) * least_gain < raw.numel()


def test_bf16_numbers_in_float32_cost_hardly_more_than_in_bf16() -> None:
    kv = kv_of(KVLayout(2, 2, 64, "bfloat16", 64))
    narrow, wide = round_trip(LosslessCodec(2), as_bytes(kv)), round_trip(LosslessCodec(4), as_bytes(kv.float()))
    assert wide <= 1.05 * narrow


def test_noise_is_stored_raw() -> None:
    raw = torch.randint(0, 256, (100_001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for width in WORDS:
        encoded = LosslessCodec(width).encode(raw, carried_error=0.5)
        assert (encoded.codec, encoded.fell_back, encoded.error) == (RawCodec(), "no gain", 0.5)
        assert encoded.payload.nbytes == raw.numel()


def test_a_gain_below_the_least_is_not_worth_decoding() -> None:
    """Blocks of zeros followed by noise. If the zeros save less than the least gain the block is stored raw, else by the codec."""
    noise = torch.randint(0, 256, (32_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = [
        LosslessCodec().encode(torch.cat([torch.zeros(zeros, dtype=torch.uint8), noise[zeros:]])).codec.name
        for zeros in (int(32_000 * MIN_GAIN * 0.9), int(32_000 * MIN_GAIN * 1.2))
    ]
    assert kept == ["raw", "lossless"]


@pytest.mark.parametrize("items", [CHUNK_ITEMS - 1, CHUNK_ITEMS, CHUNK_ITEMS + 1, 2 * CHUNK_ITEMS + 7])
def test_blocks_around_the_size_of_a_piece(items: int) -> None:
    round_trip(LosslessCodec(2), as_bytes(torch.randn(items).bfloat16()))


@pytest.mark.parametrize("width", [0, 3, 16, -1, "2", None, 2.5, True])
def test_an_invalid_item_width_is_refused(width) -> None:
    with pytest.raises(TieredKVError, match="item_bytes"):
        LosslessCodec(width)


def test_without_a_layout_items_are_single_bytes() -> None:
    assert codec_for("lossless", None) == LosslessCodec(1)


def test_damaged_planes_are_corrupt() -> None:
    raw = as_bytes(kv_of(KVLayout(1, 1, 64, "bfloat16", 64)))
    payload = bytes(LosslessCodec(2).encode(raw).payload)
    exponents, mantissas = struct.unpack_from("<2I", payload)
    assert exponents < mantissas == raw.numel() // 2
    head = struct.pack("<2I", exponents - 1, mantissas + 1), struct.pack("<2I", 0, exponents + mantissas), struct.pack("<2I", 2**32 - 1, 0)
    damaged = [
        payload[:8] + b"x" + payload[9:],
        payload[:20] + bytes(40) + payload[60:],
        *(each + payload[8:] for each in head),
        b"",
        b"1234567",
    ]
    for each in damaged:
        with pytest.raises(TieredKVError) as caught:
            LosslessCodec(2).decode(memoryview(each), torch.zeros_like(raw))
        assert caught.value.kind is Kind.CORRUPT


def test_decodes_into_a_part_of_a_larger_tensor() -> None:
    layout = KVLayout(2, 2, 16, "bfloat16", 16)
    kv, larger = kv_of(layout), torch.zeros(2, 2, 2, 40, 16, dtype=torch.bfloat16)
    for codec in (LosslessCodec(2), RawCodec()):
        codec.decode_kv(codec.encode(as_bytes(kv)).payload, larger[..., 8:24, :])
        assert torch.equal(larger[..., 8:24, :], kv)
        assert not larger[..., :8, :].any() and not larger[..., 24:, :].any()
