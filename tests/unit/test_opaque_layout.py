"""`OpaqueLayout`: blocks of which only the number of bytes is known."""

import pytest

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace
from tiered_kv.layout import KVLayout, OpaqueLayout

GOOD = {"block_bytes": 4096, "block_tokens": 16, "description": "pages of a backend"}


def test_each_field_is_part_of_the_root():
    namespace = Namespace("weights")
    changed = [{"block_bytes": 8192}, {"block_tokens": 32}, {"description": "other pages"}, {"item_bytes": 2}]
    roots = {namespace.root(OpaqueLayout(**GOOD | each)) for each in [{}, *changed]}
    assert len(roots) == 5
    assert namespace.root(OpaqueLayout(**GOOD)) in roots


def test_its_root_differs_from_that_of_a_kv_layout_of_the_same_size():
    layout = KVLayout(1, 1, 128, "float8_e4m3fn", 16)
    assert layout.block_bytes == 4096
    assert Namespace("weights").root(layout) != Namespace("weights").root(OpaqueLayout(**GOOD))
    assert OpaqueLayout(**GOOD).spec.startswith("opaque")
    assert not layout.spec.startswith("opaque")


def test_its_kv_has_a_row_for_each_token():
    layout = OpaqueLayout(**GOOD)
    assert layout.kv_shape(32) == (1, 1, 1, 32, 256)
    assert layout.block_shape == (1, 1, 1, 16, 256)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("block_bytes", value) for value in (0, -1, 4095, 1.5, True, "4096")],
        *[("block_tokens", value) for value in (0, 3, None)],
        *[("description", value) for value in ("", "two\nlines", "x" * 2001, b"bytes", None)],
        *[("item_bytes", value) for value in (0, 3, 16)],
    ],
)
def test_an_invalid_field_is_named(field, value):
    with pytest.raises(TieredKVError, match=field if (field, value) != ("block_tokens", 3) else "block_bytes") as caught:
        OpaqueLayout(**GOOD | {field: value})
    assert caught.value.kind is Kind.LAYOUT
