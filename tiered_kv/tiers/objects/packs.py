"""Packs: immutable objects of many frames, with a list of their contents. Used by the objects tier and by checkpoints.

    pack = frame* ‖ footer        footer = row per frame ‖ trailer

The footer is that of disk segments (`tiers.disk.footer`), with segment 0, and with a digest of all frames' checksums where disk
segments have the `store` tag. A pack's name is the BLAKE2b-256 of its footer. So equal names mean equal content, and the footer
alone shows whether a pack of many MiB matches its name. Each frame is verified when it is read. `docs/pack-format.md` describes
the bytes.
"""

import re
from hashlib import blake2b
from typing import NamedTuple

from tiered_kv.codecs.base import byte_view
from tiered_kv.codecs.frame import CHECKSUM_BYTES, Frame, carried_error, open_frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.footer import (
    ROW_BYTES,
    TAG_BYTES,
    TRAILER_BYTES,
    VERSION,
    Entry,
    footer_bytes,
    pack_row,
    pack_trailer,
    unpack_rows,
    unpack_trailer,
)
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objects.store import ObjectStore

DIGEST_BYTES = 32
_SEGMENT = 0  # the number of a pack may change
_TAIL_BYTES = 64 << 10  # one read of so many bytes contains nearly every footer: up to 545 frames
_NAME = re.compile(r"(?P<prefix>.*?)(?P<digest>[0-9a-f]{64})\.pack")


class PackInfo(NamedTuple):
    """A pack: the name and size of its object, and its entries in the order written."""

    name: str
    nbytes: int
    entries: tuple[Entry, ...]


class PackWriter:
    """Builds one pack. Keeps views of the records' buffers, which must not change until `finish` has returned.

    `prefix` precedes the digest in the object's name.
    """

    def __init__(self, store: ObjectStore, prefix: str = "") -> None:
        self._store = store
        self._prefix = prefix
        self._entries: list[Entry] = []
        self._views: list[memoryview] = []
        self._sums = blake2b(b"tiered-kv pack", digest_size=TAG_BYTES)
        self._end = 0

    def __len__(self) -> int:
        """Number of frames added so far."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the pack so far, including its footer."""
        return self._end + footer_bytes(len(self._entries))

    def add(self, record: Record) -> Entry:
        """Append a frame. Returns its entry. The pack grows by `grown_bytes`."""
        nbytes, views = record_bytes(record), [byte_view(buffer) for buffer in record.buffers]
        error = carried_error(views[0]) or 0.0
        entry = Entry(*record.info[:3], record.codec, self._end, nbytes, record.raw_bytes, error)
        self._entries.append(entry)
        self._views += views
        self._sums.update(b"".join(bytes(view[-CHECKSUM_BYTES:]) for view in views)[-CHECKSUM_BYTES:])
        self._end = entry.end
        return entry

    def seal(self) -> PackInfo:
        """Returns the pack that `finish` would write now, without writing it.

        If the store has a pack of this name already, `finish` is unnecessary.
        """
        return self._sealed()[0]

    def finish(self) -> PackInfo:
        """Write the pack by one put, durable and atomic. If the put fails, raises (kind `storage`), and may be called again."""
        info, footer = self._sealed()
        self._store.put(info.name, [*self._views, footer])
        return info

    def _sealed(self) -> tuple[PackInfo, bytes]:
        if not self._entries:
            raise ValueError("finish: a pack must have at least one frame, got a pack without frames")
        rows = b"".join(map(pack_row, self._entries))
        footer = rows + pack_trailer(rows, self._sums.digest(), _SEGMENT, self._end)
        return PackInfo(f"{self._prefix}{_digest(footer)}.pack", self.nbytes, tuple(self._entries)), footer


def grown_bytes(frame_bytes: int, frames: int = 1) -> int:
    """Returns the number of bytes by which `frames` frames of `frame_bytes` in total make a pack larger."""
    return frame_bytes + frames * ROW_BYTES


def record_bytes(record: Record) -> int:
    """Returns the bytes of a record's frame. Raises ValueError if they are too few for a frame."""
    nbytes = sum(byte_view(buffer).nbytes for buffer in record.buffers)
    if nbytes <= CHECKSUM_BYTES:
        raise ValueError(f"a frame must have more than {CHECKSUM_BYTES} bytes, got a frame of {nbytes} bytes")
    return nbytes


def read_footer(store: ObjectStore, name: str, nbytes: int) -> PackInfo:
    """Read the contents of a pack of `nbytes` (as listed by the store) from its footer: one ranged read, or two for many frames.

    Raises (kind `corrupt`) if the footer does not match the pack's name or size. Frames may still be damaged; that is
    detected when they are read.
    """
    if nbytes < TRAILER_BYTES:  # not every store supports an empty range
        raise _corrupt(name, f"its {nbytes} bytes do not end in a footer")
    tail = store.get_range(name, max(nbytes - _TAIL_BYTES, 0), min(nbytes, _TAIL_BYTES))
    trailer = unpack_trailer(tail[-TRAILER_BYTES:])
    if trailer is None:
        raise _corrupt(name, f"its {nbytes} bytes do not end in a footer")
    if not 1 <= trailer.version <= VERSION:
        raise _corrupt(name, f"its footer has version {trailer.version}, this package reads up to version {VERSION}")
    size = footer_bytes(trailer.rows)
    if trailer.rows_offset + size != nbytes:
        raise _corrupt(name, f"its footer describes {trailer.rows_offset + size} bytes, it has {nbytes}")
    footer = tail[-size:] if size <= len(tail) else store.get_range(name, trailer.rows_offset, size)
    named = _NAME.fullmatch(name)
    if not named or named["digest"] != _digest(footer):  # detects more than the trailer's own checksum
        raise _corrupt(name, "its footer does not match the digest in its name")
    entries = unpack_rows(footer[:-TRAILER_BYTES])
    if [entry.offset for entry in entries] + [trailer.rows_offset] != [0, *(entry.end for entry in entries)]:
        raise _corrupt(name, "its frames are not contiguous")
    return PackInfo(name, nbytes, tuple(entries))


def read_frame(store: ObjectStore, name: str, offset: int, nbytes: int, key: bytes, namespace: bytes | None = None) -> Frame:
    """Read and verify the frame of `nbytes` at `offset` of a pack: one ranged read, one pass over the bytes.

    Raises (kind `storage`) if the store does not answer in time or has no such pack, (kind `corrupt`) if the bytes are not
    the block stored under `key`.
    """
    try:
        return open_frame(store.get_range(name, offset, nbytes), key, namespace)
    except TieredKVError as error:
        if error.kind is not Kind.CORRUPT:
            raise
        raise _corrupt(name, f"at byte {offset}: {error}") from error


def pack_prefix(name: str) -> str | None:
    """Returns the part of a pack's name before the digest, or None if the object is not a pack."""
    named = _NAME.fullmatch(name)
    return named["prefix"] if named else None


def _digest(footer: bytes | memoryview) -> str:
    return blake2b(footer, digest_size=DIGEST_BYTES).hexdigest()


def _corrupt(name: str, reason: str) -> TieredKVError:
    return TieredKVError(Kind.CORRUPT, f"pack {name}: {reason}", object=name)
