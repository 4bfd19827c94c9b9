"""Metadata in a segment file: an entry before each frame, and one footer at its end.

    segment = (entry ‖ frame)* ‖ footer        footer = row per frame ‖ trailer

The trailer is the last bytes of a sealed segment, so the footer is found without reading the frames. If there is no trailer
(the writer was killed), the entries before the frames have the same facts. All numbers are little-endian; a key of zeros means
unknown. Version 1:

    entry    128  magic "TKVB" | version u16 | codec u16 | frame bytes u32 | raw bytes u32 | key | parent | root | checksum 16
    row      120  key | parent | root | offset of the frame u64 | frame bytes u32 | raw bytes u32 | codec u16 | error f32 | 2 zeros
    trailer   64  magic "TKVSEGMT" | version u32 | rows u32 | segment u64 | offset of the first row u64 | store 16 | checksum 16

The checksum is xxh3-128, as in frames. An entry's checksum also covers store, segment and the frame's offset; a trailer's
covers its first 48 bytes and the rows. So neither is valid at another offset or in another file. The error is the frame's
coding error: the relative error that lossy codecs have caused in the block. In older rows it is zero, and only the frame
records the error. `store` is the digest of a format and a secret (`store_tag`).
"""

import struct
from hashlib import blake2b
from typing import NamedTuple

from tiered_kv.blocks import BlockInfo
from tiered_kv.codecs.frame import checksum
from tiered_kv.keys import KEY_BYTES, BlockKey

VERSION = 1
ENTRY_BYTES = 128
ROW_BYTES = 120
TRAILER_BYTES = 64
TAG_BYTES = 16

_ENTRY = struct.Struct(f"<4sHHII{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}s")
_ROW = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}sQIIHf2x")
_TRAILER = struct.Struct(f"<8sIIQQ{TAG_BYTES}s")
_PLACE = struct.Struct("<QQ")
_ENTRY_MAGIC = b"TKVB"
_TRAILER_MAGIC = b"TKVSEGMT"
_NONE = bytes(KEY_BYTES)
_LEAST_ERROR = 2.0**-126  # the smallest normal f32


class Entry(NamedTuple):
    """The metadata of one frame in a segment: its block, its codec, its offset, and the block's coding error (see above).

    An error of 0 means no error, or with a lossy codec an unknown error.
    """

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey | None
    codec: int
    offset: int
    stored_bytes: int
    raw_bytes: int
    error: float = 0.0

    @property
    def info(self) -> BlockInfo:
        """The block, without its depth, which is not recorded."""
        return BlockInfo(self.key, self.parent, self.root)

    @property
    def end(self) -> int:
        """The offset after the frame's last byte."""
        return self.offset + self.stored_bytes


class Trailer(NamedTuple):
    """The trailer at the end of a sealed segment."""

    version: int
    rows: int
    segment: int
    rows_offset: int
    tag: bytes


def store_tag(secret: str) -> bytes:
    """Returns 16 bytes that identify a cluster's secret and are in each of its segments. They do not reveal the secret."""
    key = blake2b(secret.encode()).digest()
    return blake2b(b"tiered-kv segments", key=key, digest_size=TAG_BYTES).digest()


ROWS_MAX = 1 << 22
"""The most rows in a valid footer of a segment or pack: half a gigabyte."""


def footer_bytes(rows: int) -> int:
    """Returns the bytes of the footer of a segment with `rows` frames."""
    return rows * ROW_BYTES + TRAILER_BYTES


def pack_entry(entry: Entry, tag: bytes, segment: int) -> bytes:
    """Returns an entry as the bytes that precede its frame."""
    key, parent, root, codec, _, stored_bytes, raw_bytes, _ = entry
    head = _ENTRY.pack(_ENTRY_MAGIC, VERSION, codec, stored_bytes, raw_bytes, key, parent or _NONE, root or _NONE)
    return head + _entry_sum(head, tag, segment, entry.offset)


def unpack_entry(view: memoryview, tag: bytes, segment: int, offset: int) -> Entry | None:
    """Returns the entry that lies just before the frame at `offset`: the block's key, parent, root, codec and sizes.

    Returns None if it was written for another disk tier (`tag`), segment or offset.
    """
    if len(view) < ENTRY_BYTES:
        return None
    head = bytes(view[: _ENTRY.size])
    magic, version, codec, stored_bytes, raw_bytes, key, parent, root = _ENTRY.unpack(head)
    if (magic, version) != (_ENTRY_MAGIC, VERSION) or view[_ENTRY.size : ENTRY_BYTES] != _entry_sum(head, tag, segment, offset):
        return None
    return Entry(key, _known(parent), _known(root), codec, offset, stored_bytes, raw_bytes)


def pack_row(entry: Entry) -> bytes:
    """Returns the row of a frame in the footer."""
    key, parent, root, codec, offset, stored_bytes, raw_bytes, error = entry
    return _ROW.pack(key, parent or _NONE, root or _NONE, offset, stored_bytes, raw_bytes, codec, error and max(error, _LEAST_ERROR))


def unpack_rows(rows: memoryview) -> list[Entry]:
    """Returns the frames listed by verified rows, in the order written. Cost: about 1 µs each."""
    return [
        Entry(key, _known(parent), _known(root), codec, offset, stored_bytes, raw_bytes, error)
        for key, parent, root, offset, stored_bytes, raw_bytes, codec, error in _ROW.iter_unpack(rows)
    ]


def pack_trailer(rows: bytes, tag: bytes, segment: int, rows_offset: int) -> bytes:
    """Returns the trailer of a footer whose packed rows begin at `rows_offset` of the segment."""
    head = _TRAILER.pack(_TRAILER_MAGIC, VERSION, len(rows) // ROW_BYTES, segment, rows_offset, tag)
    return head + checksum(head, [rows])


def unpack_trailer(view: memoryview) -> Trailer | None:
    """Unpack the last bytes of a file, without verifying them. Returns None if they are not a trailer of at most ROWS_MAX frames."""
    if len(view) != TRAILER_BYTES:
        return None
    magic, *facts = _TRAILER.unpack(view[: _TRAILER.size])
    trailer = Trailer(*facts) if magic == _TRAILER_MAGIC else None
    return trailer if trailer is not None and trailer.rows <= ROWS_MAX else None


def is_footer(trailer: memoryview, rows: memoryview) -> bool:
    """Whether the trailer's checksum fits these rows."""
    return trailer[_TRAILER.size :] == checksum(bytes(trailer[: _TRAILER.size]), [rows])


def _entry_sum(head: bytes, tag: bytes, segment: int, offset: int) -> bytes:
    return checksum(head, [tag + _PLACE.pack(segment, offset)])


def _known(key: BlockKey) -> BlockKey | None:
    return key if key != _NONE else None
