"""The frame: a block as bytes at rest or on the wire, bound to its key.

`header || payload || checksum`. The header is little-endian:

    magic "TKVF" | version u16 | header bytes u16 | key 32 | namespace 32 | payload bytes u64 | raw bytes u64 |
    spec bytes u16 | spec (msgpack: codec, its parameters, `error` if there is any) | zeros up to a multiple of 64

so that the payload begins at a multiple of 64 bytes. The checksum is xxh3-128 (16 bytes, canonical order) over
key || header || payload: it finds damage, and a valid block under another key. It does not find a forger; frames stay
inside one trust domain. A reader understands every version up to its own.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import xxhash

from tiered_kv.codecs import codec_from_spec
from tiered_kv.codecs.base import Buffer, Codec, Encoded, byte_view
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES

if TYPE_CHECKING:
    import torch

MAGIC = b"TKVF"
VERSION = 1
CHECKSUM_BYTES = 16
ALIGN_BYTES = 64
MAX_HEADER_BYTES = 4096
MAX_FRAME_BYTES = (1 << 32) - 1
"""Limit of a frame and of a block's raw bytes: the shared index keeps both as u32."""

_FIXED = struct.Struct(f"<4sHH{KEY_BYTES}s{KEY_BYTES}sQQH")
_KEY = slice(8, 8 + KEY_BYTES)


class _Fixed(NamedTuple):
    """The part of a header that is there in every frame of version 1."""

    magic: bytes
    version: int
    header_bytes: int
    key: bytes
    namespace: bytes
    payload_bytes: int
    raw_bytes: int
    spec_bytes: int


@dataclass(frozen=True)
class Frame:
    """A verified frame. `payload` is a view into the buffer that was opened and keeps it alive; `pieces` are all its bytes.

    `error`: the relative mean squared error that lossy codecs have left in the block by now (see `Encoded`).
    """

    version: int
    key: bytes
    namespace: bytes
    codec: Codec
    raw_bytes: int
    payload: memoryview
    error: float = 0.0
    header: bytes = b""
    tail: bytes = b""

    @property
    def pieces(self) -> tuple[bytes, memoryview, bytes]:
        """Header, payload and checksum, as `encode_frame` made them."""
        return self.header, self.payload, self.tail

    @property
    def nbytes(self) -> int:
        """Bytes of the whole frame."""
        return len(self.header) + self.payload.nbytes + len(self.tail)

    def decode(self, out: "torch.Tensor") -> None:
        """Fill `out`, a 1-D contiguous uint8 tensor of `raw_bytes` bytes on any device; raises (kind `corrupt`) if it cannot."""
        if out.numel() != self.raw_bytes:
            raise TieredKVError(Kind.CORRUPT, f"the frame is a block of {self.raw_bytes} bytes, {out.numel()} were expected")
        self.codec.decode(self.payload, out)

    def decode_kv(self, kv: "torch.Tensor") -> None:
        """Fill `kv` (L, 2, H, T, D), which may be a strided part of a larger tensor; else as `decode`."""
        if kv.nbytes != self.raw_bytes:
            raise TieredKVError(Kind.CORRUPT, f"the frame is a block of {self.raw_bytes} bytes, {kv.nbytes} were expected")
        self.codec.decode_kv(self.payload, kv)


@lru_cache(maxsize=256)
def _spec_bytes(codec: Codec, error: float = 0.0) -> bytes:
    packed: bytes = msgpack.packb(codec.spec() | ({"error": error} if error else {}))
    return packed


def _header_bytes(codec: Codec, error: float) -> int:
    size = _FIXED.size + len(_spec_bytes(codec, error))
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def frame_bytes(codec: Codec, payload_bytes: int, error: float = 0.0) -> int:
    """Exact size of the frame of a payload, in bytes: header, payload and checksum."""
    return _header_bytes(codec, error) + payload_bytes + CHECKSUM_BYTES


def encode_header(key: bytes, namespace: bytes, codec: Codec, raw_bytes: int, payload_bytes: int, error: float = 0.0) -> bytes:
    """The header of a frame whose payload follows; with `checksum` the whole frame is made without copying the payload.

    `key` and `namespace` (the root of the key's chain) are 32 bytes; `error` is what the block carries. Raises (kind `layout`)
    for a block above the limit.
    """
    if len(key) != KEY_BYTES or len(namespace) != KEY_BYTES:
        raise ValueError(f"key and namespace are {KEY_BYTES} bytes, not {len(key)} and {len(namespace)}")
    if not 0 <= payload_bytes <= codec.max_payload_bytes(raw_bytes):
        raise ValueError(f"{codec.name} makes at most {codec.max_payload_bytes(raw_bytes)} of {raw_bytes} bytes, not {payload_bytes}")
    if not 0 <= error < math.inf:
        raise ValueError(f"the error of a block is a number of at least 0, not {error}")
    if max(raw_bytes, frame_bytes(codec, payload_bytes, error)) > MAX_FRAME_BYTES:
        raise TieredKVError(Kind.LAYOUT, f"a block of {raw_bytes} bytes is above the limit of a frame, {MAX_FRAME_BYTES}")
    spec, header_bytes = _spec_bytes(codec, error), _header_bytes(codec, error)
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"the spec of {codec.name} has {len(spec)} bytes, too many for a header")
    fixed = _FIXED.pack(MAGIC, VERSION, header_bytes, key, namespace, payload_bytes, raw_bytes, len(spec))
    return (fixed + spec).ljust(header_bytes, b"\0")


def checksum(header: bytes, payload_buffers: Iterable[Buffer]) -> bytes:
    """The 16 bytes that end a frame, of a header and a payload in any number of buffers; reads, never copies. About 10 GB/s."""
    hasher = xxhash.xxh3_128(header[_KEY])
    hasher.update(header)
    for buffer in payload_buffers:
        hasher.update(byte_view(buffer))
    return hasher.digest()


def encode_frame(
    key: bytes, namespace: bytes, codec: Codec, raw: "torch.Tensor", carried_error: float = 0.0
) -> tuple[bytes, memoryview, bytes]:
    """A block as a frame in three buffers to be written one after the other: header, payload (maybe a view of `raw`), checksum."""
    return frame_encoded(key, namespace, codec.encode(raw, carried_error), raw.numel())


def frame_encoded(key: bytes, namespace: bytes, encoded: Encoded, raw_bytes: int) -> tuple[bytes, memoryview, bytes]:
    """As `encode_frame`, of what a codec has made of a block of `raw_bytes` bytes."""
    header = encode_header(key, namespace, encoded.codec, raw_bytes, encoded.payload.nbytes, encoded.error)
    return header, encoded.payload, checksum(header, [encoded.payload])


def open_frame(buffer: Buffer, key: bytes, namespace: bytes | None = None) -> Frame:
    """The frame that fills `buffer` exactly, verified to be the block stored under `key` (and in `namespace`, when given).

    Reads every byte once and copies none. Raises `TieredKVError` (kind `corrupt`) for anything else than an undamaged
    frame of a known version and codec under that key.
    """
    view = byte_view(buffer)
    fixed = _fixed(view, view.nbytes)
    payload_end = fixed.header_bytes + fixed.payload_bytes
    pieces = view[: fixed.header_bytes], view[fixed.header_bytes : payload_end], view[payload_end:]
    return _verified(fixed, *pieces, key, namespace)


def open_pieces(pieces: Sequence[Buffer], key: bytes, namespace: bytes | None = None) -> Frame:
    """As `open_frame`, for a frame in the three buffers that `encode_frame` makes: header, payload, checksum."""
    header, payload, tail = (byte_view(piece) for piece in pieces)
    fixed = _fixed(header, header.nbytes + payload.nbytes + tail.nbytes)
    if (header.nbytes, payload.nbytes) != (fixed.header_bytes, fixed.payload_bytes):
        raise _corrupt(f"frame in pieces of {header.nbytes} and {payload.nbytes} bytes")
    return _verified(fixed, header, payload, tail, key, namespace)


def _verified(fixed: "_Fixed", header: memoryview, payload: memoryview, tail: memoryview, key: bytes, namespace: bytes | None) -> Frame:
    if fixed.key != key:
        raise _corrupt(f"frame of key {fixed.key.hex()} where {key.hex()} was expected")
    if namespace is not None and fixed.namespace != namespace:
        raise _corrupt(f"frame of namespace {fixed.namespace.hex()} where {namespace.hex()} was expected")
    whole_header = bytes(header)
    if checksum(whole_header, [payload]) != tail:
        raise _corrupt(f"frame of key {key.hex()}: the checksum does not match")
    codec, error = _codec(whole_header, fixed)
    return Frame(fixed.version, fixed.key, fixed.namespace, codec, fixed.raw_bytes, payload, error, whole_header, bytes(tail))


def _fixed(view: memoryview, frame_bytes: int) -> _Fixed:
    """The fixed part of the header that `view` begins with, its lengths checked against the frame's and the limits."""
    if view.nbytes < _FIXED.size:
        raise _corrupt(f"{view.nbytes} bytes are too few for a frame")
    fixed = _Fixed(*_FIXED.unpack_from(view))
    if fixed.magic != MAGIC:
        raise _corrupt(f"no frame: it begins with {fixed.magic!r}")
    if fixed.version > VERSION:
        raise _corrupt(f"frame of version {fixed.version}, written by a newer tiered_kv; this one reads up to version {VERSION}")
    if fixed.version < 1:
        raise _corrupt(f"frame of version {fixed.version}, which never was")
    if fixed.header_bytes % ALIGN_BYTES or not _FIXED.size + fixed.spec_bytes <= fixed.header_bytes <= MAX_HEADER_BYTES:
        raise _corrupt(f"frame with a header of {fixed.header_bytes} bytes and a spec of {fixed.spec_bytes}")
    size = fixed.header_bytes + fixed.payload_bytes + CHECKSUM_BYTES
    if size != frame_bytes or max(size, fixed.raw_bytes) > MAX_FRAME_BYTES:
        raise _corrupt(f"frame of {size} bytes for a block of {fixed.raw_bytes} in {frame_bytes}")
    return fixed


def _codec(header: bytes, fixed: _Fixed) -> tuple[Codec, float]:
    """The codec that a verified header names, and the error that the block carries."""
    end = _FIXED.size + fixed.spec_bytes
    if any(header[end:]):
        raise _corrupt("frame with bytes behind its spec")
    try:
        spec = msgpack.unpackb(header[_FIXED.size : end])
        carried = spec.pop("error", 0.0) if isinstance(spec, dict) else 0.0
        codec = codec_from_spec(spec)
    except (ValueError, TypeError, TieredKVError) as error:
        raise _corrupt(f"frame whose spec cannot be used: {error}") from error
    if not isinstance(carried, float) or not 0 <= carried < math.inf:
        raise _corrupt(f"frame of a block with the error {carried!r}")
    if fixed.payload_bytes > codec.max_payload_bytes(fixed.raw_bytes):
        raise _corrupt(f"frame with a payload of {fixed.payload_bytes} bytes for a block of {fixed.raw_bytes}")
    return codec, carried


def _corrupt(message: str, **context: Any) -> TieredKVError:
    return TieredKVError(Kind.CORRUPT, message, **context)
