"""Mode packing: rows of small whole numbers as few bytes, quick to unpack by tables, and then an entropy coder over the bytes.

Each row has the mode of its greatest number: zeros take nothing, up to 1 four numbers share a byte as digits of base 3, up to 7 two
of base 15; larger ones have one byte or two. So a byte stands for some two to six bits, and Huffman's code, which cannot go
below one bit a symbol, loses next to nothing. Rows come in an order in which their spread falls, so that neighbours are alike
and each part of the bytes has a code of its own. Why zstd, and with which parameters: docs/design/014.

The packed bytes, little-endian:

    bytes of stream 0 u32 | … of stream 5 | stream 0 | …

Stream 0 has the rows' modes, 1 to 4 the rows of each mode but zero, one behind the other, 5 the second bytes of those of mode 4.
An empty stream has no bytes, a zstd frame says its own content size, and one that did not shrink is as it was.
"""

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import zstandard

LIMITS = (0, 1, 7, 127, 32767)
"""The greatest number of each mode."""
DIGITS = (0, 4, 2, 1, 1)
"""How many numbers share a byte in each mode."""
STREAMS = 6
WIDE = len(LIMITS) - 1
_HEAD = struct.Struct(f"<{STREAMS}I")
# Huffman's code for every 16 KiB; no matches are looked for, as in `lossless`.
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=14, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0
)


@dataclass(frozen=True)
class Alphabet:
    """What numbers are unpacked to: for each mode a table (256, digits) from a byte to numbers of a dtype, as words of numpy's."""

    tables: tuple[np.ndarray, ...]
    wide: np.ndarray

    @classmethod
    def of(cls, as_words: Callable[[np.ndarray], np.ndarray]) -> "Alphabet":
        """`as_words` turns an int16 array into the words that stand for its numbers."""
        tables = []
        for limit, digits in zip(LIMITS[:WIDE], DIGITS[:WIDE], strict=True):
            base = 2 * limit + 1
            values = np.arange(256)[:, None] // base ** np.arange(digits) % base - limit
            tables.append(np.ascontiguousarray(as_words(values.astype(np.int16))))
        return cls(tuple(tables), as_words(np.arange(1 << 16).astype(np.uint16).view(np.int16)))


def pack(codes: np.ndarray) -> bytes:
    """The rows (R, T), int16 and none below -32767, in falling order of their spread, as bytes. Cost: about 15 ns a number."""
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
    """Rows of numbers up to a limit as bytes: digits of base 2 · limit + 1, the first one the least, zeros behind the last."""
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
    """Fill row `rows[i]` of `out` (…, T), words of the alphabet, with the packed row i where that is not zero; returns the rows filled.

    Raises ValueError for bytes that `pack` has not made of as many rows and numbers; `out` is then undefined.
    """
    streams = _streams(packed)
    tokens = out.shape[1]
    modes = _restored(streams[0], len(rows))
    if len(modes) and modes.max() > WIDE:
        raise ValueError("a mode that is none")
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
        raise ValueError(f"{packed.nbytes} bytes are too few")
    sizes = _HEAD.unpack_from(packed)
    ends = np.cumsum([_HEAD.size, *sizes]).tolist()
    if ends[-1] != packed.nbytes:
        raise ValueError(f"{packed.nbytes} bytes where {ends[-1]} are said to be")
    return [packed[start:end] for start, end in pairwise(ends)]


def _compressed(stream: np.ndarray) -> bytes:
    if not len(stream):
        return b""
    small = _tools.compressor.compress(memoryview(stream))
    return small if len(small) < len(stream) else stream.tobytes()


def _restored(stream: memoryview, count: int) -> np.ndarray:
    """The `count` bytes of a stream; raises ValueError for anything else."""
    if stream.nbytes == count:
        return np.frombuffer(stream, np.uint8)
    try:
        if zstandard.frame_content_size(stream) != count:
            raise ValueError(f"a stream of other than {count} bytes")
        return np.frombuffer(_tools.decompressor.decompress(stream), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(f"a stream that cannot be read: {error}") from error


class _Tools(threading.local):
    """This thread's own: one is for one thread at a time."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self.decompressor = zstandard.ZstdDecompressor()


_tools = _Tools()
