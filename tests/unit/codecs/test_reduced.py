"""Tests of the codecs lowrank and sparse: the codec contract, sizes by `keep`, what is stored of a block, damaged payloads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.contracts.codec import CodecContract
from tests.unit.codecs.kv import as_bytes, kv_of
from tiered_kv.codecs import Encoded, LosslessCodec, LowRankCodec, SparseCodec, codec_for
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.codecs.reduced import ReducedCodec
from tiered_kv.codecs.rotation import rope_of_theta, turning
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

LAYOUT = KVLayout(2, 3, 16, "bfloat16", 32)
ROPE = rope_of_theta(10_000, 16)
NAMES = ("lowrank", "sparse")


def blurred(layout: KVLayout) -> torch.Tensor:
    """Returns KV spanned by four directions, plus a little noise: the kind of data that these codecs are made for."""
    generator = torch.Generator().manual_seed(5)
    layers, _, heads, tokens, dim = layout.block_shape
    of_tokens = torch.randn(layers, 2, 1, tokens, 4, generator=generator)
    kv = of_tokens @ torch.randn(layers, 2, heads, 4, dim, generator=generator)
    return (kv + torch.randn(kv.shape, generator=generator) / 20).to(layout.torch_dtype)


class OfKeep(CodecContract):
    """One of the two codecs, storing half of the bytes."""

    name: str
    sizes = (LAYOUT.block_bytes,)

    @pytest.fixture
    def codec(self) -> ReducedCodec:
        return codec_for(self.name, LAYOUT, rope=ROPE).at(64)

    def block(self, nbytes: int) -> torch.Tensor:
        assert nbytes == LAYOUT.block_bytes
        return as_bytes(blurred(LAYOUT))

    def assert_same(self, decoded: torch.Tensor, raw: torch.Tensor) -> None:
        kv, again = (flat.view(torch.bfloat16).view(LAYOUT.block_shape) for flat in (raw, decoded))
        assert relative_error(kv, again) <= 0.2


class TestLowRank(OfKeep):
    name = "lowrank"


class TestSparse(OfKeep):
    name = "sparse"


def round_trip(codec: ReducedCodec, kv: torch.Tensor, carried_error: float = 0.0) -> tuple[Encoded, torch.Tensor]:
    encoded = codec.encode(as_bytes(kv), carried_error)
    out = torch.full_like(kv, torch.nan)
    encoded.codec.decode(encoded.payload, as_bytes(out))
    return encoded, out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_payloads_take_the_part_keep_and_a_larger_part_has_less_error(name: str, dtype: str) -> None:
    layout = KVLayout(2, 3, 16, dtype, 32)
    kv = blurred(layout)
    errors = []
    for keep in (0.3, 0.5, 0.8):
        encoded, out = round_trip(codec_for(name, layout, rope=ROPE, keep=keep, max_error=2.0).at(64), kv)
        assert 0.6 * keep < encoded.payload.nbytes / layout.block_bytes <= keep or encoded.error < 1e-3
        assert encoded.error == relative_error(kv, out)
        errors.append(encoded.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_a_matrix_of_low_rank_costs_only_the_rounding_of_its_factors() -> None:
    layout = KVLayout(2, 3, 16, "float32", 32)
    left, right = torch.randn(2, 2, 1, 32, 3), torch.randn(2, 2, 3, 3, 16)
    codec = codec_for("lowrank", layout, keep=0.1).at(64)
    encoded, _ = round_trip(codec, left @ right)
    assert codec.rank(32) >= 3 and encoded.error < 1e-3


@pytest.mark.parametrize("tokens", [16, 64])
def test_lowrank_stores_the_greatest_components(tokens: int) -> None:
    """The error of V equals that of the truncated singular value decomposition (T < C, T > C), up to the rounding to 8 bits."""
    layout = KVLayout(2, 2, 16, "float32", tokens)
    kv = kv_of(layout, seed=2)
    codec = codec_for("lowrank", layout, keep=0.1, max_error=2.0).at(64)
    _, out = round_trip(codec, kv)
    matrices = kv[:, 1].transpose(1, 2).flatten(2)
    values = torch.linalg.svdvals(matrices)
    least = values[:, codec.rank(tokens) :].square().sum(-1)
    error = (out - kv)[:, 1].square().sum((1, 2, 3))
    assert (error >= 0.999 * least).all() and (error <= 1.01 * least + 1e-3 * values.square().sum(-1)).all()


def test_sparse_stores_the_numbers_farthest_from_the_mean() -> None:
    layout = KVLayout(1, 2, 16, "float32", 8)
    kv = kv_of(layout, seed=2)
    codec = codec_for("sparse", layout, keep=0.2, max_error=2.0).at(64)
    _, out = round_trip(codec, kv)
    center = kv.mean(-1, keepdim=True).bfloat16().float()
    stays = out != center
    assert (stays.sum((-2, -1)) <= codec._staying(8, False)).all() and stays.any()
    apart = (kv - center).abs()
    reach = apart.amax(-1, keepdim=True) / 254 * 1.01
    assert ((out - kv).abs() <= reach)[stays].all()
    dropped = apart.masked_fill(stays, 0).amax((-2, -1))
    assert (dropped <= apart.masked_fill(~stays, torch.inf).amin((-2, -1))).all()


@pytest.mark.parametrize("name", NAMES)
def test_k_is_reduced_without_its_rope(name: str) -> None:
    layout = KVLayout(2, 3, 16, "float32", 64)
    kv = kv_of(layout)
    turning(ROPE, True, 128, 64, 16).turn(kv[:, 0].clone(), kv[:, 0])
    known, unturned = (round_trip(codec_for(name, layout, rope=rope, keep=0.1, max_error=2.0).at(128), kv)[1] for rope in (ROPE, b""))
    assert (known - kv)[:, 0].norm() < 0.9 * (unturned - kv)[:, 0].norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_keep_their_bits(name: str, bad: float) -> None:
    kv = blurred(LAYOUT)
    kv[1, 1, 2, 9, 5] = bad
    encoded, out = round_trip(codec_for(name, LAYOUT, rope=ROPE), kv)
    assert (encoded.fell_back, encoded.codec) == ("error", LosslessCodec(2))
    assert torch.equal(as_bytes(out), as_bytes(kv))


@pytest.mark.parametrize("name", NAMES)
def test_a_block_without_redundancy_is_stored_losslessly(name: str) -> None:
    kv = torch.randn(LAYOUT.block_shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    encoded, out = round_trip(codec_for(name, LAYOUT, rope=ROPE, keep=0.1), kv)
    assert (encoded.fell_back, encoded.error) == ("error", 0.0)
    assert torch.equal(out, kv)


@pytest.mark.parametrize("name", NAMES)
def test_errors_add_up(name: str) -> None:
    kv = blurred(LAYOUT)
    codec = codec_for(name, LAYOUT, rope=ROPE)
    alone = round_trip(codec, kv)[0].error
    assert round_trip(codec, kv, 0.01)[0].error == pytest.approx(alone + 0.01)
    assert round_trip(codec, kv, 0.2)[0].fell_back == "error"


@pytest.mark.parametrize("name", NAMES)
def test_exact_tokens_are_exact(name: str) -> None:
    kv = blurred(LAYOUT)
    encoded, out = round_trip(codec_for(name, LAYOUT, rope=ROPE).at(1), kv)
    assert not encoded.fell_back
    assert torch.equal(out[..., :3, :], kv[..., :3, :]) and not torch.equal(out[..., 3, :], kv[..., 3, :])


def test_a_mask_that_does_not_match_the_count_of_numbers_is_corrupt() -> None:
    codec = codec_for("sparse", LAYOUT, rope=ROPE).at(64)
    payload = np.array(codec.encode(as_bytes(blurred(LAYOUT))).payload)
    mask = codec._parts()[1].codes.start
    payload[mask] ^= 1
    with pytest.raises(TieredKVError, match="mask") as caught:
        codec.decode(memoryview(payload), torch.zeros(LAYOUT.block_bytes, dtype=torch.uint8))
    assert caught.value.kind is Kind.CORRUPT


@pytest.mark.parametrize("codec", [LowRankCodec, SparseCodec])
def test_keep_is_parsed_after_the_name(codec: type[ReducedCodec]) -> None:
    assert codec.parameters_of("0.3") == {"keep": 0.3}
    assert codec(keep=1).keep == 1.0 and isinstance(codec(keep=1).keep, float)
    for text in ("", "x", "0", "-1", "1.5", "nan", "inf", "0.3,0.4"):
        with pytest.raises(TieredKVError, match="above 0 and at most 1") as caught:
            codec.parameters_of(text)
        assert caught.value.kind is Kind.CONFIG


@pytest.mark.parametrize("keep", [0, 1.01, -0.5, float("nan"), True, "0.5", None])
@pytest.mark.parametrize("name", NAMES)
def test_an_invalid_keep_is_refused(name: str, keep) -> None:
    with pytest.raises(TieredKVError, match="keep"):
        replace(codec_for(name, LAYOUT), keep=keep)
