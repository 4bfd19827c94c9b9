"""Properties of every codec for any block. It decodes within the codec's bound or bit by bit, into memory of any strides. Damage causes
wrong numbers or an error, and nothing worse. Codecs that need a calibration get a plain one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DataObject

from tests.unit.codecs.kv import as_bytes
from tests.unit.codecs.plain_calibrations import plain_calibration
from tiered_kv.codecs import CODECS, Codec, Encoded, codec_for
from tiered_kv.codecs.block import BlockCodec
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.codecs.frame import encode_frame, open_frame
from tiered_kv.codecs.rotation import rope_of_theta
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES, KVLayout

EVERY_CODEC = pytest.mark.parametrize("name", [codec.name for codec in CODECS])
MANY, FEW = (settings(deadline=None, max_examples=count) for count in (30, 8))
KINDS = ("gauss", "alike", "zeros", "constant", "outlier", "denormal", "greatest", "some zeros")
BLOCK_TOKENS_MAX = 24


@st.composite
def layouts(draw: st.DrawFn) -> KVLayout:
    """Layouts of any dtype and at least one token. K is quantized by channel from 16 tokens on."""
    dtype, dim = draw(st.sampled_from(sorted(ITEM_BYTES))), draw(st.sampled_from([1, 2, 8, 10, 16]))
    return KVLayout(draw(st.integers(1, 3)), draw(st.integers(1, 3)), dim, dtype, draw(st.integers(1, BLOCK_TOKENS_MAX)))


@st.composite
def codecs(draw: st.DrawFn, name: str, layout: KVLayout) -> Codec:
    """The codec at any position in a sequence, with RoPE known or unknown."""
    ropes = [b"", rope_of_theta(100.0, layout.head_dim - layout.head_dim % 2)]
    cls = next(codec for codec in CODECS if codec.name == name)
    if cls.needs_calibration:
        codec = codec_for(name, layout, calibration=plain_calibration(layout, draw(st.sampled_from(ropes))))
    else:
        codec = codec_for(name, layout, rope=draw(st.sampled_from([None, *ropes])), rope_halves=draw(st.booleans()))
    return codec.at(draw(st.sampled_from([0, 1, 3, 4, 64, 100_000])))


@st.composite
def finite_blocks(draw: st.DrawFn, layout: KVLayout) -> torch.Tensor:
    """Blocks (L, 2, H, T, D) of finite numbers of every kind."""
    limits, kind = torch.finfo(layout.torch_dtype), draw(st.sampled_from(KINDS))
    numbers = torch.randn(layout.block_shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))), dtype=torch.float64)
    if kind == "alike":
        numbers = 3 + numbers / 100
    elif kind == "zeros":
        numbers.zero_()
    elif kind == "constant":
        numbers.fill_(draw(st.sampled_from([-0.0, 1.0, -3.1, 1e-3])))
    elif kind == "outlier":
        numbers.view(-1)[draw(st.integers(0, numbers.numel() - 1))] = draw(st.sampled_from([1.0, -1.0])) * min(limits.max, 1e30) / 2
    elif kind == "denormal":
        numbers *= limits.smallest_normal / 8
    elif kind == "greatest":
        numbers = limits.max * numbers.sign()
    elif kind == "some zeros":
        numbers[..., draw(st.integers(0, layout.block_tokens - 1)), :] = 0
    kv = numbers.clamp(-limits.max, limits.max).to(layout.torch_dtype)
    assert kv.double().isfinite().all()
    return kv


def round_trip(codec: Codec, kv: torch.Tensor, carried_error: float = 0.0) -> tuple[Encoded, torch.Tensor]:
    """Encodes and decodes a block. Returns the encoding and the decoded block."""
    encoded = codec.encode(as_bytes(kv), carried_error)
    out = torch.full(kv.shape, 7.0).to(kv.dtype)
    encoded.codec.decode(encoded.payload, as_bytes(out))
    return encoded, out


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(as_bytes(x), as_bytes(y))


@EVERY_CODEC
@MANY
@given(data=st.data(), layout=layouts(), carried_error=st.sampled_from([0.0, 0.0, 1e-5, 0.5]))
def test_any_finite_block_decodes_within_the_bound_or_bit_by_bit(
    name: str, data: DataObject, layout: KVLayout, carried_error: float
) -> None:
    kv, codec = data.draw(finite_blocks(layout)), data.draw(codecs(name, layout))
    before = kv.clone()
    encoded, out = round_trip(codec, kv, carried_error)
    assert same_bits(kv, before)
    assert out.double().isfinite().all()
    assert encoded.payload.nbytes <= max(encoded.codec.max_payload_bytes(layout.block_bytes), 1)
    if encoded.codec.is_lossy:
        assert isinstance(encoded.codec, BlockCodec)
        assert encoded.error == carried_error + relative_error(kv, out) <= encoded.codec._bound()
        exact = max(encoded.codec.sinks - codec.start, 0)
        assert same_bits(out[..., :exact, :], kv[..., :exact, :])
    else:
        assert same_bits(out, kv) and encoded.error == carried_error
        assert bool(encoded.fell_back) is (encoded.codec.name != name)


@EVERY_CODEC
@FEW
@given(data=st.data(), layout=layouts())
def test_decoding_fills_memory_of_any_strides_and_nothing_else(name: str, data: DataObject, layout: KVLayout) -> None:
    kv, codec = data.draw(finite_blocks(layout)), data.draw(codecs(name, layout))
    encoded, out = round_trip(codec, kv)
    order = data.draw(st.permutations(range(5)))
    wider = [size + 2 for size in layout.block_shape]
    pool = torch.full([wider[axis] for axis in order], 7.0).to(kv.dtype)
    part = pool.permute([order.index(axis) for axis in range(5)])[1:-1, 1:-1, 1:-1, 1:-1, 1:-1]
    encoded.codec.decode_kv(encoded.payload, part)
    assert same_bits(part, out)
    part.fill_(7.0)
    assert (pool.float() == 7).all()


@EVERY_CODEC
@FEW
@given(data=st.data(), layout=layouts(), bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_numbers_that_are_not_finite_keep_their_bits(name: str, data: DataObject, layout: KVLayout, bad: float) -> None:
    kv, codec = data.draw(finite_blocks(layout)), data.draw(codecs(name, layout))
    kv.view(-1)[data.draw(st.integers(0, kv.numel() - 1))] = bad
    encoded, out = round_trip(codec, kv)
    place = kv.double().isfinite().logical_not()
    assert torch.equal(out.double().isfinite(), ~place)
    assert same_bits(out[place], kv[place])
    if encoded.codec.is_lossy:  # the number must be in an exact token
        assert not place[..., max(4 - codec.start, 0) :, :].any()
    else:
        assert same_bits(out, kv)


@EVERY_CODEC
@FEW
@given(data=st.data(), layout=layouts())
def test_a_damaged_payload_raises_corrupt_or_decodes_to_wrong_numbers(name: str, data: DataObject, layout: KVLayout) -> None:
    kv, codec = data.draw(finite_blocks(layout)), data.draw(codecs(name, layout))
    encoded, out = round_trip(codec, kv)
    payload = np.array(encoded.payload)
    if data.draw(st.booleans()):
        damaged = payload[: data.draw(st.integers(0, len(payload) - 1))]
        with pytest.raises(TieredKVError) as caught:
            encoded.codec.decode(memoryview(damaged), as_bytes(out))
        assert caught.value.kind is Kind.CORRUPT
        return
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    failed = None
    try:
        encoded.codec.decode(memoryview(payload), as_bytes(out))
    except TieredKVError as error:
        failed = error.kind
    assert failed in (None, Kind.CORRUPT)


@EVERY_CODEC
@FEW
@given(data=st.data(), layout=layouts())
def test_a_frame_detects_every_damage(name: str, data: DataObject, layout: KVLayout) -> None:
    kv, codec, key, root = data.draw(finite_blocks(layout)), data.draw(codecs(name, layout)), bytes(32), bytes(range(32))
    whole = np.frombuffer(b"".join(encode_frame(key, root, codec, as_bytes(kv))), np.uint8).copy()
    out = torch.zeros_like(kv)
    open_frame(whole, key, root).decode(as_bytes(out))
    assert same_bits(out, round_trip(codec, kv)[1])
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(TieredKVError) as caught:
        open_frame(whole, key, root)
    assert caught.value.kind is Kind.CORRUPT


@EVERY_CODEC
@FEW
@given(content=st.binary(min_size=1, max_size=300))
def test_bytes_without_a_layout_decode_bit_by_bit(name: str, content: bytes) -> None:
    cls = next(codec for codec in CODECS if codec.name == name)
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    out = torch.zeros_like(raw)
    encoded = cls.for_layout(None).encode(raw)
    encoded.codec.decode(encoded.payload, out)
    assert torch.equal(out, raw)


@EVERY_CODEC
@FEW
@given(data=st.data(), layout=layouts())
def test_an_autocast_region_of_the_caller_changes_nothing(name: str, data: DataObject, layout: KVLayout) -> None:
    kv, codec = data.draw(finite_blocks(layout)), data.draw(codecs(name, layout))
    outside = round_trip(codec, kv)
    with torch.autocast("cpu", dtype=torch.float16):
        inside = round_trip(codec, kv)
    assert inside[0] == outside[0] and same_bits(inside[1], outside[1])
