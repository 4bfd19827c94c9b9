"""The library's parts: Quantizer and Compressor, alone and one behind the other, their errors, their sizes, and what they refuse."""

import copy
import pickle

import pytest
import torch

import tiered_kv
from tiered_kv.codecs.pairs import CodedTensor
from tiered_kv.compression import CompressedTensor, Compressor
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.quantization import QuantizedTensor, Quantizer

SHAPE = (2, 3, 40, 64)
Pair = tuple[torch.Tensor, torch.Tensor]


def pair(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE, rank: int | None = None) -> Pair:
    """Numbers of a normal distribution, of a few components only where a rank is given."""
    generator = torch.Generator().manual_seed(1)
    if rank is None:
        key, value = torch.randn(2, *shape, generator=generator)
    else:
        batch, heads, tokens, dim = shape
        of_tokens = torch.randn(2, batch, 1, tokens, rank, generator=generator)
        key, value = of_tokens @ torch.randn(2, batch, heads, rank, dim, generator=generator)
    return key.to(dtype), value.to(dtype)


def error_of(exact: torch.Tensor, again: torch.Tensor) -> float:
    """The relative mean squared error of the sequence where it is greatest."""
    apart = (again.double() - exact.double()).square().sum((1, 2, 3)) / exact.double().square().sum((1, 2, 3))
    return float(apart.max())


def assert_exact(given: Pair, back: Pair) -> None:
    for x, y in zip(given, back, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def test_the_parts_are_importable_from_the_package() -> None:
    assert (tiered_kv.Quantizer, tiered_kv.Compressor) == (Quantizer, Compressor)


@pytest.mark.parametrize(("bits", "bound", "size"), [(8, 4e-5, 0.54), (4, 2e-2, 0.29)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_quantized_pairs_come_back(bits: int, bound: float, size: float, dtype: torch.dtype) -> None:
    key, value = given = pair(dtype)
    quantizer = Quantizer(bits=bits, use_amp=True)
    key_q, value_q = quantizer.quantize(key, value)
    back = quantizer.dequantize(key_q, value_q)
    for x, y, record in zip(given, back, (key_q, value_q), strict=True):
        assert isinstance(record, QuantizedTensor)
        assert (record.shape, record.dtype, record.device) == (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)
        assert 0 < error_of(x, y) <= record.error * 1.001 <= bound
        assert record.nbytes <= size * 2 * x.numel()
    assert key_q.nbytes + value_q.nbytes == len(key_q.payload)


@pytest.mark.parametrize(("bits", "codes"), [(8, 255), (4, 15)])
def test_the_bound_of_a_token_holds(bits: int, codes: int) -> None:
    key, value = pair()
    again, _ = Quantizer(bits).dequantize(*Quantizer(bits).quantize(key, value))
    low, high = key.amin(-1, keepdim=True), key.amax(-1, keepdim=True)
    step = (high - low + (low.abs() + high.abs()) / 64) / codes
    apart = (again - key).norm(dim=-1, keepdim=True) / 64**0.5
    assert (apart <= step / 2 * (1.01 if bits == 8 else 1.5)).all()  # rotated, the span is another one


@pytest.mark.parametrize("method", ["svd", "lowrank", "sparse"])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 1])
def test_compressed_pairs_come_back_in_their_part_of_the_bytes(method: str, ratio: float) -> None:
    key, value = given = pair(rank=4)
    compressor = Compressor(ratio=ratio, method=method)
    records = compressor.compress(key, value)
    back = compressor.decompress(*records)
    assert sum(record.nbytes for record in records) <= ratio * (key.nbytes + value.nbytes)
    for x, y, record in zip(given, back, records, strict=True):
        assert isinstance(record, CompressedTensor) and record.fell_back == ""
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert 0 < error_of(x, y) <= record.error * 1.001 < (0.5 if method == "sparse" else 1e-3)


def test_svd_and_lowrank_are_one_method() -> None:
    given = pair(rank=4)
    assert Compressor(0.3, "svd").compress(*given) == Compressor(0.3, "lowrank").compress(*given)


@pytest.mark.parametrize("method", ["svd", "sparse"])
def test_noise_is_compressed_though_little_is_left_of_it(method: str) -> None:
    key, value = pair()
    key_c, value_c = Compressor(ratio=0.1, method=method).compress(key, value)
    assert key_c.fell_back == "" and 0.1 < key_c.error < 1
    assert key_c.nbytes + value_c.nbytes <= 0.1 * (key.nbytes + value.nbytes)


@pytest.mark.parametrize("method", ["svd", "sparse"])
@pytest.mark.parametrize("bits", [8, 4])
def test_they_compose(method: str, bits: int) -> None:
    key, value = given = pair(rank=4)
    quantizer, compressor = Quantizer(bits=bits, use_amp=True), Compressor(ratio=0.3, method=method)
    key_q, value_q = quantizer.quantize(key, value)
    records = compressor.compress(key_q, value_q)
    back = quantizer.dequantize(*compressor.decompress(*records))
    alone = compressor.compress(key, value)[0].error
    for x, y, record in zip(given, back, records, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert record.error >= key_q.error
        assert error_of(x, y) <= 2 * record.error + alone


def test_records_of_other_pairs_and_in_another_order_are_what_they_are() -> None:
    quantizer = Quantizer()
    one, two = quantizer.quantize(*pair()), quantizer.quantize(*pair(torch.bfloat16))
    key, value = quantizer.dequantize(*one)
    swapped = quantizer.dequantize(one[1], one[0])
    assert torch.equal(swapped[0], value) and torch.equal(swapped[1], key)
    with pytest.raises(TieredKVError, match="dtype of key"):
        quantizer.dequantize(one[0], two[1])


@pytest.mark.parametrize("through", [copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_records_can_be_copied_and_pickled(through) -> None:
    quantizer = Quantizer(4)
    records = quantizer.quantize(*pair())
    again = tuple(map(through, records))
    assert again == records and hash(again[0]) == hash(records[0])
    assert_exact(quantizer.dequantize(*records), quantizer.dequantize(*again))


@pytest.mark.parametrize("part", [Quantizer(8), Quantizer(4), Compressor(0.4), Compressor(0.4, "sparse")], ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_keep_their_bits(part: Quantizer | Compressor, bad: float) -> None:
    key, value = pair(torch.bfloat16)
    value[1, 2, 3, 4] = bad
    there, back = (part.quantize, part.dequantize) if isinstance(part, Quantizer) else (part.compress, part.decompress)
    records = there(key, value)
    assert [record.fell_back for record in records] == ["error", "error"] and records[0].error == 0
    assert_exact((key, value), back(*records))


@pytest.mark.parametrize("part", [Quantizer(8), Quantizer(4), Compressor(0.4), Compressor(0.4, "sparse")], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 64), (1, 2, 7, 5)])
def test_small_shapes(part: Quantizer | Compressor, shape: tuple[int, ...]) -> None:
    given = pair(shape=shape)
    there, back = (part.quantize, part.dequantize) if isinstance(part, Quantizer) else (part.compress, part.decompress)
    records = there(*given)
    assert [x.shape for x in back(*records)] == [torch.Size(shape)] * 2
    assert all(record.error <= 1 for record in records)


def test_tensors_need_not_be_contiguous_nor_free_of_gradients_and_are_not_changed() -> None:
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in pair())
    before = key.detach().clone()
    expected = Quantizer().dequantize(*Quantizer().quantize(*pair()))
    back = Quantizer().dequantize(*Quantizer().quantize(key, value))
    assert_exact(expected, back)
    assert torch.equal(key.detach(), before) and not back[0].requires_grad


def test_an_autocast_region_decides_the_dtype_only_if_asked_and_only_what_fits() -> None:
    key, value = pair()
    value[0, 0, 0, 0] = 1e6
    outside = Quantizer(4, use_amp=True).quantize(key, value)
    assert [x.dtype for x in Quantizer(4, use_amp=True).dequantize(*outside)] == [torch.float32] * 2
    with torch.autocast("cpu", dtype=torch.float16):
        inside = Quantizer(4).quantize(key, value)
        amp, plain = (Quantizer(4, use_amp=each).dequantize(*inside) for each in (True, False))
    assert inside == outside
    assert [x.dtype for x in amp] == [torch.float16, torch.float32]
    assert [x.dtype for x in plain] == [torch.float32] * 2
    assert torch.equal(amp[0], plain[0].half())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, double = (Quantizer(use_amp=True).quantize(*pair(dtype)) for dtype in (torch.float16, torch.float64))
        assert [Quantizer(use_amp=True).dequantize(*each)[0].dtype for each in (half, double)] == [torch.float16, torch.float64]


KEY, VALUE = pair()
WRONG_PAIRS = {
    "integers": (KEY.int(), VALUE.int(), "key must be of a floating-point dtype .*got torch.int32"),
    "complex": (KEY.cfloat(), VALUE.cfloat(), "key must be of a floating-point dtype"),
    "an integer value": (KEY, VALUE.long(), "value must be of a floating-point dtype"),
    "no tensor": ([1.0], VALUE, "key must be a torch tensor .*got list"),
    "three axes": (KEY[0], VALUE[0], "key must be \\(batch, heads, tokens, head_dim\\)"),
    "no tokens": (KEY[:, :, :0], VALUE[:, :, :0], "key must be .*each at least 1"),
    "shapes": (KEY, VALUE[:, :, 1:], "value must have the shape of key, \\(2, 3, 40, 64\\), got \\(2, 3, 39, 64\\)"),
    "dtypes": (KEY, VALUE.half(), "value must have the dtype of key, torch.float32, got torch.float16"),
    "devices": (KEY, VALUE.to("meta"), "value must have the device of key"),
    "nothing": (None, None, "key must be a torch tensor .*got NoneType"),
    "half of a pair": (Quantizer().quantize(KEY, VALUE)[0], VALUE, "key must be a torch tensor .*got QuantizedTensor"),
}


@pytest.mark.parametrize("name", WRONG_PAIRS)
@pytest.mark.parametrize("take", [Quantizer().quantize, Compressor().compress, Compressor(0.3, "sparse").compress], ids=str)
def test_pairs_that_cannot_be_are_refused_by_name(name: str, take) -> None:
    key, value, message = WRONG_PAIRS[name]
    with pytest.raises(TieredKVError, match=message) as caught:
        take(key, value)
    assert caught.value.kind is Kind.LAYOUT
    assert caught.value.context["argument"] in message


def test_what_is_of_the_other_part_is_refused() -> None:
    quantized, compressed = Quantizer().quantize(KEY, VALUE), Compressor().compress(KEY, VALUE)
    for take, records in (
        (Compressor().decompress, quantized),
        (Compressor().decompress, (KEY, VALUE)),
        (Quantizer().dequantize, compressed),
        (Compressor().compress, compressed),
    ):
        with pytest.raises(TieredKVError, match="key must be") as caught:
            take(*records)
        assert caught.value.kind is Kind.LAYOUT


@pytest.mark.parametrize("bits", [3, 0, 16, "8", True, None, 8.5])
def test_other_bits_are_refused(bits) -> None:
    with pytest.raises(TieredKVError, match="bits must be 8 or 4") as caught:
        Quantizer(bits=bits)
    assert caught.value.kind is Kind.CONFIG


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), "0.3", True, None])
def test_other_ratios_are_refused(ratio) -> None:
    with pytest.raises(TieredKVError, match="ratio must be a number above 0 and at most 1") as caught:
        Compressor(ratio=ratio)
    assert caught.value.kind is Kind.CONFIG


@pytest.mark.parametrize("method", ["zip", "", None, ["svd"]])
def test_other_methods_are_refused(method) -> None:
    with pytest.raises(TieredKVError, match="method must be one of svd, lowrank, sparse") as caught:
        Compressor(ratio=0.3, method=method)
    assert caught.value.kind is Kind.CONFIG


def test_amp_is_on_or_off() -> None:
    with pytest.raises(TieredKVError, match="use_amp"):
        Quantizer(use_amp="yes")


def test_a_damaged_record_is_corrupt() -> None:
    key, value = Quantizer().quantize(KEY, VALUE)
    torn = QuantizedTensor(**{name: getattr(key, name) for name in CodedTensor.__dataclass_fields__} | {"payload": key.payload[:-1]})
    with pytest.raises(TieredKVError) as caught:
        Quantizer().dequantize(torn, value)
    assert caught.value.kind is Kind.CORRUPT


def test_a_record_is_shown_in_a_line() -> None:
    assert repr(Quantizer().quantize(KEY, VALUE)[0]).startswith("QuantizedTensor(int8, (2, 3, 40, 64), torch.float32, 16320 bytes, error")
