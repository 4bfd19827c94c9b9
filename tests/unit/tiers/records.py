"""Blocks by number, for the tests of tiers. The same number always has the same key and content."""

from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch

from tiered_kv.blocks import BlockInfo, Location
from tiered_kv.codecs.frame import encode_frame, frame_bytes
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.log import Record

ROOT = bytes([7]) * 32
KIB = 1024
QUARTER = 3584
"""The size of a frame of which four, with headers and footer, fit in a segment of 16 KiB, and five do not."""
OVERHEAD_BYTES = frame_bytes(RawCodec(), 0)


def key_of(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=32).digest()


def content_of(number: int, nbytes: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(number).integers(0, 256, nbytes, dtype=np.uint8))


def record_of(number: int, frame_size: int) -> Record:
    """Returns a record whose frame has exactly `frame_size` bytes. Its parent is the block with the previous number."""
    raw = content_of(number, frame_size - OVERHEAD_BYTES)
    frame = encode_frame(key_of(number), ROOT, RawCodec(), raw)
    return Record(BlockInfo(key_of(number), key_of(number - 1) if number else None, ROOT), frame, RawCodec.id, raw.numel())


def assert_holds(reader, number: int, location: Location) -> None:
    """Assert that a reader (or tier) returns exactly block `number` at `location`."""
    frame = reader.read(location, key_of(number), ROOT)
    out = torch.empty(location.raw_bytes, dtype=torch.uint8)
    frame.decode(out)
    assert torch.equal(out, content_of(number, location.raw_bytes))


def put(tier: DiskTier, numbers, frame_size: int) -> dict[int, Location]:
    """Append blocks in one batch. Returns the locations of those that were written."""
    answers = tier.append([record_of(number, frame_size) for number in numbers])
    return {number: answer.location for number, answer in zip(numbers, answers, strict=True) if answer.location}


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file. A negative byte position counts from the end."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)
