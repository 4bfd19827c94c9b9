"""Tests of the raw codec and of the registry of codecs."""

import numpy as np
import pytest
import torch

from tests.contracts.codec import CodecContract
from tiered_kv.codecs import CODECS, codec_by_id, codec_by_name, codec_from_spec
from tiered_kv.codecs.base import byte_view
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.errors import Kind, TieredKVError


class TestRawCodec(CodecContract):
    @pytest.fixture
    def codec(self) -> RawCodec:
        return RawCodec()


def test_ids_and_names_never_change() -> None:
    known = {codec.id: codec.name for codec in CODECS}
    assert {0: "raw", 1: "lossless", 2: "int8", 3: "int6", 4: "int4", 5: "fp8", 8: "lowrank", 9: "sparse"}.items() <= known.items()


def test_raw_payload_shares_the_blocks_memory() -> None:
    raw = torch.zeros(100, dtype=torch.uint8)
    payload = RawCodec().encode(raw).payload
    raw[7] = 9
    assert payload[7] == 9


@pytest.mark.parametrize(
    "look_up",
    [
        lambda: codec_by_name("zip"),
        lambda: codec_by_id(200),
        lambda: codec_from_spec({"codec": "zip"}),
        lambda: codec_from_spec({"codec": ["raw"]}),
    ],
)
def test_an_unknown_codec_is_named_with_the_known_ones(look_up) -> None:
    with pytest.raises(TieredKVError, match="raw") as caught:
        look_up()
    assert caught.value.kind is Kind.CONFIG
    assert any(word in str(caught.value) for word in ("'zip'", "200", "['raw']"))


@pytest.mark.parametrize("spec", [None, [], {}, "raw", {"name": "raw"}])
def test_an_invalid_spec_is_refused(spec) -> None:
    with pytest.raises(TieredKVError, match="'codec'"):
        codec_from_spec(spec)


def test_byte_view_shares_memory_of_every_kind_of_buffer() -> None:
    array = np.arange(6, dtype="<u2").reshape(2, 3)
    assert bytes(byte_view(array)) == array.tobytes()
    array[0, 0] = 0x0101
    assert byte_view(array)[0] == 1
    tensor = torch.arange(5, dtype=torch.uint8)
    view = byte_view(tensor)
    tensor[0] = 7
    assert view[0] == 7
    assert byte_view(np.empty((0, 3), np.uint8)).nbytes == 0


def test_byte_view_refuses_what_it_would_have_to_copy() -> None:
    with pytest.raises(TypeError):
        byte_view(np.arange(10)[::2])
