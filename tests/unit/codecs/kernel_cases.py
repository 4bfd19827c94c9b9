"""Compares the kernels with the torch path: on a GPU if there is one, else in Triton's interpreter.

test_kernels.py runs this module in a separate process, because the interpreter must be chosen before triton is imported.
"""

import numpy as np
import pytest
import torch

from tests.unit.codecs.kv import as_bytes, kv_of
from tiered_kv.codecs import codec_for, integer, kernels, parts
from tiered_kv.codecs.integer import IntegerCodec
from tiered_kv.codecs.rotation import rope_of_theta
from tiered_kv.layout import KVLayout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 1e-6}
"""One unit in the last place of the dtype. For float32: the difference that a fused multiply-add may cause."""
SAME = {"bfloat16": 0.95 if DEVICE.type == "cuda" else 0.4, "float16": 0.95, "float32": 0.5}
"""At least this part of the numbers must be identical."""
SHAPES = {
    "a model's": (2, 2, 64, 20),
    "no power of two": (1, 2, 20, 18),
    "one token": (2, 2, 16, 1),
    "many tokens": (1, 1, 32, 40),
    "odd": (1, 3, 15, 5),
}
"""(L, H, D, T)"""


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Makes every decode use the kernels. Returns a list of the tensors that the kernels filled."""
    filled: list[torch.Tensor] = []
    restore = kernels.restore

    def noted(codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, **how) -> None:
        filled.append(out)
        restore(codes, scales, out, **how)

    if DEVICE.type == "cpu":  # the interpreter multiplies bf16 as if its bits were integers
        for module in (parts, kernels):
            monkeypatch.setattr(module, "product_dtype", lambda out: torch.float32)
    monkeypatch.setattr(integer, "kernels_of", lambda device: kernels)
    monkeypatch.setattr(kernels, "restore", noted)
    return filled


def by_torch(codec: IntegerCodec, payload: memoryview, kv: torch.Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer, "kernels_of", lambda device: None)
        codec.decode_kv(payload, kv)


def assert_like_torch(codec: IntegerCodec, kv: torch.Tensor, out: torch.Tensor, filled: list[torch.Tensor]) -> None:
    """Checks that `out` is filled as torch fills it: each number within a unit in the last place plus 1e-6 of the greatest number."""
    encoded = codec.encode(as_bytes(kv))
    assert not encoded.fell_back
    payload = encoded.payload
    expected = torch.full_like(kv, torch.nan)
    by_torch(codec, payload, expected)
    filled.clear()
    codec.decode_kv(payload, out)
    assert len(filled) == 2  # K and V
    tolerance = TOLERANCE[codec.dtype]
    torch.testing.assert_close(out.cpu(), expected, rtol=tolerance, atol=1e-6 * float(expected.abs().max()))
    assert (out.cpu() == expected).float().mean() > SAME[codec.dtype]


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_kernels_decode_as_torch_does(bits: str, shape: tuple[int, ...], dtype: str, chosen: list) -> None:
    layers, heads, dim, tokens = shape
    layout = KVLayout(layers, heads, dim, dtype, tokens)
    rope = rope_of_theta(10_000, dim - dim % 2)
    codec = codec_for(bits, layout, rope=rope, max_error=1.0).at(2 if tokens > 8 else 64)
    assert_like_torch(codec, kv_of(layout), torch.full(layout.block_shape, torch.nan, dtype=layout.torch_dtype, device=DEVICE), chosen)


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("rope", [None, b"", rope_of_theta(100, 16), rope_of_theta(100, 8)], ids=["unknown", "none", "all", "half"])
@pytest.mark.parametrize("is_halves", [True, False])
def test_every_rotation(bits: str, rope: bytes | None, is_halves: bool, chosen: list) -> None:
    layout = KVLayout(1, 2, 16, "float32", 20)
    codec = codec_for(bits, layout, rope=rope, rope_halves=is_halves, max_error=1.0).at(64)
    assert_like_torch(codec, kv_of(layout), torch.full(layout.block_shape, torch.nan, device=DEVICE), chosen)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_decodes_into_a_part_of_a_pool_and_leaves_the_rest(bits: str, chosen: list) -> None:
    """Decodes into some slots of an engine's pool (2, L, slots, H, D)."""
    layout = KVLayout(2, 2, 16, "bfloat16", 20)
    pool = torch.full((2, 2, 50, 2, 16), 7.0, dtype=torch.bfloat16, device=DEVICE)
    part = pool[:, :, 10:30].permute(1, 0, 3, 2, 4)
    codec = codec_for(bits, layout, rope=rope_of_theta(100, 16), max_error=1.0).at(64)
    assert_like_torch(codec, kv_of(layout), part, chosen)
    assert (pool[:, :, :10] == 7).all() and (pool[:, :, 30:] == 7).all()


def test_every_code_of_a_byte(chosen: list) -> None:
    codes, scales = torch.arange(256, dtype=torch.uint8, device=DEVICE), torch.tensor([3.0, 0.5], device=DEVICE).view(2, 1, 1, 1)
    for bits, count in ((8, 256), (4, 512)):
        out = torch.zeros(1, 1, 1, count, device=DEVICE)
        kernels.restore(codes, scales, out, bits=bits, per_channel=False)
        packed = codes.cpu().numpy()
        expected = packed if bits == 8 else np.concatenate([packed & 15, packed >> 4])
        assert np.array_equal(out.cpu().numpy().ravel(), expected * 0.5 + 3)


def test_dtypes_without_kernels_decode_with_torch(chosen: list) -> None:
    for name, dtype in (("int8", "float64"), ("int6", "bfloat16")):
        layout = KVLayout(1, 1, 16, dtype, 8)
        kv, codec = kv_of(layout), codec_for(name, layout).at(64)
        out = torch.zeros_like(kv)
        codec.decode_kv(codec.encode(as_bytes(kv)).payload, out)
        assert out.any() and not chosen


def test_the_self_test_passes_and_detects_wrong_results(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert kernels.works_on(DEVICE) and not caplog.records
    monkeypatch.setattr(kernels, "restore", lambda *_, **__: None)
    assert not kernels.works_on(DEVICE) and "decode incorrectly" in caplog.text

    def broken(*_, **__) -> None:
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(kernels, "restore", broken)
    assert not kernels.works_on(DEVICE) and "no ptxas" in caplog.text
