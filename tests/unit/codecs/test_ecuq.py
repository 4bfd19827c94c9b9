"""Tests of the ecuq codec: the suite of calibrated codecs, and each number within half a step of its channel."""

import torch

from tests.unit.codecs.calibrated_suite import LAYOUT, MADE, CalibratedSuite, round_trip
from tests.unit.codecs.calibrations import calibration, kv_of, layout_of
from tiered_kv.codecs import codec_for


class TestEcuq(CalibratedSuite):
    name = "ecuq"


def test_a_number_is_within_half_a_step_of_its_channel() -> None:
    made, layout = calibration(rope=b""), layout_of(32, "float32")
    kv = kv_of(made, layout, 64)
    _, out = round_trip(codec_for("ecuq:0.1", layout, calibration=made).at(64), kv)
    half = 0.05 * made.ecuq.width.view(3, 2, 2, 1, 8)
    assert ((out - kv).abs() <= half + 1e-5).all()
    assert ((out - kv).abs() > half / 2).any()


def test_encoding_and_decoding_a_block_again_gives_the_same() -> None:
    codec = codec_for("ecuq:0.1", LAYOUT, calibration=MADE)
    payloads = [bytes(round_trip(codec.at(start), kv_of(MADE, layout_of(32, "bfloat16"), start))[0].payload) for start in (64, 64)]
    assert payloads[0] == payloads[1]
    assert torch.equal(*(round_trip(codec.at(64), kv_of(MADE, LAYOUT, 64))[1] for _ in range(2)))
