"""The host tier: blocks in a shared-memory arena, each with a small header that identifies it.

An extent is `header (128 bytes) ‖ payload`. The header contains key, parent and root. From them a restarted node knows the chain, and
detects an extent that does not match its index entry. The payload is the block's raw bytes, or its frame.

The last 8 bytes of the header are the extent's seal: xxh3-64 over the rest of the header and the payload's digest. The digest is
xxh3-64 of raw bytes; it is 0 for a frame, which has a checksum of its own. A seal of 0 means that the payload is not hashed yet.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from tiered_kv import blocks
from tiered_kv.blocks import BlockInfo
from tiered_kv.codecs.frame import open_frame
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.tiers.extent import ExtentTier

if TYPE_CHECKING:
    import torch

HEADER_BYTES = 128
_MAGIC = b"TKVE"
_HEADER = struct.Struct(f"<4sHH{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}sIIfI")
_SEAL = struct.Struct("<Q")  # after the header
_SIGNED = struct.Struct(_HEADER.format + "Q")
_OWNER = struct.Struct(f"<4s4x{KEY_BYTES}s")
_ERASED = struct.Struct("<I")  # overwrites the magic
_VERSIONS = _VERSION, _UNSEALED_VERSION = 3, 2
_UNSEALED = 0
FRAME_DIGEST = 0
"""The digest of every frame, because a frame has a checksum of its own."""
_NONE = bytes(KEY_BYTES)
_UNKNOWN_DEPTH = (1 << 32) - 1


class BlockHeader(NamedTuple):
    """Content of an extent's header: a block, and its encoding.

    `codec`: the id of the payload's codec (0: raw). `nbytes`: size of the payload. `raw_bytes`: size of the decoded block.
    `error`: the coding error that a raw payload already contains (see `codecs.Encoded`); a frame records its own error.
    """

    info: BlockInfo
    codec: int = 0
    nbytes: int = 0
    raw_bytes: int = 0
    error: float = 0.0


def read_header(buffer: bytes | memoryview, at: int = 0) -> BlockHeader:
    """Returns the content of the header at byte `at`. Raises (kind `corrupt`) if there is no valid header."""
    magic, version, codec, key, *chain, depth, nbytes, error, raw_bytes = _HEADER.unpack_from(buffer, at)
    if magic != _MAGIC or version not in _VERSIONS or not 0 <= error < math.inf:
        raise TieredKVError(Kind.CORRUPT, f"arena: no valid block header before byte {at + HEADER_BYTES}", offset=at + HEADER_BYTES)
    parent, root = (each if each != _NONE else None for each in chain)
    info = BlockInfo(key, parent, root, depth if depth != _UNKNOWN_DEPTH else None)
    return BlockHeader(info, codec, nbytes, raw_bytes, error)


def is_sealed_for(header: bytes, digest: int) -> bool:
    """Whether the seal (checksum) in `header`, HEADER_BYTES long, is that of this header and a payload with this digest.

    False without a seal.
    """
    return int(_SEAL.unpack_from(header, HEADER_BYTES - _SEAL.size)[0]) == _seal_of(header, digest)


def running_digest() -> "xxhash.xxh3_64":
    """Returns a digest of a payload that arrives in pieces: call its `update` with each, then `intdigest`."""
    return xxhash.xxh3_64()


def _seal_of(header: bytes, digest: int) -> int:
    return xxhash.xxh3_64_intdigest(header[: HEADER_BYTES - _SEAL.size] + _SEAL.pack(digest)) or 1


class ExtentHeaders:
    """Headers and seals in an arena (1-D uint8 tensor over mapped memory), as the node and its workers read them.

    Offsets are of payloads and must be in the arena. Reads never raise, whatever the bytes contain.
    """

    def __init__(self, arena: "torch.Tensor") -> None:
        self.bytes = memoryview(arena.numpy())

    def names(self, offset: int, key: BlockKey) -> bool:
        """Whether the header of the payload at `offset` has the key `key`."""
        return self.name_all([offset], [key])

    def name_all(self, offsets: Sequence[int], keys: Sequence[BlockKey]) -> bool:
        """Whether the header of the payload at each offset has the key in the same position of `keys`. About 0.2 µs a block.

        False if an offset is too small to have a header: bytes at the arena's end are compared then, and they contain no header.
        """
        unpack, memory = _OWNER.unpack_from, self.bytes
        return [unpack(memory, offset - HEADER_BYTES) for offset in offsets] == [(_MAGIC, key) for key in keys]

    def digest(self, offset: int, nbytes: int) -> int:
        """Returns xxh3-64 of a raw payload. About 20 GB/s; releases the interpreter's lock."""
        return xxhash.xxh3_64_intdigest(self.bytes[offset : offset + nbytes])

    def matches(self, offset: int, digest: int) -> bool | None:
        """Whether the seal (checksum) is that of this header and a payload with this digest. Returns None if there is no seal yet."""
        seal = self._seal(offset)
        return None if seal == _UNSEALED else seal == self._seal_for(offset, digest)

    def sealed(self, offset: int) -> bytes | None:
        """Returns the header with its seal, as it is in the arena; None if there is no seal yet."""
        return bytes(self.bytes[offset - HEADER_BYTES : offset]) if self.is_sealed(offset) else None

    def is_sealed(self, offset: int) -> bool:
        """Whether the extent has a seal, right or wrong."""
        return self._seal(offset) != _UNSEALED

    def seal(self, offset: int, digest: int) -> None:
        """Write the seal for the present header and a payload with this digest."""
        self.bytes[offset - HEADER_BYTES + 4] = _VERSION  # turns a header of an older version into one of this version
        _SEAL.pack_into(self.bytes, offset - _SEAL.size, self._seal_for(offset, digest))

    def _seal(self, offset: int) -> int:
        if self.bytes[offset - HEADER_BYTES + 4] == _UNSEALED_VERSION:
            return _UNSEALED
        return int(_SEAL.unpack_from(self.bytes, offset - _SEAL.size)[0])

    def _seal_for(self, offset: int, digest: int) -> int:
        return _seal_of(bytes(self.bytes[offset - HEADER_BYTES : offset]), digest)


class HostTier(ExtentTier):
    """Allocates extents for payloads in `arena`, a 1-D uint8 tensor over mapped memory. Every offset is that of a payload.

    The cap is the arena's size and cannot be exceeded.
    """

    name = blocks.Tier.HOST.label
    header_bytes = HEADER_BYTES

    def __init__(self, arena: "torch.Tensor") -> None:
        self._arena = arena
        self.headers = ExtentHeaders(arena)
        self._bytes = self.headers.bytes
        super().__init__(len(arena))

    def stage(self, nbytes: int, count: int, staging_bytes: int, roomy_bytes: int) -> list[int]:
        """Reserve up to `count` extents in the staging area, or anywhere in the arena while at most `roomy_bytes` of it are used.

        Returns their payload offsets. The staging area is the first `staging_bytes` of the arena, for short-lived extents.
        Extents that are larger than the staging area are reserved anywhere, whatever is used.
        """
        size = HEADER_BYTES + nbytes
        offsets = self.extents.allocate_below(size, count, staging_bytes)
        more = count - len(offsets)
        if size <= staging_bytes:
            more = min(more, max(roomy_bytes - self.used_bytes, 0) // size)
        return [offset + HEADER_BYTES for offset in offsets + self.extents.allocate_run(size, more)]

    def reserve_apart(self, nbytes: int, staging_bytes: int) -> list[int]:
        """Reserve one small extent after the first `staging_bytes` of the arena, away from larger ones.

        Returns [its payload offset], or [] if full.
        """
        offset = self.extents.allocate_apart(HEADER_BYTES + nbytes, staging_bytes)
        return [] if offset is None else [offset + HEADER_BYTES]

    def free(self, offset: int) -> None:
        """Free the extent of the payload at `offset` and erase its header."""
        super().free(offset)
        self.disown(offset)

    def disown(self, offset: int) -> None:
        """Erase the header of the payload at `offset`, so that a restarted node does not find a block there."""
        _ERASED.pack_into(self._bytes, offset - HEADER_BYTES, 0)

    def claim(self, offset: int, nbytes: int) -> None:
        """Allocate exactly the extent of a payload of `nbytes` at `offset`: for blocks found after a restart."""
        self.extents.claim(offset - HEADER_BYTES, HEADER_BYTES + nbytes)

    def extent_range(self, offset: int, nbytes: int) -> tuple[int, int]:
        """Returns (offset, length) in the arena of the whole extent of a payload."""
        return offset - HEADER_BYTES, HEADER_BYTES + nbytes

    def payload(self, offset: int, nbytes: int) -> "torch.Tensor":
        """Returns the payload as a uint8 tensor that shares the arena's memory."""
        return self._arena[offset : offset + nbytes]

    def sign(self, offset: int, header: BlockHeader, digest: int | None = None) -> None:
        """Write the header of the extent whose payload is at `offset`. Also writes the seal if the payload's `digest` is given."""
        (key, parent, root, depth), codec, nbytes, raw_bytes, error = header
        known_depth = _UNKNOWN_DEPTH if depth is None else depth
        fields = (_MAGIC, _VERSION, codec, key, parent or _NONE, root or _NONE, known_depth, nbytes, error, raw_bytes)
        _SIGNED.pack_into(self._bytes, offset - HEADER_BYTES, *fields, _UNSEALED)
        if digest is not None:
            self.headers.seal(offset, digest)

    def header(self, offset: int) -> BlockHeader:
        """Read the header of the payload at `offset`. Raises (kind `corrupt`) if there is no valid header."""
        return read_header(self._bytes, offset - HEADER_BYTES)

    def describes(self, key: BlockKey, location: blocks.Location) -> bool:
        """Whether the header at a location matches the key and the location."""
        magic, version, codec, found, _, _, _, nbytes, error, raw_bytes = _HEADER.unpack_from(self._bytes, location.offset - HEADER_BYTES)
        if magic != _MAGIC or version not in _VERSIONS or not 0 <= error < math.inf:
            return False
        return bool(found == key and (codec, nbytes, raw_bytes) == (location.codec, location.stored_bytes, location.raw_bytes))

    def judge(self, key: BlockKey, location: blocks.Location) -> tuple[bool, int | None]:
        """Check that header, seal, payload and `location` agree. Writes nothing.

        Returns whether they agree, and the payload's digest if the extent has no seal (checksum) yet, else None.
        """
        if not self.describes(key, location):
            return False, None
        if location.codec:
            try:
                open_frame(self.payload(location.offset, location.stored_bytes), key)
            except TieredKVError:
                return False, None
        digest = FRAME_DIGEST if location.codec else self.headers.digest(location.offset, location.stored_bytes)
        matches = self.headers.matches(location.offset, digest)
        return matches is not False, digest if matches is None else None

    def verify(self, key: BlockKey, location: blocks.Location) -> None:
        """Verify a payload, and seal it if it has no seal yet. Raises (kind `corrupt`) if its bytes changed since it was stored.

        The block must stay pinned during the call.
        """
        is_sound, digest = self.judge(key, location)
        if not is_sound:
            raise TieredKVError(Kind.CORRUPT, "its bytes in host memory are not the bytes that were stored", offset=location.offset)
        if digest is not None:
            self.headers.seal(location.offset, digest)

    def orphans(self) -> Iterator[tuple[int, BlockHeader | None]]:
        """Yields (payload offset, header) for each block that a former node left in free memory. A damaged header is None.

        Finds complete blocks only: a header is written when its payload is complete, and erased before the bytes are
        reused. Cost: reads one word for each 512 free bytes.
        """
        step = self.extents.alignment
        magic = np.frombuffer(_MAGIC, np.uint32)[0]
        for start, nbytes in self.extents.free_ranges():
            heads = np.frombuffer(self._bytes[start : start + nbytes], np.uint32)[:: step // 4]
            for at in np.flatnonzero(heads == magic).tolist():
                offset = start + at * step + HEADER_BYTES
                try:
                    header = self.header(offset)
                except TieredKVError:
                    header = None
                yield offset, header

    def close(self) -> None:
        """Release the mapped memory."""
        import torch

        self._bytes.release()
        self._arena = torch.empty(0, dtype=torch.uint8)
