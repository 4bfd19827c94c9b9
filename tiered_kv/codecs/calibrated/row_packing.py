"""Mode packing: packs rows of small whole numbers into few bytes, and compresses the bytes with an entropy coder.

The greatest absolute number of a row decides its mode. A row of zeros takes no bytes. In rows with numbers up to 1, four numbers
share a byte, as digits of base 3. In rows with numbers up to 7, two numbers share a byte as digits of base 15. Larger numbers
take one byte or two. Tables make unpacking fast. A byte then carries about two to six bits of information. So Huffman coding,
which cannot go below one bit a symbol, loses almost nothing. Rows are sorted by falling deviation, so that neighbouring rows are
similar, and each part of the bytes gets its own Huffman code.
docs/design/014 says why zstd is used, and with which parameters.

The packed bytes, little-endian:

    bytes of stream 0 u32 | … of stream 5 | stream 0 | …

Stream 0 has the modes of the rows. Streams 1 to 4 have the rows of modes 1 to 4, concatenated. Rows of mode 4 have two bytes a
number: stream 4 has the low ones and stream 5 the high ones. An empty stream has no bytes. Any other stream is a zstd frame
with its content size, or uncompressed if it did not shrink.
"""

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import zstandard

LIMITS = (0, 1, 7, 127, 32767)
"""The greatest absolute number of each mode."""
DIGITS = (0, 4, 2, 1, 1)
"""How many numbers share a byte in each mode."""
STREAMS = 6
WIDE = len(LIMITS) - 1
_HEAD = struct.Struct(f"<{STREAMS}I")
# Huffman coding with a new code for every 16 KiB. The coder does not search for matches, as in `lossless`.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=14, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0
)


@dataclass(frozen=True)
class Alphabet:
    """The tables with which `unpack` turns packed bytes into numbers of one dtype, such as bf16.

    numpy lacks some of these dtypes, so a number is kept as a word: an unsigned integer of the same width with the same bits.
    `tables` has, for each mode but the last, a table (256, digits) from a byte to its numbers. `wide` maps every 16-bit number to its word.
    """

    tables: tuple[np.ndarray, ...]
    wide: np.ndarray

    @classmethod
    def of(cls, as_words: Callable[[np.ndarray], np.ndarray]) -> "Alphabet":
        """Builds the tables of a dtype. `as_words` converts an int16 array to that dtype, and returns the words."""
        tables = []
        for limit, digits in zip(LIMITS[:WIDE], DIGITS[:WIDE], strict=True):
            base = 2 * limit + 1
            values = np.arange(256)[:, None] // base ** np.arange(digits) % base - limit
            tables.append(np.ascontiguousarray(as_words(values.astype(np.int16))))
        return cls(tuple(tables), as_words(np.arange(1 << 16).astype(np.uint16).view(np.int16)))


def pack(codes: np.ndarray) -> bytes:
    """Packs rows (R, T) of int16, from -32767 on, sorted by falling deviation. Returns the bytes. Cost: about 15 ns a number."""
    greatest = np.abs(codes).max(1, initial=0)
    modes = np.searchsorted(LIMITS, greatest).astype(np.uint8)
    streams = [modes]
    for mode in range(1, WIDE):
        streams.append(_joined(codes[modes == mode], LIMITS[mode], DIGITS[mode]))
    wide = codes[modes == WIDE].astype("<i2").reshape(-1).view(np.uint8)
    streams += [wide[::2], wide[1::2]]
    packed = [_compressed(np.ascontiguousarray(stream)) for stream in streams]
    return b"".join([_HEAD.pack(*map(len, packed)), *packed])


def _joined(rows: np.ndarray, limit: int, digits: int) -> np.ndarray:
    """Packs rows of numbers up to `limit` as digits of base 2 · limit + 1, the least digit first. Pads rows with zeros."""
    base = 2 * limit + 1
    if rows.shape[1] % digits:
        rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % digits)))
    plain = (rows + limit).astype(np.uint8)
    whole = plain[:, digits - 1 :: digits].copy()
    for digit in range(digits - 2, -1, -1):
        whole *= base
        whole += plain[:, digit::digits]
    return whole.reshape(-1)


def unpack(packed: memoryview, rows: np.ndarray, out: np.ndarray, alphabet: Alphabet) -> np.ndarray:
    """Unpacks the packed row i into row `rows[i]` of `out` (…, T), as words of the alphabet. Returns the indices of the rows written.

    Rows of zeros are not written. Raises ValueError unless `packed` is the result of `pack` for `len(rows)` rows of T numbers.
    `out` is then undefined.
    """
    streams = _streams(packed)
    tokens = out.shape[1]
    modes = _restored(streams[0], len(rows))
    if len(modes) and modes.max() > WIDE:
        raise ValueError(f"a row's mode must be from 0 to {WIDE}, got {modes.max()}")
    filled = []
    for mode in range(1, WIDE + 1):
        at = rows[modes == mode]
        across = -(-tokens // DIGITS[mode])
        data = _restored(streams[mode], len(at) * across)
        if mode == WIDE:
            data = data | _restored(streams[WIDE + 1], len(data)).astype(np.uint16) << 8
        if not len(at):
            continue
        table = alphabet.wide[:, None] if mode == WIDE else alphabet.tables[mode]
        out[at] = table.take(data, axis=0).reshape(len(at), -1)[:, :tokens]
        filled.append(at)
    return np.concatenate(filled) if filled else rows[:0]


def _streams(packed: memoryview) -> list[memoryview]:
    if packed.nbytes < _HEAD.size:
        raise ValueError(f"at least {_HEAD.size} bytes expected, got {packed.nbytes}")
    sizes = _HEAD.unpack_from(packed)
    ends = np.cumsum([_HEAD.size, *sizes]).tolist()
    if ends[-1] != packed.nbytes:
        raise ValueError(f"the stream sizes add up to {ends[-1]} bytes, got {packed.nbytes} bytes")
    return [packed[start:end] for start, end in pairwise(ends)]


def _compressed(stream: np.ndarray) -> bytes:
    if not len(stream):
        return b""
    small = _tools.compressor.compress(memoryview(stream))
    return small if len(small) < len(stream) else stream.tobytes()


def _restored(stream: memoryview, count: int) -> np.ndarray:
    """Returns the `count` bytes of a stream. Raises ValueError for a stream of another size."""
    if stream.nbytes == count:
        return np.frombuffer(stream, np.uint8)
    try:
        if zstandard.frame_content_size(stream) != count:
            raise ValueError(f"a stream does not decompress to the expected {count} bytes")
        return np.frombuffer(_tools.decompressor.decompress(stream), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"a stream cannot be decompressed: {error}") from error


class _Tools(threading.local):
    """This thread's compressor and decompressor. Threads cannot share them."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()
