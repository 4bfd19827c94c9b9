"""The shape of a block, and what is refused as KV."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES, KVLayout

LAYOUT = KVLayout(3, 2, 8, torch.bfloat16, 16)
sizes = st.integers(1, 64)
layouts = st.builds(KVLayout, sizes, sizes, sizes, st.sampled_from(sorted(ITEM_BYTES)), sizes)


@given(layouts)
def test_bytes_are_those_of_the_tensor(layout):
    block = torch.empty(layout.block_shape, dtype=layout.torch_dtype, device="meta")
    assert block.numel() * block.element_size() == layout.block_bytes == layout.token_bytes * layout.block_tokens


@given(layouts, layouts)
def test_spec_is_equal_for_equal_layouts_only(one, other):
    assert (one.spec == other.spec) == (one == other)


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_item_bytes_are_torchs(dtype):
    assert KVLayout(1, 1, 1, dtype, 1).torch_dtype.itemsize == ITEM_BYTES[dtype]


def test_dtype_by_name_or_as_torchs_own():
    assert KVLayout(3, 2, 8, "bfloat16", 16) == LAYOUT == KVLayout(3, 2, 8, "torch.bfloat16", 16)
    assert hash(KVLayout(3, 2, 8, "bfloat16", 16)) == hash(LAYOUT)
    assert pickle.loads(pickle.dumps(LAYOUT)) == LAYOUT
    assert KVLayout(1, 1, 1, "float32").block_tokens == 64


@pytest.mark.parametrize("field", ["layers", "kv_heads", "head_dim", "block_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "8"])
def test_a_size_that_is_none_is_refused_by_name(field, value):
    fields = dict(layers=1, kv_heads=1, head_dim=1, dtype="float32", block_tokens=1) | {field: value}
    with pytest.raises(TieredKVError, match=field) as caught:
        KVLayout(**fields)
    assert caught.value.kind == Kind.LAYOUT
    assert caught.value.context["field"] == field


@pytest.mark.parametrize("dtype", ["int8", "torch.int64", "", None, torch.bool, "bfloat"])
def test_a_dtype_that_is_none_is_refused(dtype):
    with pytest.raises(TieredKVError, match="dtype"):
        KVLayout(1, 1, 1, dtype)


def kv_of(tokens=5, dtype=torch.bfloat16, **changes):
    return torch.zeros(LAYOUT.kv_shape(tokens), dtype=dtype, **changes)


def test_kv_that_fits():
    LAYOUT.check_kv(kv_of(), 5)
    LAYOUT.check_kv(kv_of(0), 0)
    LAYOUT.check_kv(kv_of(9)[..., 2:7, :], 5)


@pytest.mark.parametrize(
    ("kv", "reason"),
    [
        (kv_of(6), r"must have the shape \(3, 2, 2, 5, 8\) .*, got \(3, 2, 2, 6, 8\)"),
        (kv_of()[0], "shape"),
        (kv_of(dtype=torch.float16), "float16"),
        (kv_of(device="meta"), "meta"),
        (kv_of().to_sparse(), "sparse"),
        (np.zeros(LAYOUT.kv_shape(5), "float32"), "torch tensor, got ndarray"),
        (None, "NoneType"),
        ([1, 2], "list"),
    ],
)
def test_kv_that_does_not_fit_is_refused(kv, reason):
    with pytest.raises(TieredKVError, match=reason) as caught:
        LAYOUT.check_kv(kv, 5)
    assert caught.value.kind == Kind.LAYOUT


def test_a_part_is_held_to_the_shape_that_is_given():
    LAYOUT.check_part(kv_of()[0, 0], (2, 5, 8), "keys of layer 0")
    with pytest.raises(TieredKVError, match=r"keys of layer 0 must have the shape \(2, 4, 8\) .*, got \(2, 5, 8\)"):
        LAYOUT.check_part(kv_of()[0, 0], (2, 4, 8), "keys of layer 0")


def test_importing_the_layout_does_not_import_torch():
    probe = "import sys, tiered_kv.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
