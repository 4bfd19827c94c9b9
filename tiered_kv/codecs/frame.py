"""The frame: a block as bytes in storage or on the wire, bound to its key.

A frame is `header || payload || checksum`. The header is little-endian:

    magic "TKVF" | version u16 | header bytes u16 | key 32 | namespace 32 | payload bytes u64 | raw bytes u64 |
    spec bytes u16 | spec (msgpack: codec, its parameters, `error` if not zero) | zeros up to a multiple of 64

The zeros make the payload begin at a multiple of 64 bytes. The checksum is xxh3-128 (16 bytes, canonical order) over
key || header || payload. It detects damage, and a valid block under another key. It does not detect deliberate forgery:
frames must stay inside one trust domain. A reader understands every version up to its own.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack
import xxhash

from tiered_kv import codecs
from tiered_kv.codecs.base import Buffer, Codec, Encoded, byte_view
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES
from tiered_kv.unpacking import unpacked

if TYPE_CHECKING:
    import torch

MAGIC = b"TKVF"
VERSION = 1
CHECKSUM_BYTES = 16
ALIGN_BYTES = 64
MAX_HEADER_BYTES = 4096
MAX_FRAME_BYTES = (1 << 32) - 1
"""Limit of a frame and of a block's raw bytes, because the shared index stores both as u32."""

_FIXED = struct.Struct(f"<4sHH{KEY_BYTES}s{KEY_BYTES}sQQH")
_KEY = slice(8, 8 + KEY_BYTES)


class _Fixed(NamedTuple):
    """The fields that every header of version 1 has."""

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
    """A verified frame. `payload` is a view into the buffer that the frame was read from and keeps that buffer alive.

    `error` is the block's total relative mean squared error from lossy codecs (see `Encoded`). `tail` is the checksum.
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
        """The header, the payload and the checksum: the three buffers that `encode_frame` returned."""
        return self.header, self.payload, self.tail

    @property
    def nbytes(self) -> int:
        """Size of the whole frame in bytes."""
        return len(self.header) + self.payload.nbytes + len(self.tail)

    def decode(self, out: "torch.Tensor") -> None:
        """Decodes the block into `out`, a 1-D contiguous uint8 tensor of `raw_bytes` bytes on any device.

        Raises (kind `corrupt`) if `out` has another size or the payload is invalid.
        """
        if out.numel() != self.raw_bytes:
            raise TieredKVError(Kind.CORRUPT, f"block of {out.numel()} bytes expected, the frame holds one of {self.raw_bytes} bytes")
        self.codec.decode(self.payload, out)

    def decode_kv(self, kv: "torch.Tensor") -> None:
        """Decodes the block into `kv` (L, 2, H, T, D), which may be a strided view of a larger tensor. Raises as `decode`."""
        if kv.nbytes != self.raw_bytes:
            raise TieredKVError(Kind.CORRUPT, f"block of {kv.nbytes} bytes expected, the frame holds one of {self.raw_bytes} bytes")
        self.codec.decode_kv(self.payload, kv)


@lru_cache(maxsize=256)
def _spec_bytes(codec: Codec, error: float = 0.0) -> bytes:
    packed: bytes = msgpack.packb(codec.spec() | ({"error": error} if error else {}))
    return packed


def _header_bytes(codec: Codec, error: float) -> int:
    size = _FIXED.size + len(_spec_bytes(codec, error))
    return -(-size // ALIGN_BYTES) * ALIGN_BYTES


def frame_bytes(codec: Codec, payload_bytes: int, error: float = 0.0) -> int:
    """Returns the exact size of a frame in bytes: header, payload and checksum."""
    return _header_bytes(codec, error) + payload_bytes + CHECKSUM_BYTES


def encode_header(key: bytes, namespace: bytes, codec: Codec, raw_bytes: int, payload_bytes: int, error: float = 0.0) -> bytes:
    """Returns the header of a frame. With `checksum`, a whole frame can be written without copying its payload.

    `key` and `namespace` (the root of the key's chain) are 32 bytes. `error` is the block's total relative error.
    Raises ValueError for an invalid argument, and (kind `layout`) for a block above MAX_FRAME_BYTES.
    """
    if len(key) != KEY_BYTES or len(namespace) != KEY_BYTES:
        raise ValueError(f"key and namespace must be {KEY_BYTES} bytes, got {len(key)} and {len(namespace)}")
    if not 0 <= payload_bytes <= codec.max_payload_bytes(raw_bytes):
        limit = codec.max_payload_bytes(raw_bytes)
        raise ValueError(f"payload_bytes must be from 0 to {limit} ({codec.name}, block of {raw_bytes} bytes), got {payload_bytes}")
    if not 0 <= error < math.inf:
        raise ValueError(f"error must be a finite number of at least 0, got {error}")
    if max(raw_bytes, frame_bytes(codec, payload_bytes, error)) > MAX_FRAME_BYTES:
        raise TieredKVError(Kind.LAYOUT, f"a block and its frame must have at most {MAX_FRAME_BYTES} bytes, got a block of {raw_bytes}")
    spec, header_bytes = _spec_bytes(codec, error), _header_bytes(codec, error)
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"a header must have at most {MAX_HEADER_BYTES} bytes, got {header_bytes} (spec of {codec.name}: {len(spec)})")
    fixed = _FIXED.pack(MAGIC, VERSION, header_bytes, key, namespace, payload_bytes, raw_bytes, len(spec))
    return (fixed + spec).ljust(header_bytes, b"\0")


def checksum(header: bytes, payload_buffers: Iterable[Buffer]) -> bytes:
    """Returns the checksum that ends a frame, 16 bytes. The payload may be in any number of buffers. Copies nothing. About 10 GB/s."""
    hasher = xxhash.xxh3_128(header[_KEY])
    hasher.update(header)
    for buffer in payload_buffers:
        hasher.update(byte_view(buffer))
    return hasher.digest()


def encode_frame(
    key: bytes, namespace: bytes, codec: Codec, raw: "torch.Tensor", carried_error: float = 0.0
) -> tuple[bytes, memoryview, bytes]:
    """Encodes a block. Returns its frame as three buffers in order: header, payload (possibly a view of `raw`), checksum."""
    return frame_encoded(key, namespace, codec.encode(raw, carried_error), raw.numel())


def frame_encoded(key: bytes, namespace: bytes, encoded: Encoded, raw_bytes: int) -> tuple[bytes, memoryview, bytes]:
    """Returns the frame, as `encode_frame` does, of a block of `raw_bytes` bytes that a codec has already encoded."""
    header = encode_header(key, namespace, encoded.codec, raw_bytes, encoded.payload.nbytes, encoded.error)
    return header, encoded.payload, checksum(header, [encoded.payload])


def carried_error(buffer: Buffer) -> float | None:
    """Returns the block's relative error, as recorded in the frame header at the start of `buffer`. Verifies no checksum.

    Returns None if there is no valid header.
    """
    view = byte_view(buffer)
    if view.nbytes < _FIXED.size or view[: len(MAGIC)] != MAGIC:
        return None
    fixed = _Fixed(*_FIXED.unpack_from(view))
    try:
        error = unpacked(view[_FIXED.size : _FIXED.size + fixed.spec_bytes]).get("error", 0.0)
    except (ValueError, TypeError, AttributeError):
        return None
    return error if isinstance(error, float) and 0 <= error < math.inf else None


def open_frame(buffer: Buffer, key: bytes, namespace: bytes | None = None) -> Frame:
    """Returns the frame that fills `buffer` exactly, verified to be the block stored under `key` (and in `namespace`, if given).

    Reads every byte once and copies none. Raises `TieredKVError` (kind `corrupt`) for a frame that is damaged, has another key
    or namespace, or has an unknown version or codec.
    """
    view = byte_view(buffer)
    fixed = _fixed(view, view.nbytes)
    payload_end = fixed.header_bytes + fixed.payload_bytes
    pieces = view[: fixed.header_bytes], view[fixed.header_bytes : payload_end], view[payload_end:]
    return _verified(fixed, *pieces, key, namespace)


def open_pieces(pieces: Sequence[Buffer], key: bytes, namespace: bytes | None = None) -> Frame:
    """Same as `open_frame`, for a frame in the three buffers that `encode_frame` returns: header, payload, checksum."""
    header, payload, tail = (byte_view(piece) for piece in pieces)
    fixed = _fixed(header, header.nbytes + payload.nbytes + tail.nbytes)
    if (header.nbytes, payload.nbytes) != (fixed.header_bytes, fixed.payload_bytes):
        expected = f"{fixed.header_bytes} and {fixed.payload_bytes} bytes"
        raise _corrupt(f"header and payload of {expected} expected, got {header.nbytes} and {payload.nbytes} bytes")
    return _verified(fixed, header, payload, tail, key, namespace)


def _verified(fixed: "_Fixed", header: memoryview, payload: memoryview, tail: memoryview, key: bytes, namespace: bytes | None) -> Frame:
    if fixed.key != key:
        raise _corrupt(f"frame of key {key.hex()} expected, got key {fixed.key.hex()}")
    if namespace is not None and fixed.namespace != namespace:
        raise _corrupt(f"frame of namespace {namespace.hex()} expected, got namespace {fixed.namespace.hex()}")
    whole_header = bytes(header)
    if checksum(whole_header, [payload]) != tail:
        raise _corrupt(f"frame of key {key.hex()}: the checksum does not match")
    codec, error = _codec(whole_header, fixed)
    return Frame(fixed.version, fixed.key, fixed.namespace, codec, fixed.raw_bytes, payload, error, whole_header, bytes(tail))


def _fixed(view: memoryview, frame_bytes: int) -> _Fixed:
    """Returns the fixed fields of the header at the start of `view`. Checks its lengths against the frame's size and the limits."""
    if view.nbytes < _FIXED.size:
        raise _corrupt(f"a frame has at least {_FIXED.size} bytes, got {view.nbytes}")
    fixed = _Fixed(*_FIXED.unpack_from(view))
    if fixed.magic != MAGIC:
        raise _corrupt(f"not a frame: it must begin with {MAGIC!r}, got {fixed.magic!r}")
    if fixed.version > VERSION:
        raise _corrupt(f"frame version {fixed.version} was written by a newer tiered_kv; this one reads versions 1 to {VERSION}")
    if fixed.version < 1:
        raise _corrupt(f"invalid frame version {fixed.version}; versions begin at 1")
    if fixed.header_bytes % ALIGN_BYTES or not _FIXED.size + fixed.spec_bytes <= fixed.header_bytes <= MAX_HEADER_BYTES:
        raise _corrupt(f"invalid lengths in the header of a frame: header of {fixed.header_bytes} bytes, spec of {fixed.spec_bytes}")
    size = fixed.header_bytes + fixed.payload_bytes + CHECKSUM_BYTES
    if size != frame_bytes or max(size, fixed.raw_bytes) > MAX_FRAME_BYTES:
        raise _corrupt(f"the header describes a frame of {size} bytes (block of {fixed.raw_bytes} bytes), got {frame_bytes} bytes")
    return fixed


def _codec(header: bytes, fixed: _Fixed) -> tuple[Codec, float]:
    """Returns the codec that a verified header names, and the block's total error."""
    end = _FIXED.size + fixed.spec_bytes
    if any(header[end:]):
        raise _corrupt("the header of a frame must end in zeros after its spec")
    try:
        spec = unpacked(header[_FIXED.size : end])
        carried = spec.pop("error", 0.0) if isinstance(spec, dict) else 0.0
        codec = codecs.codec_from_spec(spec)
    except (ValueError, TypeError, TieredKVError) as error:
        raise _corrupt(f"invalid codec spec in a frame: {error}") from error
    if not isinstance(carried, float) or not 0 <= carried < math.inf:
        raise _corrupt(f"the error of a block must be a finite float of at least 0, got {carried!r}")
    if fixed.payload_bytes > codec.max_payload_bytes(fixed.raw_bytes):
        limit = codec.max_payload_bytes(fixed.raw_bytes)
        raise _corrupt(f"payload of at most {limit} bytes expected for a block of {fixed.raw_bytes}, got {fixed.payload_bytes}")
    return codec, carried


def _corrupt(message: str, **context: Any) -> TieredKVError:
    return TieredKVError(Kind.CORRUPT, message, **context)
