"""The lossless codec: splits the bytes of numbers into planes, and compresses the planes that have a pattern.

The exponents of floats are similar throughout a block; their mantissas are noise. Each item is rotated left by one bit, which
moves the sign to the end. The first byte is then the exponent (bf16, fp32), or the exponent with the first bits of the mantissa
(fp16, fp64). A plane has the first bytes of all items, the next plane their second bytes, and so on.

The payload, little-endian:

    bytes of plane 0 u32 | … | plane 0 | … | the bytes after the last whole item

A plane with one byte for each item is not compressed. A shorter plane is a zstd frame that records its content size.
docs/design/012 says why zstd is used, and with which parameters.
"""

import struct
import threading
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import zstandard

from tiered_kv.codecs.base import Codec, Encoded, check_raw
from tiered_kv.codecs.raw import RawCodec, fill
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import Layout

if TYPE_CHECKING:
    import torch

MIN_GAIN = 1 / 16
"""A block is stored raw unless compression saves at least this fraction of its bytes: decoding costs about ten times a copy."""
SAMPLE_BYTES = 1 << 14
CHUNK_ITEMS = 1 << 16
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Exponents have hardly any matches, and searching for matches is what costs. With a table of 64 positions and matches of at least
# seven bytes, the coder skips through the data and codes nearly all of it as literals: Huffman coding at a byte a nanosecond.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0
)
_of_thread = threading.local()


@dataclass(frozen=True)
class LosslessCodec(Codec):
    """A bit-identical codec: bf16 KV shrinks to about 2/3. Accepts any number of bytes.

    A block that does not shrink enough is stored raw. `item_bytes` is the width of the block's numbers:
    1 for fp8 and for bytes of unknown content.
    """

    id: ClassVar[int] = 1
    name: ClassVar[str] = "lossless"

    item_bytes: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.item_bytes, bool) or self.item_bytes not in _WORDS:
            raise TieredKVError(
                Kind.CONFIG, f"lossless: item_bytes must be one of {', '.join(map(str, _WORDS))}, got {self.item_bytes!r}", codec=self.name
            )

    @classmethod
    def for_layout(cls, layout: Layout | None, *, rope: bytes | None = None, rope_halves: bool = True, **parameters: Any) -> Self:
        return cls(layout.item_bytes if layout else 1, **parameters)

    def encode(self, raw: "torch.Tensor", carried_error: float = 0.0) -> Encoded:
        check_raw(raw)
        data = raw.detach().cpu().numpy()
        whole = data.nbytes - data.nbytes % self.item_bytes
        planes = [_compressed(plane) for plane in _split(data[:whole], self.item_bytes)]
        parts = [struct.pack(f"<{len(planes)}I", *map(len, planes)), *planes, data[whole:]]
        if sum(map(len, parts)) > data.nbytes * (1 - MIN_GAIN):
            return replace(RawCodec().encode(raw, carried_error), fell_back="no gain")
        return Encoded(self, memoryview(b"".join(parts)), carried_error)

    def decode(self, payload: memoryview, out: "torch.Tensor") -> None:
        check_raw(out, "out")
        target = out.detach().numpy() if out.device.type == "cpu" else np.empty(out.numel(), np.uint8)
        items, rest = divmod(target.nbytes, self.item_bytes)
        parts = self._parts(payload, rest)
        planes = [self._restored(part, items) for part in parts[:-1]]
        _join(planes, target[: items * self.item_bytes])
        target[items * self.item_bytes :] = np.frombuffer(parts[-1], np.uint8)
        if out.device.type != "cpu":
            fill(out, target)

    def max_payload_bytes(self, raw_bytes: int) -> int:
        return raw_bytes

    def _parts(self, payload: memoryview, rest_bytes: int) -> list[memoryview]:
        """Splits a payload into its planes and the bytes after the last whole item."""
        head = struct.Struct(f"<{self.item_bytes}I")
        sizes = head.unpack_from(payload) if payload.nbytes >= head.size else ()
        if not sizes or head.size + sum(sizes) + rest_bytes != payload.nbytes:
            raise self._corrupt(f"payload of {payload.nbytes} bytes does not hold planes of {sizes} bytes and {rest_bytes} more bytes")
        ends = np.cumsum([head.size, *sizes, rest_bytes]).tolist()
        return [payload[start:end] for start, end in pairwise(ends)]

    def _restored(self, part: memoryview, items: int) -> np.ndarray:
        if part.nbytes == items:
            return np.frombuffer(part, np.uint8)
        try:
            if zstandard.frame_content_size(part) != items:
                raise self._corrupt(f"a plane does not decompress to the expected {items} bytes")
            return np.frombuffer(_decompressor().decompress(part), np.uint8)
        except zstandard.ZstdError as error:
            raise self._corrupt(f"a plane cannot be decompressed: {error}") from error

    def _corrupt(self, what: str) -> TieredKVError:
        return TieredKVError(Kind.CORRUPT, f"lossless: {what}", codec=self.name)


def _split(data: np.ndarray, width: int) -> list[np.ndarray]:
    """Splits whole items of `width` bytes into planes, in pieces that stay in the processor's cache."""
    if width == 1:
        return [data]
    items = data.view(_WORDS[width])
    planes = [np.empty(len(items), np.uint8) for _ in range(width)]
    for start in range(0, len(items), CHUNK_ITEMS):
        piece = items[start : start + CHUNK_ITEMS]
        turned = piece << 1
        turned |= piece >> (8 * width - 1)
        for plane, shift in zip(planes, range(8 * (width - 1), -1, -8), strict=True):
            np.copyto(plane[start : start + len(piece)], turned >> shift, casting="unsafe")
    return planes


def _join(planes: list[np.ndarray], target: np.ndarray) -> None:
    """Fills `target` with the items of the planes, in pieces that stay in the processor's cache."""
    width = len(planes)
    if width == 1:
        target[:] = planes[0]
        return
    items = target.view(_WORDS[width])
    spare = np.empty(min(len(items), CHUNK_ITEMS), items.dtype)
    for start in range(0, len(items), CHUNK_ITEMS):
        piece = items[start : start + CHUNK_ITEMS]
        part = spare[: len(piece)]
        np.copyto(piece, planes[0][start : start + len(piece)])
        for plane in planes[1:-1]:
            piece <<= 8
            piece |= plane[start : start + len(piece)]
        np.copyto(part, planes[-1][start : start + len(piece)])
        piece <<= 7  # the last byte's lowest bit is the sign, which returns to the front
        piece |= part >> 1
        part <<= 8 * width - 1
        piece |= part


def _compressed(plane: np.ndarray) -> bytes | np.ndarray:
    """Returns the plane as a zstd frame if that is shorter, else unchanged.

    A long plane stays unchanged if compressing a sample of it saves less than `MIN_GAIN`.
    """
    middle = len(plane) // 2
    sample = plane[middle : middle + SAMPLE_BYTES]
    if len(plane) > 4 * SAMPLE_BYTES and len(_compressor().compress(memoryview(sample))) > len(sample) * (1 - MIN_GAIN):
        return plane
    small = _compressor().compress(memoryview(plane))
    return small if len(small) < len(plane) else plane


def _compressor() -> zstandard.ZstdCompressor:
    """Returns this thread's compressor. Threads cannot share a compressor, and creating one costs as much as compressing a small block."""
    if not hasattr(_of_thread, "compressor"):
        _of_thread.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
    compressor: zstandard.ZstdCompressor = _of_thread.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_of_thread, "decompressor"):
        _of_thread.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _of_thread.decompressor
    return decompressor
