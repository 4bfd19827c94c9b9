"""Descriptions of models as messages: those of a `KVLayout` stay as they are, and those of an opaque layout come back."""

from contextlib import suppress
from dataclasses import asdict

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv import KVLayout, Namespace, OpaqueLayout
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.model_info import ModelInfo

KNOWN = ModelInfo(KVLayout(2, 1, 8, "bfloat16", 20), "w", b"\1\2", False, asdict(Namespace("w")))
OPAQUE = ModelInfo(OpaqueLayout(4096, 16, "pages of a test · 2", 2), "w", None, True, asdict(Namespace("w")))
JUNK = (
    st.none()
    | st.booleans()
    | st.integers(-3, (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.lists(st.integers(0, 9))
)


def test_the_message_of_a_kv_layout_does_not_change():
    """Workers and nodes of other versions read it."""
    assert KNOWN.as_message() == {
        "layout": {"layers": 2, "kv_heads": 1, "head_dim": 8, "dtype": "bfloat16", "block_tokens": 20},
        "weights": "w",
        "rope": b"\1\2",
        "rope_halves": False,
        "namespace": asdict(Namespace("w")),
    }
    assert list(KNOWN.as_message()["layout"]) == ["layers", "kv_heads", "head_dim", "dtype", "block_tokens"]


@pytest.mark.parametrize("facts", [KNOWN, OPAQUE])
def test_a_description_comes_back_from_its_message(facts):
    assert ModelInfo.of_message(msgpack.unpackb(msgpack.packb(facts.as_message()))) == facts


@given(
    st.sampled_from([KNOWN, OPAQUE]), st.sampled_from(["block_bytes", "block_tokens", "description", "item_bytes", "layers", "more"]), JUNK
)
def test_a_layout_with_a_field_replaced_is_refused_or_valid(facts, field, value):
    message = facts.as_message()
    message["layout"] = message["layout"] | {field: value}
    with suppress(TieredKVError):
        read = ModelInfo.of_message(message)
        assert read.as_message() == message
        assert type(read.layout) is type(facts.layout)


@given(st.dictionaries(st.text(max_size=3) | st.sampled_from(sorted(asdict(OPAQUE.layout))), JUNK, max_size=5) | JUNK)
def test_anything_else_is_no_layout(layout):
    with pytest.raises(TieredKVError, match="invalid model description") as caught:
        ModelInfo.of_message(OPAQUE.as_message() | {"layout": layout})
    assert caught.value.kind is Kind.TRANSPORT
