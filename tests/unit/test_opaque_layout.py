"""`OpaqueLayout`: blocks of which only the number of bytes is known."""

from dataclasses import asdict

import pytest

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import Namespace, as_token_ids
from tiered_kv.layout import KVLayout, OpaqueLayout, layout_of

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
        *[("item_bytes", value) for value in (0, 3, 16, True, 2.0, "2")],
    ],
)
def test_an_invalid_field_is_named(field, value):
    with pytest.raises(TieredKVError, match=field if (field, value) != ("block_tokens", 3) else "block_bytes") as caught:
        OpaqueLayout(**GOOD | {field: value})
    assert caught.value.kind is Kind.LAYOUT


@pytest.mark.parametrize("layout", [OpaqueLayout(**GOOD), OpaqueLayout(**GOOD, item_bytes=8), KVLayout(2, 1, 8, "bfloat16", 20)])
def test_a_layout_is_made_again_of_its_fields(layout):
    assert layout_of(asdict(layout)) == layout


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {},
        {"block_bytes": 4096, "block_tokens": 16, "description": "no width"},
        {**GOOD, "item_bytes": 1, "dtype": "uint8"},
        {**GOOD, "item_bytes": 5},
        {**asdict(KVLayout(2, 1, 8, "bfloat16", 20)), "description": "both"},
        {b"block_bytes": 4096},
    ],
)
def test_other_fields_make_no_layout(plain):
    with pytest.raises(TieredKVError) as caught:
        layout_of(plain)
    assert caught.value.kind is Kind.LAYOUT


def test_ranks_have_different_keys_and_no_whole_model_in_common():
    layout, ids = OpaqueLayout(**GOOD), as_token_ids(range(32))
    chains = [Namespace("weights", rank=rank, world=2).chain(layout) for rank in range(2)]
    assert len({key for chain in chains for key in chain.keys(ids)}) == 4
    assert [chain.whole_root for chain in chains] == [chain.root for chain in chains]
