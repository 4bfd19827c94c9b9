"""Rotations of keys and values: RoPE, which the model applied to K, and spreading, a fixed rotation that spreads a token's values evenly.

K is rotated back by RoPE before it is quantized. In K without RoPE, a channel has nearly the same size at every token.
Spreading multiplies V, or K of unknown rotation, by a fixed orthogonal matrix, so that no single channel decides a token's range.
All computations are in float32.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from tiered_kv.errors import Kind, TieredKVError


def rope_of_theta(theta: float, rotary_dim: int) -> bytes:
    """Returns the `rope` parameter of codecs for a model with plain RoPE (Su et al., RoFormer, 2021).

    The inverse frequencies are theta ^ (-2i / rotary_dim).
    """
    return rope_of(1.0 / theta ** (np.arange(0, rotary_dim, 2) / rotary_dim))


def rope_of(inverse_frequencies: np.ndarray) -> bytes:
    """Packs inverse frequencies as the `rope` parameter of codecs: float32, little-endian.

    There is one frequency for each pair of channels, in radians a token.
    """
    return np.asarray(inverse_frequencies, "<f4").tobytes()


def check_rope(rope: bytes | None, head_dim: int) -> None:
    """Raises (kind `config`) unless `rope` is None or finite frequencies for at most `head_dim` channels."""
    if rope is None:
        return
    if not isinstance(rope, bytes) or len(rope) % 4 or len(rope) // 2 > head_dim:
        got = f"{len(rope)} bytes" if isinstance(rope, bytes) else type(rope).__name__
        message = f"rope must be None or 4 bytes for each pair of at most {head_dim} channels, got {got}"
        raise TieredKVError(Kind.CONFIG, message, setting="rope")
    if not np.isfinite(np.frombuffer(rope, "<f4")).all():
        raise TieredKVError(Kind.CONFIG, "rope must have finite frequencies, got one that is not finite", setting="rope")


class Turning(NamedTuple):
    """RoPE at a range of positions. Channels form pairs of a first and a second channel.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin), with `cos` (T, D) and `sin` (T, pairs). `first` and `second` select the
    channels. Channels without a partner have the cosine 1. The tensors are shared: do not write to them.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    first: slice
    second: slice

    def turn(self, x: torch.Tensor, out: torch.Tensor, back: bool = False) -> torch.Tensor:
        """Writes `x` (…, T, D), rotated by RoPE, to `out`, and returns `out`. `back` undoes RoPE.

        Both are float32 and must not share memory.
        """
        torch.mul(x, self.cos, out=out)
        out[..., self.first].addcmul_(x[..., self.second], self.sin, value=1 if back else -1)
        out[..., self.second].addcmul_(x[..., self.first], self.sin, value=-1 if back else 1)
        return out

    def to(self, device: torch.device) -> "Turning":
        """Returns the same rotation on another device."""
        return self if device == self.cos.device else self._replace(cos=self.cos.to(device), sin=self.sin.to(device))


@lru_cache(maxsize=512)
def turning(rope: bytes, halves: bool, start: int, tokens: int, head_dim: int) -> Turning:
    """Returns RoPE at the `tokens` positions from `start` on.

    `halves`: channel i is paired with i + pairs, as in Llama. Otherwise channel 2i is paired with 2i + 1, as in GPT-J.
    """
    frequencies = torch.from_numpy(np.frombuffer(rope, "<f4").astype(np.float32))
    angles = torch.arange(start, start + tokens, dtype=torch.float32)[:, None] * frequencies
    pairs = len(frequencies)
    first, second = (slice(pairs), slice(pairs, 2 * pairs)) if halves else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    cos = torch.ones(tokens, head_dim)
    cos[:, first] = cos[:, second] = angles.cos()
    return Turning(cos, angles.sin(), first, second)


@lru_cache(maxsize=16)
def spreading_matrix(dim: int) -> torch.Tensor:
    """Returns the spreading matrix: orthogonal (dim, dim), with small entries only. Its transpose is its inverse.

    It is Hadamard's matrix if `dim` is a power of two, else that of the cosine transform. Codecs multiply by the transpose to
    encode, and by the matrix to decode. The matrix is shared: do not write to it.
    """
    if dim & (dim - 1):
        angles = torch.arange(dim, dtype=torch.float64)[:, None] * (torch.arange(dim, dtype=torch.float64) + 0.5) * (math.pi / dim)
        matrix = angles.cos() * math.sqrt(2 / dim)
        matrix[0] = 1 / math.sqrt(dim)
        return matrix.float()
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(dim)
