"""The shared index as bytes: what its header and slots contain, for the one writer and for all readers.

`index` file: header of 4096 bytes, native u64 words | slots, 64 bytes each | ticks, u64 a slot | counts, u32 a slot.
A slot is 8 native u64 words: sequence number (even: stable, odd: being written), key (4 words), tier | codec << 8 |
flags << 16 | segment << 32, offset, stored bytes | raw bytes << 32. Tier 0: empty. The sequence number comes first,
so that a reader loads it before the key. Words are loaded and stored through `memoryview.cast("Q")`, one aligned move.
"""

import os
import platform
import secrets
import struct
import threading
from hashlib import blake2b
from mmap import mmap

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import KEY_BYTES

MAGIC_WORD = int.from_bytes(b"TKVINDEX", "little")
FORMAT_VERSION = 2

HEADER_BYTES = 4096
HEADER_WORDS = HEADER_BYTES // 8
PAGE_BYTES = 4096
SLOT_BYTES = 64
SLOT_WORDS = SLOT_BYTES // 8
KEY_OFFSET = 8

# Words of the header. The tick has a cache line of its own, because every reader writes it.
MAGIC, VERSION, CLUSTER, NODE, SLOTS, ARENA_BYTES, GENERATION, STATE = range(8)
HEARTBEAT, PEERS, WRITER_PID, BLOCKS, IDENTITY, ARENA_INODE = range(8, 14)
TICK = 16
ASKED, HIT, SAVED_TOKENS, SAVED_US = range(24, 28)

LIVE = 1
CLOSED = 2

BEAT_AGE_NS_MAX = 2_000_000_000
"""A node says every 0.1 s that it lives; one that has not for so long is dead, stopped, or has no processor."""

BYTES_PER_SLOT_OF_HOST = 4096
BLOCK_BYTES_BELOW = 64 << 10
SLOTS_PER_BLOCK = 2.25  # of which half are used, but for a tenth of that half
BYTES_OF_SLOT = SLOT_BYTES + 8 + 4  # with its tick and its count
SLOTS_MIN = 64
FRAME_BYTES_MORE = 8192
"""A block takes at most so many bytes more than its raw ones: the header and checksum of a frame."""
OFFSET_MAX = (1 << 63) - 1
PAYLOAD_ALIGN = 64
"""Payloads in memory begin at multiples of this, as extents and their headers are aligned."""

HOME = struct.Struct("@Q")
"""The first word of a key; masked, it is the slot where probing starts."""
FIELDS = struct.Struct(f"@{KEY_BYTES}s3Q")
"""Key and the three words behind it: a slot without its sequence number."""

WEAKLY_ORDERED = platform.machine() not in ("x86_64", "AMD64")
"""Whether this machine may reorder two loads or two stores, so that `fence` is needed between them."""

_FENCE = threading.Lock()


def fence() -> None:
    """Order the memory accesses before and after on machines other than x86-64; about 0.1 µs."""
    with _FENCE:
        pass
    with _FENCE:
        pass


def _renew_fence() -> None:
    """In a child process: the parent's lock may have been held by a thread that the child does not have."""
    global _FENCE
    _FENCE = threading.Lock()


os.register_at_fork(after_in_child=_renew_fence)


def new_identity() -> int:
    """A random number for the header's word IDENTITY; never 0."""
    return secrets.randbits(64) | 1


def name_hash(name: str) -> int:
    """64 bits that stand for a cluster's or a node's name."""
    return HOME.unpack(blake2b(name.encode(), digest_size=8).digest())[0]


def ticks_offset(slots: int) -> int:
    """Where the ticks start in the index file, in bytes."""
    return HEADER_BYTES + slots * SLOT_BYTES


def counts_offset(slots: int) -> int:
    """Where the counts start in the index file, in bytes."""
    return ticks_offset(slots) + slots * 8


def index_bytes(slots: int) -> int:
    """Size of the index file: whole pages."""
    return -(-(counts_offset(slots) + slots * 4) // PAGE_BYTES) * PAGE_BYTES


def plan(host_bytes: int, lower_bytes: int = 0) -> tuple[int, int]:
    """(slots, arena bytes) so that index and arena together never exceed `host_bytes`.

    One slot per 4096 bytes of host, and with lower tiers enough for blocks of 64 KiB everywhere, as a power of two: the
    index takes at most 1.9 % of host, with lower tiers at most an eighth; the arena gets whole pages of the rest. Less
    than half of the slots are used. Raises (kind `config`) when nothing would be left for the arena.
    """
    slots = max(SLOTS_MIN, _power_of_two(host_bytes // BYTES_PER_SLOT_OF_HOST))
    if lower_bytes:
        wanted = int(SLOTS_PER_BLOCK * (host_bytes + lower_bytes) / BLOCK_BYTES_BELOW)
        slots = max(slots, min(_power_of_two(2 * wanted - 1), _power_of_two(host_bytes // 8 // BYTES_OF_SLOT)))
    arena_bytes = (host_bytes - index_bytes(slots)) // PAGE_BYTES * PAGE_BYTES
    if arena_bytes <= 0:
        raise TieredKVError(Kind.CONFIG, f"host: {host_bytes} bytes are too few; the index takes {index_bytes(slots)}", setting="host")
    return slots, arena_bytes


def _power_of_two(most: int) -> int:
    """The largest one that is at most `most`; 1 for less."""
    return 1 << max(most, 1).bit_length() - 1


class IndexViews:
    """An index in memory as words and bytes; slots, ticks and counts are numbered from 0, without the header."""

    def __init__(self, mapped: mmap | bytearray, slots: int) -> None:
        self._whole = memoryview(mapped)
        ticks, counts = ticks_offset(slots), counts_offset(slots)
        self.header = self._whole[:HEADER_BYTES].cast("Q")
        self.slot_bytes = self._whole[HEADER_BYTES:ticks]
        self.slot_words = self.slot_bytes.cast("Q")
        self.ticks = self._whole[ticks:counts].cast("Q")
        self.counts = self._whole[counts : counts + slots * 4].cast("I")

    def release(self) -> None:
        """Let go of the memory; every later access is a ValueError."""
        for view in (self.header, self.slot_words, self.slot_bytes, self.ticks, self.counts, self._whole):
            view.release()
