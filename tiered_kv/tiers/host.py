"""The host tier: blocks in a shared-memory arena, each behind a small header that says whose bytes they are.

An extent is `header (128 bytes) ‖ payload`. The header holds key, parent and root, so that a restarted node knows the
chain again, and can tell an extent that does not belong to its index entry. The payload is the block's raw bytes, or its frame.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from tiered_kv import blocks
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.tiers.extent import ExtentTier

HEADER_BYTES = 128
_MAGIC = b"TKVE"
_HEADER = struct.Struct(f"<4sHH{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}sIIfI")
_NOBODYS = struct.Struct("<I")  # over the magic
_VERSION = 2
_NONE = bytes(KEY_BYTES)
_UNKNOWN_DEPTH = (1 << 32) - 1


class Lineage(NamedTuple):
    """Who a block is: its key, its parent's key and the root of its chain (None: not known), and how its bytes lie in the extent.

    `depth`: how many blocks stand before it. `nbytes` of payload hold `raw_bytes` by the codec of that id (0: as they were stored).
    `error`: what raw bytes carry of it (see `codecs.Encoded`); a frame says it itself.
    """

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey | None
    depth: int | None = None
    codec: int = 0
    nbytes: int = 0
    raw_bytes: int = 0
    error: float = 0.0


class HostTier(ExtentTier):
    """Extents for payloads in `arena`, a 1-D uint8 tensor over mapped memory. Offsets are those of payloads.

    The cap is the arena's size and cannot be passed.
    """

    name = blocks.Tier.HOST.label
    header_bytes = HEADER_BYTES

    def __init__(self, arena: torch.Tensor) -> None:
        self._arena = arena
        self._bytes = memoryview(arena.numpy())
        super().__init__(len(arena))

    def stage(self, nbytes: int, count: int, staging_bytes: int, roomy_bytes: int) -> list[int]:
        """Payload offsets of up to `count` extents in the first `staging_bytes`; anywhere as long as no more than `roomy_bytes` are used.

        What is larger than the staging area may lie anywhere at any time.
        """
        size = HEADER_BYTES + nbytes
        offsets = self.extents.allocate_below(size, count, staging_bytes)
        more = count - len(offsets)
        if size <= staging_bytes:
            more = min(more, max(roomy_bytes - self.used_bytes, 0) // size)
        return [offset + HEADER_BYTES for offset in offsets + self.extents.allocate_run(size, more)]

    def reserve_apart(self, nbytes: int, staging_bytes: int) -> list[int]:
        """The payload offset of one extent behind the first `staging_bytes`, away from larger ones; none if there is no room."""
        offset = self.extents.allocate_apart(HEADER_BYTES + nbytes, staging_bytes)
        return [] if offset is None else [offset + HEADER_BYTES]

    def free(self, offset: int) -> None:
        """Give the extent of the payload at `offset` back, and make it nobody's."""
        super().free(offset)
        self.disown(offset)

    def disown(self, offset: int) -> None:
        """Take the header of the payload at `offset` back."""
        _NOBODYS.pack_into(self._bytes, offset - HEADER_BYTES, 0)

    def claim(self, offset: int, nbytes: int) -> None:
        """Take exactly the extent of a payload of `nbytes` at `offset`: a restarted node's blocks."""
        self.extents.claim(offset - HEADER_BYTES, HEADER_BYTES + nbytes)

    def extent_range(self, offset: int, nbytes: int) -> tuple[int, int]:
        """(offset, length) in the arena of the whole extent of a payload."""
        return offset - HEADER_BYTES, HEADER_BYTES + nbytes

    def payload(self, offset: int, nbytes: int) -> torch.Tensor:
        """The payload as a uint8 tensor; shares the arena's memory."""
        return self._arena[offset : offset + nbytes]

    def sign(self, offset: int, lineage: Lineage) -> None:
        """Write the header of the extent whose payload is at `offset`."""
        key, parent, root, depth, codec, nbytes, raw_bytes, error = lineage
        known_depth = _UNKNOWN_DEPTH if depth is None else depth
        header = _HEADER.pack(_MAGIC, _VERSION, codec, key, parent or _NONE, root or _NONE, known_depth, nbytes, error, raw_bytes)
        self._bytes[offset - HEADER_BYTES : offset - HEADER_BYTES + len(header)] = header

    def lineage(self, offset: int) -> Lineage:
        """Whose payload lies at `offset`; raises (kind `corrupt`) where no header is."""
        magic, version, codec, key, *chain, depth, nbytes, error, raw_bytes = _HEADER.unpack_from(self._bytes, offset - HEADER_BYTES)
        if (magic, version) != (_MAGIC, _VERSION):
            raise TieredKVError(Kind.CORRUPT, f"no block header before byte {offset} of the arena", offset=offset)
        parent, root = (each if each != _NONE else None for each in chain)
        return Lineage(key, parent, root, depth if depth != _UNKNOWN_DEPTH else None, codec, nbytes, raw_bytes, error)

    def orphans(self) -> Iterator[tuple[int, Lineage]]:
        """Payload offset and lineage of what is signed within bytes that are free: blocks of a former node.

        A header is written when its payload is complete, and taken back before the bytes are given to others.
        Cost: one word read for each 512 bytes that are free.
        """
        step = self.extents.alignment
        magic = np.frombuffer(_MAGIC, np.uint32)[0]
        for start, nbytes in self.extents.free_ranges():
            heads = np.frombuffer(self._bytes[start : start + nbytes], np.uint32)[:: step // 4]
            for at in np.flatnonzero(heads == magic).tolist():
                offset = start + at * step + HEADER_BYTES
                yield offset, self.lineage(offset)

    def close(self) -> None:
        """Let go of the mapped memory."""
        self._bytes.release()
        self._arena = torch.empty(0, dtype=torch.uint8)
