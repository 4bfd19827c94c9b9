"""Computes how large host memory must be for a given number of bytes of blocks: the inverse of `memory.words.plan`."""

from tiered_kv.config import MIN_HOST_BYTES
from tiered_kv.memory import words
from tiered_kv.tiers.host import HEADER_BYTES

_ALIGN_BYTES = 512  # of extents
_STEP_BYTES = 64 << 10


def extent_bytes(payload_bytes: int) -> int:
    """Returns the bytes that a payload occupies in the arena, with its header and rounded up."""
    return -(-(HEADER_BYTES + payload_bytes) // _ALIGN_BYTES) * _ALIGN_BYTES


def host_bytes_for(arena_bytes: int) -> int:
    """Returns the smallest value of the setting `host` that leaves at least `arena_bytes` for blocks beside the index.

    The value is a multiple of 64 KiB.
    """
    host_bytes = max(-(-arena_bytes // _STEP_BYTES) * _STEP_BYTES, MIN_HOST_BYTES)
    while words.plan(host_bytes)[1] < arena_bytes:
        host_bytes += max((arena_bytes - words.plan(host_bytes)[1]) // _STEP_BYTES, 1) * _STEP_BYTES
    return host_bytes
