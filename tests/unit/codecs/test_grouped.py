"""Tests of the grouped lossy codecs: the codec contract, bounds for any input, exact sizes, exact tokens, and fallbacks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from tests.contracts.codec import CodecContract
from tests.unit.codecs.kv import as_bytes, kv_of
from tiered_kv.codecs import Fp8Codec, Int4Codec, Int6Codec, Int8Codec, LosslessCodec, codec_by_name, codec_for
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.codecs.frame import encode_frame, open_frame
from tiered_kv.codecs.grouped import GroupedCodec, round_to_bf16
from tiered_kv.codecs.rotation import rope_of_theta, turning
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES, KVLayout

LAYOUT = KVLayout(2, 3, 16, "bfloat16", 32)
ROPE = rope_of_theta(10_000, 16)
NAMES = ("int8", "int6", "int4", "fp8")
ROPES = {"unknown": None, "none": b"", "plain": ROPE, "half of the channels": rope_of_theta(500, 8)}


class OfLayout(CodecContract):
    """One lossy codec for blocks of one layout, at a position after the exact tokens."""

    name: str
    sizes = (LAYOUT.block_bytes,)

    @pytest.fixture
    def codec(self) -> GroupedCodec:
        return codec_for(self.name, LAYOUT, rope=ROPE).at(64)

    def block(self, nbytes: int) -> torch.Tensor:
        assert nbytes == LAYOUT.block_bytes
        return as_bytes(kv_of(LAYOUT))

    def assert_same(self, decoded: torch.Tensor, raw: torch.Tensor) -> None:
        kv, again = (flat.view(torch.bfloat16).view(LAYOUT.block_shape) for flat in (raw, decoded))
        assert relative_error(kv, again) <= codec_by_name(self.name).max_error


class TestInt8(OfLayout):
    name = "int8"


class TestInt6(OfLayout):
    name = "int6"


class TestInt4(OfLayout):
    name = "int4"


class TestFp8(OfLayout):
    name = "fp8"


def round_trip(codec: GroupedCodec, kv: torch.Tensor, carried_error: float = 0.0):
    """Encodes and decodes a block. Returns the encoding and the decoded block."""
    encoded = codec.encode(as_bytes(kv), carried_error)
    out = torch.full_like(kv, torch.nan)
    encoded.codec.decode(encoded.payload, as_bytes(out))
    return encoded, out


@st.composite
def layouts(draw) -> KVLayout:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    return KVLayout(draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([2, 8, 6, 10])), dtype, draw(st.integers(1, 20)))


@st.composite
def blocks(draw, layout: KVLayout) -> torch.Tensor:
    """Blocks of all kinds: similar numbers, very different ones, subnormals, zeros, constants, outliers, and arbitrary bits."""
    count = int(np.prod(layout.block_shape))
    kind = draw(st.sampled_from(["bits", "gauss", "constant", "outlier", "tiny", "huge"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if kind == "bits":
        raw = draw(stn.arrays(np.uint8, count * ITEM_BYTES[layout.dtype], elements=st.sampled_from([0, 1, 60, 127, 128, 191, 255])))
        return torch.from_numpy(raw).view(layout.torch_dtype).view(layout.block_shape)
    numbers = torch.randn(count, generator=generator, dtype=torch.float64)
    if kind == "constant":
        numbers = torch.full_like(numbers, draw(st.sampled_from([0.0, -0.0, 1.0, -3.1, 1e-3])))
    elif kind == "outlier":
        numbers[draw(st.integers(0, count - 1))] = draw(st.sampled_from([1e4, -1e4, 400.0]))
    scale = {"tiny": 1e-38, "huge": 1e37 if layout.dtype in ("bfloat16", "float32", "float64") else 100.0}.get(kind, 1.0)
    return (numbers * scale).to(layout.torch_dtype).view(layout.block_shape)


@settings(deadline=None, max_examples=200)
@given(st.data(), layouts(), st.sampled_from(NAMES), st.sampled_from([None, b"", rope_of_theta(100, 2)]), st.integers(0, 6), st.booleans())
def test_any_block_decodes_within_the_bound_or_bit_by_bit(data, layout, name, rope, start, halves) -> None:
    kv = data.draw(blocks(layout))
    codec = codec_for(name, layout, rope=rope, rope_halves=halves).at(start)
    encoded, out = round_trip(codec, kv)
    if encoded.fell_back:
        assert encoded.codec.name in ("lossless", "raw") and encoded.error == 0
        assert torch.equal(as_bytes(out), as_bytes(kv))
    else:
        assert encoded.codec == codec and encoded.payload.nbytes == codec.payload_bytes < layout.block_bytes
        assert out.double().isfinite().all()
        assert encoded.error == relative_error(kv, out) <= codec.max_error
        exact = max(4 - start, 0)
        assert torch.equal(as_bytes(out[..., :exact, :]), as_bytes(kv[..., :exact, :]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rope", list(ROPES.values()), ids=list(ROPES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_kv_is_encoded_without_fallback(name: str, rope: bytes | None, dtype: str) -> None:
    kv = kv_of(KVLayout(2, 3, 16, dtype, 32))
    encoded, out = round_trip(codec_for(name, KVLayout(2, 3, 16, dtype, 32), rope=rope), kv)
    assert (encoded.fell_back, encoded.codec.name) == ("", name)
    assert 0 < encoded.error <= encoded.codec.max_error
    assert torch.equal(out[..., :4, :], kv[..., :4, :])


@pytest.mark.parametrize(("bits", "codec"), [(8, Int8Codec), (6, Int6Codec), (4, Int4Codec)])
def test_a_channel_of_k_is_within_half_a_step(bits: int, codec: type[GroupedCodec]) -> None:
    """Checks the bound in the docstring of `IntegerCodec`, for K without RoPE in float32."""
    layout = KVLayout(2, 3, 16, "float32", 64)
    kv = kv_of(layout, seed=3)
    _, out = round_trip(codec_for(codec.name, layout, rope=b"", max_error=1.0).at(64), kv)
    k = kv[:, 0]
    ends = k.amin(-2, keepdim=True), k.amax(-2, keepdim=True)
    half_step = (ends[1] - ends[0] + (ends[0].abs() + ends[1].abs()) / 64) / (2 * (2**bits - 1))
    assert ((out[:, 0] - k).abs() <= half_step * 1.001).all()
    assert ((out[:, 0] - k).abs() > half_step / 2).any()


def test_a_token_of_v_is_within_half_a_step_of_int8() -> None:
    layout = KVLayout(2, 3, 16, "float32", 8)
    kv = kv_of(layout, seed=3)
    _, out = round_trip(codec_for("int8", layout).at(64), kv)
    ends = kv.amin(-1, keepdim=True), kv.amax(-1, keepdim=True)
    half_step = (ends[1] - ends[0] + (ends[0].abs() + ends[1].abs()) / 64) / (2 * 255)
    assert ((out - kv).abs() <= half_step * 1.001).all()


def test_numbers_of_fp8_are_within_a_sixteenth() -> None:
    layout = KVLayout(2, 3, 16, "float32", 64)
    kv = kv_of(layout, seed=3)
    _, out = round_trip(codec_for("fp8", layout, rope=b"").at(64), kv)
    scale = kv[:, 0].abs().amax(-2, keepdim=True) / 448 * 1.008
    assert ((out - kv)[:, 0].abs() <= torch.maximum(kv[:, 0].abs() / 16, scale * 2**-10)).all()


def test_every_code_of_fp8_decodes_as_in_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 127) != 127]
    Fp8Codec()._dequantize(codes, torch.ones(1, 1), numbers := torch.empty(254))
    assert torch.equal(numbers, codes.view(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("name", ["int6", "int4"])
def test_knowing_the_rope_of_k_reduces_the_error(name: str) -> None:
    """The channels of K keep their size until the model applies RoPE. Undoing RoPE makes the error a fraction of what it is otherwise."""
    layout = KVLayout(2, 3, 16, "float32", 64)
    kv = kv_of(layout)
    turning(ROPE, True, 128, 64, 16).turn(kv[:, 0].clone(), kv[:, 0])
    known, unturned = (round_trip(codec_for(name, layout, rope=rope).at(128), kv)[1] for rope in (ROPE, b""))
    assert (known - kv)[:, 0].norm() < 0.6 * (unturned - kv)[:, 0].norm()


def test_the_frame_stores_the_position() -> None:
    kv, key, root = kv_of(LAYOUT), bytes(32), bytes(range(32))
    whole = b"".join(encode_frame(key, root, codec_for("int8", LAYOUT, rope=ROPE).at(640), as_bytes(kv), carried_error=1e-5))
    frame = open_frame(whole, key, root)
    assert (frame.codec.start, frame.codec.rope, frame.codec.shape) == (640, ROPE, (2, 3, 32, 16))
    assert 1e-5 < frame.error < 2e-4
    larger = torch.zeros(2, 2, 3, 100, 16, dtype=torch.bfloat16)
    frame.decode_kv(larger[..., 5:37, :])
    assert relative_error(kv, larger[..., 5:37, :]) == pytest.approx(frame.error - 1e-5)
    assert not larger[..., :5, :].any() and not larger[..., 37:, :].any()
    with pytest.raises(TieredKVError, match=r"bytes expected, the frame holds"):
        frame.decode_kv(larger)


def test_errors_of_two_lossy_codecs_add_up_and_the_second_falls_back_above_the_bound() -> None:
    kv = kv_of(LAYOUT)
    first, out = round_trip(codec_for("int8", LAYOUT, rope=ROPE), kv)
    second, _ = round_trip(codec_for("int4", LAYOUT, rope=ROPE), out, first.error)
    assert second.fell_back == "" and second.error > first.error
    third, again = round_trip(codec_for("int8", LAYOUT, rope=ROPE), out, second.error)
    assert (third.fell_back, third.error) == ("error", second.error)
    assert torch.equal(again, out)
    assert round_trip(codec_for("int8", LAYOUT, rope=ROPE, max_error=1.0), out, second.error)[0].fell_back == ""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("token", [0, 31])
def test_numbers_that_are_not_finite_keep_their_bits(name: str, bad: float, token: int) -> None:
    kv = kv_of(LAYOUT)
    kv[1, 1, 2, token, 5] = bad
    encoded, out = round_trip(codec_for(name, LAYOUT, rope=ROPE), kv)
    assert (encoded.fell_back, encoded.codec) == ("error", LosslessCodec(2))
    assert torch.equal(as_bytes(out), as_bytes(kv))


def test_scratch_memory_from_inference_mode_works_outside_of_it() -> None:
    kv, codec = kv_of(LAYOUT), codec_for("int4", LAYOUT, rope=rope_of_theta(77, 16))
    with torch.inference_mode():
        within = round_trip(codec, kv)[1]
    assert torch.equal(round_trip(codec, kv)[1], within)


def test_an_autocast_region_of_the_caller_changes_nothing() -> None:
    """Rotating the large V of this block would overflow in float16."""
    kv, codec = kv_of(LAYOUT) * 3e4, codec_for("int4", LAYOUT, rope=ROPE)
    outside = round_trip(codec, kv)
    with torch.autocast("cpu", dtype=torch.float16):
        inside = round_trip(codec, kv)
    assert inside[0] == outside[0] and not inside[0].fell_back
    assert torch.equal(inside[1], outside[1])


@pytest.mark.parametrize("layers", [1, 5, 7])
def test_the_count_of_layers_at_a_time_does_not_change_the_result(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KVLayout(layers, 3, 16, "bfloat16", 32)
    kv, codecs = kv_of(layout), [codec_for(name, layout, rope=rope) for name in NAMES for rope in (ROPE, None)]
    whole = [round_trip(codec, kv)[1] for codec in codecs]
    for name in ("ENCODE_ELEMENTS", "DECODE_ELEMENTS"):
        monkeypatch.setattr(f"tiered_kv.codecs.grouped.{name}", 2 * 3 * 16 * 32)
    for codec, expected in zip(codecs, whole, strict=True):
        assert torch.equal(round_trip(codec, kv)[1], expected)


def test_a_block_of_exact_tokens_only_is_no_gain() -> None:
    layout = KVLayout(2, 3, 16, "bfloat16", 3)
    assert round_trip(codec_for("int4", layout, rope=ROPE), kv_of(layout))[0].fell_back == "no gain"
    assert round_trip(codec_for("int4", layout, rope=ROPE).at(3), kv_of(layout))[0].fell_back == ""


def test_one_token_is_a_block() -> None:
    layout = KVLayout(2, 3, 64, "bfloat16", 1)
    for name in NAMES:
        assert round_trip(codec_for(name, layout, rope=rope_of_theta(1e4, 64)).at(7), kv_of(layout))[0].fell_back == ""


@pytest.mark.parametrize("name", NAMES)
def test_without_a_layout_bytes_are_stored_losslessly(name: str) -> None:
    encoded = codec_for(name, None).encode(torch.zeros(1001, dtype=torch.uint8))
    assert (encoded.codec, encoded.fell_back) == (LosslessCodec(1), "opaque")


@pytest.mark.parametrize(("name", "least"), [("int8", 1.85), ("int6", 2.4), ("int4", 3.5), ("fp8", 1.9)])
def test_compression_ratios_for_the_shape_of_a_model(name: str, least: float) -> None:
    """Checks 1,024 tokens of SmolLM2's shape in bf16, exact tokens included."""
    layout = KVLayout(30, 3, 64, "bfloat16", 64)
    codec = codec_for(name, layout, rope=rope_of_theta(1e5, 64))
    assert 16 * layout.block_bytes / sum(codec.at(64 * block).payload_bytes for block in range(16)) >= least


def test_a_block_of_another_size_is_refused() -> None:
    with pytest.raises(TieredKVError, match=f"a block of {LAYOUT.block_bytes} bytes, got 64") as caught:
        codec_for("int8", LAYOUT).encode(torch.zeros(64, dtype=torch.uint8))
    assert caught.value.kind is Kind.LAYOUT


def test_decoding_into_kv_of_another_shape_or_dtype_is_refused() -> None:
    codec = codec_for("int8", LAYOUT)
    payload = codec.encode(as_bytes(kv_of(LAYOUT))).payload
    for kv in (torch.zeros(LAYOUT.block_shape), torch.zeros(2, 2, 3, 16, 32, dtype=torch.bfloat16)):
        with pytest.raises(TieredKVError) as caught:
            codec.decode_kv(payload, kv)
        assert caught.value.kind is Kind.LAYOUT


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (1, 2, 3)},
        {"shape": (1, 2, 0, 4)},
        {"dtype": "int8"},
        {"start": -1},
        {"start": 1.0},
        {"sinks": True},
        {"rope": b"123"},
        {"rope": bytes(4 * 9)},
        {"rope_halves": 1},
        {"max_error": -1.0},
        {"max_error": float("nan")},
        {"max_error": 1},
    ],
)
def test_an_invalid_parameter_is_refused_by_name(wrong: dict) -> None:
    [name] = wrong
    with pytest.raises(TieredKVError, match="block_tokens" if wrong.get("shape") == (1, 2, 0, 4) else name):
        replace(codec_for("int8", LAYOUT, rope=ROPE), **wrong)


@pytest.mark.parametrize("up", [True, False])
def test_rounding_to_bf16_goes_one_way_by_at_most_one_step(up: bool) -> None:
    x = torch.randn(1000) * 10.0 ** torch.arange(-20, 20).repeat(25)
    rounded = round_to_bf16(x, up)
    assert torch.equal(rounded.bfloat16().float(), rounded)
    away = (rounded - x) * (1 if up else -1)
    assert (away >= 0).all() and (away <= x.abs() / 128).all()


@pytest.mark.parametrize("kv", [torch.zeros(1, 2, 1, 2, 2), torch.full((1, 2, 1, 2, 2), 1e-44), torch.full((1, 2, 1, 2, 2), 3e38)])
def test_the_error_is_right_at_the_limits_of_floats(kv: torch.Tensor) -> None:
    assert relative_error(kv, kv.clone()) == 0
    assert not relative_error(kv, kv * 0 + 1) <= 0.5
    if kv.any():
        assert relative_error(kv, kv * 0) == pytest.approx(1)
