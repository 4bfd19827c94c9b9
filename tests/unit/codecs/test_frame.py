"""Tests of frames: sizes, every kind of damage, versions, and the stored bytes of version 1."""

import json
import struct
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.codecs import CODECS, Calibration
from tiered_kv.codecs.calibrated.tables import register
from tiered_kv.codecs.frame import ALIGN_BYTES, VERSION, checksum, encode_frame, encode_header, frame_bytes, open_frame, open_pieces
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.errors import Kind, TieredKVError

KEY, OTHER_KEY, ROOT = bytes(range(32)), bytes(range(1, 33)), bytes(range(100, 132))
GOLDEN = Path(__file__).parents[2] / "data" / "frames"


def frame_of(content: bytes, key: bytes = KEY, namespace: bytes = ROOT) -> bytes:
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return b"".join(encode_frame(key, namespace, RawCodec(), raw))


def resealed(frame: bytes, at: int, new: bytes) -> bytes:
    """Returns a frame with some bytes replaced and a valid checksum."""
    changed = frame[:at] + new + frame[at + len(new) : -16]
    return changed + xxhash.xxh3_128(changed[8:40] + changed).digest()


def assert_corrupt(buffer, *, key: bytes = KEY, namespace: bytes | None = None, match: str | None = None) -> None:
    with pytest.raises(TieredKVError, match=match) as caught:
        open_frame(buffer, key, namespace)
    assert caught.value.kind is Kind.CORRUPT


@given(st.binary(min_size=1, max_size=300))
def test_a_frame_opens_to_the_block_it_was_made_of(content: bytes) -> None:
    whole = frame_of(content)
    assert len(whole) == frame_bytes(RawCodec(), len(content))
    frame = open_frame(whole, KEY, ROOT)
    assert (frame.key, frame.namespace, frame.codec, frame.raw_bytes, frame.version) == (KEY, ROOT, RawCodec(), len(content), VERSION)
    assert bytes(frame.payload) == content
    out = torch.zeros(len(content), dtype=torch.uint8)
    frame.decode(out)
    assert out.numpy().tobytes() == content


def test_the_payload_begins_aligned_and_is_not_copied() -> None:
    whole = np.frombuffer(bytearray(frame_of(b"abc" * 1000)), np.uint8)
    payload = open_frame(whole, KEY).payload
    assert (np.frombuffer(payload, np.uint8).ctypes.data - whole.ctypes.data) % ALIGN_BYTES == 0
    whole[-17] = ord("!")
    assert payload[-1] == ord("!")


@pytest.mark.parametrize(
    "kind",
    [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8), lambda b: torch.frombuffer(bytearray(b), dtype=torch.uint8)],
)
def test_a_frame_opens_from_every_kind_of_buffer(kind) -> None:
    assert bytes(open_frame(kind(frame_of(b"content")), KEY).payload) == b"content"


def test_the_checksum_is_the_same_over_any_number_of_buffers() -> None:
    content = bytes(range(256)) * 10
    header = encode_header(KEY, ROOT, RawCodec(), len(content), len(content))
    pieces = [content[:1], np.frombuffer(content[1:1000], np.uint8), b"", torch.frombuffer(bytearray(content[1000:]), dtype=torch.uint8)]
    assert checksum(header, pieces) == checksum(header, [content])


def test_every_flipped_bit_is_detected() -> None:
    whole = bytearray(frame_of(b"the content of a block"))
    for bit in range(8 * len(whole)):
        whole[bit // 8] ^= 1 << bit % 8
        assert_corrupt(whole)
        whole[bit // 8] ^= 1 << bit % 8
    open_frame(whole, KEY, ROOT)


def test_every_truncation_and_extension_is_detected() -> None:
    whole = frame_of(b"the content of a block")
    for length in range(len(whole)):
        assert_corrupt(whole[:length])
        assert_corrupt(whole[length + 1 :])
    assert_corrupt(whole + b"\0")
    assert_corrupt(whole + whole)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_damage_is_detected(content: bytes, data: st.DataObject) -> None:
    whole = frame_of(content)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    damaged = whole[:start] + data.draw(st.binary(max_size=50)) + whole[stop:]
    if damaged != whole:
        assert_corrupt(damaged)


@given(st.binary(max_size=400))
def test_noise_is_not_a_frame(noise: bytes) -> None:
    assert_corrupt(noise)
    assert_corrupt(b"TKVF\1\0" + noise)


def in_pieces(whole: bytes, header_end: int = 128, payload_end: int = -16) -> list[bytes]:
    return [whole[:header_end], whole[header_end:payload_end], whole[payload_end:]]


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_frame_in_pieces_opens_or_fails_as_one_buffer_does(content: bytes, data: st.DataObject) -> None:
    whole = bytearray(frame_of(content))
    assert open_pieces(in_pieces(whole), KEY, ROOT) == open_frame(whole, KEY, ROOT)
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    for opened in (lambda: open_frame(whole, KEY), lambda: open_pieces(in_pieces(whole), KEY)):
        with pytest.raises(TieredKVError) as caught:
            opened()
        assert caught.value.kind is Kind.CORRUPT


@pytest.mark.parametrize(("header_end", "payload_end"), [(127, -16), (129, -16), (128, -15), (128, -17), (0, -16), (64, -16)])
def test_a_frame_in_pieces_of_the_wrong_lengths_is_corrupt(header_end: int, payload_end: int) -> None:
    with pytest.raises(TieredKVError) as caught:
        open_pieces(in_pieces(frame_of(b"content"), header_end, payload_end), KEY)
    assert caught.value.kind is Kind.CORRUPT


def test_a_valid_frame_under_another_key_is_corruption() -> None:
    assert_corrupt(frame_of(b"content"), key=OTHER_KEY, match=OTHER_KEY.hex())
    renamed = frame_of(b"content").replace(KEY, OTHER_KEY)
    assert_corrupt(renamed, key=OTHER_KEY, match="checksum")


def test_a_valid_frame_of_another_namespace_is_corruption() -> None:
    assert_corrupt(frame_of(b"content"), namespace=OTHER_KEY, match="namespace")


def test_an_unknown_version_is_refused_by_number() -> None:
    assert_corrupt(resealed(frame_of(b"content"), 4, struct.pack("<H", VERSION + 1)), match=f"version {VERSION + 1}.*newer")
    assert_corrupt(resealed(frame_of(b"content"), 4, struct.pack("<H", 0)), match="version 0")


@pytest.mark.parametrize(
    ("field_at", "value"),
    [
        (6, struct.pack("<H", 64)),
        (6, struct.pack("<H", 65472)),
        (6, struct.pack("<H", 0)),
        (72, struct.pack("<Q", 2**64 - 1)),
        (72, struct.pack("<Q", 8)),
        (80, struct.pack("<Q", 2**64 - 1)),
        (80, struct.pack("<Q", 1)),
        (88, struct.pack("<H", 65535)),
        (88, struct.pack("<H", 0)),
        (127, b"x"),
    ],
)
def test_invalid_lengths_are_refused_even_if_the_checksum_matches(field_at: int, value: bytes) -> None:
    assert_corrupt(resealed(frame_of(b"content"), field_at, value))


@pytest.mark.parametrize(
    "spec",
    [
        {"codec": "zap"},
        {"codec": "raw", "x": 1},
        {"codec": 5},
        {5: "raw"},
        ["raw"],
        "raw",
        None,
        {"codec": {"a": []}},
        b"\xc1",
        b"\x81\xa5codec",
        b"",
    ],
)
def test_an_invalid_spec_is_refused_even_if_the_checksum_matches(spec) -> None:
    packed = spec if isinstance(spec, bytes) else msgpack.packb(spec)
    header = struct.pack("<H", len(packed)) + packed.ljust(38, b"\0")
    assert_corrupt(resealed(frame_of(b"content"), 88, header), match="spec")


def test_an_unknown_codec_is_named_with_the_known_ones() -> None:
    packed = msgpack.packb({"codec": "zap"})
    assert_corrupt(
        resealed(frame_of(b"content"), 88, struct.pack("<H", len(packed)) + packed), match="unknown codec 'zap'; known codecs are raw"
    )


def test_decode_needs_an_out_of_exactly_the_blocks_size() -> None:
    with pytest.raises(TieredKVError, match="7 bytes"):
        open_frame(frame_of(b"content"), KEY).decode(torch.zeros(8, dtype=torch.uint8))


def test_headers_with_invalid_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        encode_header(b"short", ROOT, RawCodec(), 1, 1)
    with pytest.raises(ValueError, match="payload_bytes must be from 0 to 1"):
        encode_header(KEY, ROOT, RawCodec(), 1, 2)
    with pytest.raises(TieredKVError, match=f"at most {2**32 - 1} bytes") as caught:
        encode_header(KEY, ROOT, RawCodec(), 1 << 32, 1)
    assert caught.value.kind is Kind.LAYOUT


@pytest.mark.parametrize("error", [0.0, 1e-9, 0.25, 7.0])
def test_a_frame_stores_the_error_of_the_block(error: float) -> None:
    raw = torch.zeros(200, dtype=torch.uint8)
    whole = b"".join(encode_frame(KEY, ROOT, RawCodec(), raw, error))
    assert len(whole) == frame_bytes(RawCodec(), 200, error)
    assert open_frame(whole, KEY).error == error


@pytest.mark.parametrize("error", [-1e-9, float("nan"), float("inf")])
def test_an_invalid_error_is_neither_written_nor_read(error: float) -> None:
    with pytest.raises(ValueError, match="error"):
        encode_header(KEY, ROOT, RawCodec(), 7, 7, error)
    for value in (error, 1, "1", None):
        packed = msgpack.packb({"codec": "raw", "error": value})
        header = struct.pack("<H", len(packed)) + packed.ljust(38, b"\0")
        assert_corrupt(resealed(frame_of(b"content"), 88, header), match="error")


def golden(name: str) -> tuple[bytes, dict]:
    return (GOLDEN / f"v1-{name}.frame").read_bytes(), json.loads((GOLDEN / f"v1-{name}.json").read_text())


@pytest.mark.parametrize("name", [codec.name for codec in CODECS])
def test_frames_of_version_1_stay_readable(name: str) -> None:
    register(Calibration.load(GOLDEN / "v1.calibration"))
    whole, facts = golden(name)
    frame = open_frame(whole, bytes.fromhex(facts["key"]), bytes.fromhex(facts["namespace"]))
    spec = {key: value.hex() if isinstance(value, bytes) else value for key, value in frame.codec.spec().items()}
    assert json.loads(json.dumps(spec)) == facts["spec"]
    assert (frame.version, frame.raw_bytes, frame.error) == (facts["version"], facts["raw_bytes"], facts.get("error", 0.0))
    out = torch.zeros(frame.raw_bytes, dtype=torch.uint8)
    frame.decode(out)
    expected = torch.frombuffer(bytearray.fromhex(facts["raw"]), dtype=torch.uint8)
    if frame.codec.is_lossy:  # processors and libraries round differently
        torch.testing.assert_close(out.view(torch.bfloat16), expected.view(torch.bfloat16), rtol=2**-6, atol=2**-6)
    else:
        assert torch.equal(out, expected)


@pytest.mark.skipif(VERSION != 1, reason="another version is written now")
def test_version_1_is_written_byte_for_byte_as_stored() -> None:
    whole, facts = golden("raw")
    assert frame_of(bytes.fromhex(facts["raw"]), bytes.fromhex(facts["key"]), bytes.fromhex(facts["namespace"])) == whole
