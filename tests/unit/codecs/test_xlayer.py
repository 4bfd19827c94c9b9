"""Tests of the xlayer codec: the suite of calibrated codecs, and the gain from predicting across layers."""

import pytest
import torch

from tests.unit.codecs.calibrated_suite import LAYOUT, MADE, CalibratedSuite, round_trip
from tests.unit.codecs.calibrations import calibration, kv_of
from tiered_kv.codecs import codec_for
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.errors import TieredKVError


class TestXlayer(CalibratedSuite):
    name = "xlayer"


@pytest.mark.parametrize("product", ["bfloat16", "float32"])
@pytest.mark.parametrize("groups", [1, 2])
def test_products_of_either_dtype_are_accurate(product: str, groups: int) -> None:
    made = calibration(groups)
    kv = kv_of(made, LAYOUT, 64)
    encoded, out = round_trip(codec_for("xlayer:0.05", LAYOUT, calibration=made, product=product).at(64), kv)
    assert (encoded.fell_back, encoded.codec.product) == ("", product)
    assert relative_error(kv, out) < 1e-3


def test_an_invalid_product_is_refused() -> None:
    with pytest.raises(TieredKVError, match="product"):
        codec_for("xlayer", LAYOUT, calibration=MADE, product="float16")


def test_errors_do_not_add_up_over_the_layers() -> None:
    kv = kv_of(MADE, LAYOUT, 64).float()
    out = round_trip(codec_for("xlayer:0.1", LAYOUT, calibration=MADE).at(64), kv.bfloat16())[1].float()
    of_layer = (out - kv).square().mean((1, 2, 3, 4))
    assert of_layer.max() < 2 * of_layer.min()


def test_layers_predicted_from_others_take_fewer_bytes() -> None:
    """The tables do not predict the same numbers with the layers in another order, which costs more bytes."""
    kv, codec = kv_of(MADE, LAYOUT, 64), codec_for("xlayer:0.1", LAYOUT, calibration=MADE, max_error=9.0).at(64)
    plain, turned = (round_trip(codec, each)[0].payload.nbytes for each in (kv, kv.flip(0)))
    assert plain < 0.9 * turned


def test_the_number_of_threads_does_not_change_the_result() -> None:
    codec = codec_for("xlayer:0.1", LAYOUT, calibration=MADE).at(64)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(round_trip(codec, kv_of(MADE, LAYOUT, 64))[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
