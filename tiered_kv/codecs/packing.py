"""Packs codes of 4, 6 or 8 bits tightly into bytes.

Codes that share bytes are far apart in the sequence, so that packing and unpacking are a few operations over
long runs. With 4 bits, byte i has code i and code i + n/2. With 6 bits, three bytes have the codes i, i + n/4, i + n/2 and
the three pairs of bits of code i + 3n/4. Codes are padded with zeros to a multiple of `GROUP_CODES[bits]`.
"""

import numpy as np

GROUP_CODES = {8: 1, 6: 4, 4: 2}


def packed_bytes(codes: int, bits: int) -> int:
    """Returns the number of bytes that `pack` returns for this many codes."""
    group = GROUP_CODES[bits]
    return -(-codes // group) * group * bits // 8


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs 1-D codes (u8, each below 2 ** bits) into bytes. Returns the same array for 8 bits."""
    if bits == 8:
        return codes
    group = GROUP_CODES[bits]
    codes = np.pad(codes, (0, -len(codes) % group)).reshape(group, -1)
    if bits == 4:
        halves: np.ndarray = codes[0] | codes[1] << 4
        return halves
    return np.concatenate([codes[i] | (codes[3] >> 2 * i & 3) << 6 for i in range(3)])


def unpack(packed: np.ndarray, codes: int, bits: int) -> np.ndarray:
    """Returns the 1-D codes that `pack` packed, in new memory."""
    if bits == 8:
        return packed.copy()
    unpacked = np.empty((GROUP_CODES[bits], len(packed) * 8 // bits // GROUP_CODES[bits]), np.uint8)
    if bits == 4:
        np.bitwise_and(packed, 15, out=unpacked[0])
        np.right_shift(packed, 4, out=unpacked[1])
    else:
        parts = packed.reshape(3, -1)
        np.bitwise_and(parts, 63, out=unpacked[:3])
        high = parts >> 6
        unpacked[3] = high[0] | high[1] << 2 | high[2] << 4
    return unpacked.reshape(-1)[:codes]
