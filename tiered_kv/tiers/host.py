"""The host tier: blocks in a shared-memory arena, each behind a small header that says whose bytes they are.

An extent is `header (128 bytes) ‖ payload`. The header holds key, parent and root, so that a restarted node knows the
chain again, and can tell an extent that does not belong to its index entry.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from tiered_kv import blocks
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.memory.extents import ExtentAllocator
from tiered_kv.tiers.base import Tier

HEADER_BYTES = 128
_MAGIC = b"TKVE"
_HEADER = struct.Struct(f"<4sHxx{KEY_BYTES}s{KEY_BYTES}s{KEY_BYTES}s")
_NOBODYS = struct.Struct("<I")  # over the magic
_VERSION = 1
_NONE = bytes(KEY_BYTES)


class Lineage(NamedTuple):
    """Who a block is: its key, its parent's key and the root of its chain (None: not known)."""

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey | None


class HostTier(Tier):
    """Extents for payloads in `arena`, a 1-D uint8 tensor over mapped memory. Offsets are those of payloads.

    Not thread-safe: the engine's lock guards it. The cap is the arena's size and cannot be passed.
    """

    name = blocks.Tier.HOST.label

    def __init__(self, arena: torch.Tensor) -> None:
        self._arena = arena
        self._bytes = memoryview(arena.numpy())
        self.extents = ExtentAllocator(len(arena))

    @property
    def capacity_bytes(self) -> int:
        return self.extents.capacity_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the arena in use: payloads, headers, rounding, and reservations not yet committed."""
        return self.extents.used_bytes

    def fits(self, nbytes: int) -> bool:
        """Whether a payload of `nbytes` could be held by the tier if it were empty."""
        return HEADER_BYTES + nbytes <= self.capacity_bytes

    def reserve(self, nbytes: int, count: int) -> list[int]:
        """Payload offsets of up to `count` extents of `nbytes` each, side by side where possible."""
        return [offset + HEADER_BYTES for offset in self.extents.allocate_run(HEADER_BYTES + nbytes, count)]

    def free(self, offset: int) -> None:
        """Give the extent of the payload at `offset` back, and make it nobody's."""
        self.extents.free(offset - HEADER_BYTES)
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
        key, parent, root = lineage
        header = _HEADER.pack(_MAGIC, _VERSION, key, parent or _NONE, root or _NONE)
        self._bytes[offset - HEADER_BYTES : offset - HEADER_BYTES + len(header)] = header

    def lineage(self, offset: int) -> Lineage:
        """Whose payload lies at `offset`; raises (kind `corrupt`) where no header is."""
        magic, version, key, parent, root = _HEADER.unpack_from(self._bytes, offset - HEADER_BYTES)
        if (magic, version) != (_MAGIC, _VERSION):
            raise TieredKVError(Kind.CORRUPT, f"no block header before byte {offset} of the arena", offset=offset)
        return Lineage(key, parent if parent != _NONE else None, root if root != _NONE else None)

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

    def check(self) -> None:
        """Assert that the allocator's books agree, and that the cap holds."""
        self.extents.check()
        assert 0 <= self.used_bytes <= self.capacity_bytes

    def close(self) -> None:
        """Let go of the mapped memory."""
        self._bytes.release()
        self._arena = torch.empty(0, dtype=torch.uint8)
