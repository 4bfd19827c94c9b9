"""The test suite of both calibrated codecs. Their test modules subclass it and set `name`."""

from dataclasses import replace

import pytest
import torch

from tests.contracts.codec import CodecContract
from tests.unit.codecs.calibrations import calibration, kv_of, layout_of
from tests.unit.codecs.kv import as_bytes
from tiered_kv.codecs import Int4Codec, Int8Codec, LosslessCodec, codec_by_name, codec_for, parse_codec
from tiered_kv.codecs.calibrated.base import CalibratedCodec
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout

MADE = calibration()
LAYOUT = layout_of()
STEP = 1e-1


def round_trip(codec: CalibratedCodec, kv: torch.Tensor, carried_error: float = 0.0):
    """Encodes and decodes a block. Returns the encoding and the decoded block."""
    encoded = codec.encode(as_bytes(kv), carried_error)
    out = torch.full_like(kv, torch.nan)
    encoded.codec.decode(encoded.payload, as_bytes(out))
    return encoded, out


class CalibratedSuite(CodecContract):
    """The contract of all codecs, plus the behaviour of calibrated ones."""

    name: str
    sizes = (LAYOUT.block_bytes,)

    @pytest.fixture
    def codec(self) -> CalibratedCodec:
        return codec_for(f"{self.name}:{STEP}", LAYOUT, calibration=MADE).at(64)

    def block(self, nbytes: int) -> torch.Tensor:
        return as_bytes(kv_of(MADE, LAYOUT, start=64))

    def assert_same(self, decoded: torch.Tensor, raw: torch.Tensor) -> None:
        kv, again = (flat.view(torch.bfloat16).view(LAYOUT.block_shape) for flat in (raw, decoded))
        assert relative_error(kv, again) <= MADE.bound(self.name, STEP)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
    @pytest.mark.parametrize("start", [0, 2, 640])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("turned", [True, False])
    def test_kv_is_encoded_without_fallback(self, dtype: str, start: int, groups: int, turned: bool) -> None:
        made = calibration(groups) if turned else calibration(groups, b"")
        layout = layout_of(40, dtype)
        kv = kv_of(made, layout, start)
        encoded, out = round_trip(codec_for(f"{self.name}:{STEP}", layout, calibration=made).at(start), kv)
        assert (encoded.fell_back, encoded.codec.name) == ("", self.name)
        exact = max(4 - start, 0)
        assert torch.equal(out[..., :exact, :], kv[..., :exact, :])
        assert encoded.error == relative_error(kv, out) < 1e-2
        larger = torch.zeros(*kv.shape[:3], 50, kv.shape[4], dtype=kv.dtype)
        encoded.codec.decode_kv(encoded.payload, larger[..., 5:45, :])
        assert torch.equal(larger[..., 5:45, :], out)
        assert not larger[..., :5, :].any() and not larger[..., 45:, :].any()

    @pytest.mark.parametrize("tokens", [1, 2, 5, 31])
    @pytest.mark.parametrize("start", [0, 3, 7])
    def test_short_blocks_decode(self, tokens: int, start: int) -> None:
        layout = layout_of(tokens)
        kv = kv_of(MADE, layout, start)
        encoded, out = round_trip(codec_for(f"{self.name}:{STEP}", layout, calibration=MADE).at(start), kv)
        assert encoded.fell_back in ("", "domain") and out.isfinite().all()
        assert relative_error(kv, out) <= max(encoded.error, 0) and encoded.error < 4e-2

    def test_a_finer_step_has_less_error_and_more_bytes(self) -> None:
        kv = kv_of(MADE, LAYOUT, 64)
        found = [round_trip(codec_for(f"{self.name}:{step}", LAYOUT, calibration=MADE).at(64), kv)[0] for step in (5e-2, 1e-1)]
        assert found[0].error < found[1].error / 2
        assert found[0].payload.nbytes > found[1].payload.nbytes

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("token", [0, 31])
    def test_numbers_that_are_not_finite_keep_their_bits(self, bad: float, token: int) -> None:
        kv = kv_of(MADE, LAYOUT)
        kv[1, 1, 1, token, 5] = bad
        encoded, out = round_trip(codec_for(self.name, LAYOUT, calibration=MADE), kv)
        assert encoded.fell_back in ("error", "domain") and encoded.codec == LosslessCodec(2)
        assert torch.equal(as_bytes(out), as_bytes(kv))

    def test_a_block_above_the_bound_falls_back_to_int8(self) -> None:
        kv = kv_of(MADE, LAYOUT, 64)
        encoded, out = round_trip(codec_for(f"{self.name}:{STEP}", LAYOUT, calibration=MADE, max_error=1e-9).at(64), kv)
        assert (encoded.fell_back, type(encoded.codec)) == ("error", Int8Codec)
        assert encoded.codec.rope == MADE.rope and encoded.codec.start == 64
        assert relative_error(kv, out) <= encoded.codec.max_error

    def test_a_block_unlike_the_calibration_falls_back_to_a_codec_of_the_same_quality(self) -> None:
        kv = 30 * kv_of(MADE, LAYOUT, 64)
        encoded, out = round_trip(codec_for(f"{self.name}:{STEP}", LAYOUT, calibration=MADE).at(64), kv)
        assert (encoded.fell_back, type(encoded.codec)) == ("domain", Int4Codec)
        assert encoded.payload.nbytes == encoded.codec.payload_bytes and out.isfinite().all()

    @pytest.mark.parametrize("scale", [0.0, 1e-38, 1e30, 3e38])
    def test_any_block_decodes_to_finite_numbers(self, scale: float) -> None:
        kv = (kv_of(MADE, LAYOUT, 64).float() * scale).clamp(-3e38, 3e38).bfloat16()
        encoded, out = round_trip(codec_for(f"{self.name}:{STEP}", LAYOUT, calibration=MADE).at(64), kv)
        assert out.isfinite().all()
        assert not encoded.error or relative_error(kv, out) <= encoded.error

    def test_a_block_decoded_by_int8_can_be_encoded_and_the_errors_add_up(self) -> None:
        kv = kv_of(MADE, LAYOUT, 64)
        first, once = round_trip(codec_for("int8", LAYOUT, rope=MADE.rope).at(64), kv)
        second, twice = round_trip(codec_for(f"{self.name}:{STEP}", LAYOUT, calibration=MADE).at(64), once, first.error)
        assert second.fell_back == ""
        assert second.error == first.error + relative_error(once, twice)
        assert round_trip(second.codec, once, 1.0)[0].fell_back == "error"

    def test_the_last_block_of_a_chain_has_its_own_step(self) -> None:
        codec = codec_for(f"{self.name}:1e-1:3e-2", LAYOUT, calibration=MADE)
        assert [codec.at(64, is_last_block).step for is_last_block in (False, True)] == [1e-1, 3e-2]
        assert codec_for(f"{self.name}:1e-1", LAYOUT, calibration=MADE).at(64, True).step == 1e-1

    def test_damaged_payloads_raise_corrupt_or_decode(self, codec: CalibratedCodec) -> None:
        raw = self.block(LAYOUT.block_bytes)
        payload = bytes(codec.encode(raw).payload)
        kinds = set()
        for at in range(0, len(payload), 7):
            damaged = bytearray(payload)
            damaged[at] ^= 1 << at % 8
            try:
                codec.decode(memoryview(bytes(damaged)), torch.zeros_like(raw))
            except TieredKVError as error:
                kinds.add(error.kind)
        assert kinds == {Kind.CORRUPT}
        for length in range(0, len(payload), 5):
            with pytest.raises(TieredKVError) as caught:
                codec.decode(memoryview(payload[:length]), torch.zeros_like(raw))
            assert caught.value.kind is Kind.CORRUPT

    def test_without_a_layout_bytes_are_stored_losslessly(self) -> None:
        encoded = codec_for(self.name, None, calibration=MADE).encode(torch.zeros(1001, dtype=torch.uint8))
        assert (encoded.codec, encoded.fell_back) == (LosslessCodec(1), "opaque")

    def test_without_calibration_the_error_names_the_command(self) -> None:
        with pytest.raises(TieredKVError, match="tiered-kv calibrate MODEL") as caught:
            codec_for(self.name, LAYOUT)
        assert caught.value.kind is Kind.CONFIG

    def test_the_calibration_of_another_model_is_refused(self) -> None:
        with pytest.raises(TieredKVError, match="tiny is for 3 layers of 2 KV heads of 8") as caught:
            codec_for(self.name, KVLayout(3, 4, 8, "bfloat16"), calibration=MADE)
        assert caught.value.kind is Kind.CONFIG

    @pytest.mark.parametrize("text", ["", "fast", "1e-4:2e-4:3e-4", "0", "-1e-4", "nan", "1", "1e-4:"])
    def test_invalid_steps_are_refused(self, text: str) -> None:
        with pytest.raises(TieredKVError, match=f"{self.name}:STEP") as caught:
            parse_codec(f"{self.name}:{text}")
        assert caught.value.kind is Kind.CONFIG

    def test_steps_are_parsed(self) -> None:
        assert parse_codec(self.name)[1] == {}
        assert parse_codec(f"{self.name}:6e-5")[1] == {"step": 6e-5}
        assert parse_codec(f"{self.name}:2e-4:3e-5")[1] == {"step": 2e-4, "tail_step": 3e-5}
        assert codec_by_name(self.name).step == type(codec_by_name(self.name)).step_default

    @pytest.mark.parametrize(
        "wrong",
        [{"step": 0.0}, {"step": 1}, {"tail_step": -1.0}, {"fingerprint": b"x"}, {"fingerprint": "x"}, {"start": -1}, {"sinks": True}],
    )
    def test_an_invalid_parameter_is_refused_by_name(self, wrong: dict, codec: CalibratedCodec) -> None:
        [name] = wrong
        with pytest.raises(TieredKVError, match=name):
            replace(codec, **wrong)
