"""The xlayer codec: what all calibrated codecs promise, and what prediction across layers is worth."""

import pytest
import torch

from tests.unit.codecs.calibrated_suite import LAYOUT, MADE, CalibratedSuite, through
from tests.unit.codecs.calibrations import calibration, kv_of
from tiered_kv.codecs import codec_for
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.errors import TieredKVError


class TestXlayer(CalibratedSuite):
    name = "xlayer"


@pytest.mark.parametrize("product", ["bfloat16", "float32"])
@pytest.mark.parametrize("groups", [1, 2])
def test_products_of_either_dtype_serve(product: str, groups: int) -> None:
    made = calibration(groups)
    kv = kv_of(made, LAYOUT, 64)
    encoded, out = through(codec_for("xlayer:0.05", LAYOUT, calibration=made, product=product).at(64), kv)
    assert (encoded.fell_back, encoded.codec.product) == ("", product)
    assert relative_error(kv, out) < 1e-3


def test_other_products_are_refused() -> None:
    with pytest.raises(TieredKVError, match="product"):
        codec_for("xlayer", LAYOUT, calibration=MADE, product="float16")


def test_errors_do_not_add_up_over_the_layers() -> None:
    kv = kv_of(MADE, LAYOUT, 64).float()
    out = through(codec_for("xlayer:0.1", LAYOUT, calibration=MADE).at(64), kv.bfloat16())[1].float()
    of_layer = (out - kv).square().mean((1, 2, 3, 4))
    assert of_layer.max() < 2 * of_layer.min()


def test_layers_that_follow_from_others_cost_little() -> None:
    """The same numbers with the layers in another order are not what the tables predict."""
    kv, codec = kv_of(MADE, LAYOUT, 64), codec_for("xlayer:0.1", LAYOUT, calibration=MADE, max_error=9.0).at(64)
    plain, turned = (through(codec, each)[0].payload.nbytes for each in (kv, kv.flip(0)))
    assert plain < 0.9 * turned


def test_the_machines_threads_change_no_number() -> None:
    codec = codec_for("xlayer:0.1", LAYOUT, calibration=MADE).at(64)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(through(codec, kv_of(MADE, LAYOUT, 64))[1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
