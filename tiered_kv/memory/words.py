"""Binary layout of the shared index: its header and slots, for the one writer and for all readers.

`index` file: header of 4096 bytes, native u64 words | slots, 64 bytes each | ticks, u64 a slot | counts, u32 a slot. A slot's
count is the number of uses (touches) of its block, its tick the place of the last one in the order of all. A slot is 8 native
u64 words: sequence number (even: stable, odd: being written), key (4 words), tier | codec << 8 | flags << 16 | segment << 32,
offset, stored bytes | raw bytes << 32. Tier 0: empty. The sequence number comes first, so that a reader loads it before the
key. Words are loaded and stored through `memoryview.cast("Q")`, one aligned move.
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
HEARTBEAT, PEERS, WRITER_PID, BLOCKS, IDENTITY, ARENA_INODE, EPOCHS = range(8, 15)
TICK = 16
ASKED, HIT, SAVED_TOKENS, SAVED_US = range(24, 28)
DECLINED = 28
"""The first of DECLINED_LABELS words: tokens that workers computed although they could have been loaded."""
DECLINED_LABELS = ("disk", "objects", "checkpoint", "peer")
# Weight epochs: EPOCHS counts the changes, as a seqlock does (odd: being written). Then pairs of a family's first word and its number.
EPOCH_COUNT = 32
EPOCH_TABLE = 33
EPOCHS_MAX = 160

LIVE = 1
CLOSED = 2

BEAT_AGE_NS_MAX = 2_000_000_000
"""A node writes its heartbeat every 0.1 s. If the last one is older than this, the node is dead, stopped, or gets no processor time."""

BYTES_PER_SLOT_OF_HOST = 4096
BLOCK_BYTES_BELOW = 64 << 10
SLOTS_PER_BLOCK = 2.25  # at most half of the slots are used; the rest of 2.25 is a reserve of an eighth
BYTES_OF_SLOT = SLOT_BYTES + 8 + 4  # with its tick and its count
SLOTS_MIN = 64
FRAME_BYTES_MORE = 8192
"""Limit on a block's stored bytes minus its raw bytes: room for the header and checksum of a frame."""
OFFSET_MAX = (1 << 63) - 1
PAYLOAD_ALIGN = 64
"""Payloads in memory begin at multiples of this, as extents and their headers are aligned."""

HOME = struct.Struct("@Q")
"""The first word of a key. Masked, it is the slot where probing starts."""
FIELDS = struct.Struct(f"@{KEY_BYTES}s3Q")
"""A slot without its sequence number: the key and the next three words."""

WEAKLY_ORDERED = platform.machine() not in ("x86_64", "AMD64")
"""Whether this machine may reorder two loads or two stores, so that `fence` is needed between them."""

_FENCE = threading.Lock()


def fence() -> None:
    """Memory barrier: orders the memory accesses before and after it, on machines other than x86-64. About 0.1 µs."""
    with _FENCE:
        pass
    with _FENCE:
        pass


def _renew_fence() -> None:
    """Replace the lock in a forked child: a thread of the parent, which the child lacks, may have held it."""
    global _FENCE
    _FENCE = threading.Lock()


os.register_at_fork(after_in_child=_renew_fence)


def new_identity() -> int:
    """Returns a random number for the header's word IDENTITY; never 0."""
    return secrets.randbits(64) | 1


def name_hash(name: str) -> int:
    """Returns a 64-bit hash of a cluster's or a node's name."""
    return int(HOME.unpack(blake2b(name.encode(), digest_size=8).digest())[0])


def family_word(family: bytes) -> int:
    """Returns the word that stands for a family of namespaces in the table of epochs. The word 0 stands for all families."""
    return int(HOME.unpack_from(family)[0])


def ticks_offset(slots: int) -> int:
    """Returns the byte offset of the ticks in the index file."""
    return HEADER_BYTES + slots * SLOT_BYTES


def counts_offset(slots: int) -> int:
    """Returns the byte offset of the counts in the index file."""
    return ticks_offset(slots) + slots * 8


def index_bytes(slots: int) -> int:
    """Returns the size of the index file in bytes, rounded up to whole pages."""
    return -(-(counts_offset(slots) + slots * 4) // PAGE_BYTES) * PAGE_BYTES


def plan(host_bytes: int, lower_bytes: int = 0) -> tuple[int, int]:
    """Returns (slots, arena bytes), chosen so that index and arena together never exceed `host_bytes`.

    The number of slots is a power of two: about one per 4096 bytes of host; with lower tiers, enough for blocks of 64 KiB in all
    tiers. The index takes at most 1.9 % of host, with lower tiers at most an eighth. The arena gets the rest, in whole pages. At
    most half of the slots are used. Raises (kind `config`) if nothing would be left for the arena.
    """
    slots = max(SLOTS_MIN, _power_of_two(host_bytes // BYTES_PER_SLOT_OF_HOST))
    if lower_bytes:
        wanted = int(SLOTS_PER_BLOCK * (host_bytes + lower_bytes) / BLOCK_BYTES_BELOW)
        slots = max(slots, min(_power_of_two(2 * wanted - 1), _power_of_two(host_bytes // 8 // BYTES_OF_SLOT)))
    arena_bytes = (host_bytes - index_bytes(slots)) // PAGE_BYTES * PAGE_BYTES
    if arena_bytes <= 0:
        raise TieredKVError(
            Kind.CONFIG, f"host: must be larger than the index, which takes {index_bytes(slots)} bytes, got {host_bytes}", setting="host"
        )
    return slots, arena_bytes


def _power_of_two(most: int) -> int:
    """Returns the largest power of two that is at most `most`, but at least 1."""
    return 1 << max(most, 1).bit_length() - 1


class IndexViews:
    """The parts of a mapped index as memoryviews of words or bytes. Slots, ticks and counts are indexed from 0; the header is separate."""

    def __init__(self, mapped: mmap | bytearray, slots: int) -> None:
        self._whole = memoryview(mapped)
        ticks, counts = ticks_offset(slots), counts_offset(slots)
        self.header = self._whole[:HEADER_BYTES].cast("Q")
        self.slot_bytes = self._whole[HEADER_BYTES:ticks]
        self.slot_words = self.slot_bytes.cast("Q")
        self.ticks = self._whole[ticks:counts].cast("Q")
        self.counts = self._whole[counts : counts + slots * 4].cast("I")

    def release(self) -> None:
        """Release the memory. Every later access raises ValueError."""
        for view in (self.header, self.slot_words, self.slot_bytes, self.ticks, self.counts, self._whole):
            view.release()
