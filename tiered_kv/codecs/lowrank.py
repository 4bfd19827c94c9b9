"""The low-rank codec: each layer's K and V, as a matrix (T, H D), is approximated by its greatest singular components.

The components are stored as two matrices (factors) of 8 bits a number. With n the shorter and m the longer side of the matrix,
and r the rank, a part is: scales (2, L, 2 r) bf16 | basis (L, n, r) | coordinates (L, r, m), one byte a number. The scales are
the least numbers and steps of each component's column of the basis, and of its row of the coordinates.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from tiered_kv.codecs.integer import dequantize, quantize
from tiered_kv.codecs.parts import Part, chunks_of, scratch_of
from tiered_kv.codecs.reduced import ReducedCodec

ELEMENTS = 1 << 19
SCALES_BYTES = 8
"""Bytes of a component's scales: a least number and a step in bf16, for its column of the basis and its row of the coordinates."""


@dataclass(frozen=True)
class LowRankCodec(ReducedCodec):
    """The truncated singular value decomposition of each layer's K and V, with factors of 8 bits.

    Of all approximations of this rank it has the least mean squared error (Eckart and Young, 1936). With factors of 8 bits, the same
    bytes hold nearly twice the rank that bf16 factors would have. There is no bound for a single number; the bound of `BlockCodec`
    holds for the whole block. Encoding costs an eigenvalue problem of size n for each layer's K and V.
    """

    id: ClassVar[int] = 8
    name: ClassVar[str] = "lowrank"

    def rank(self, tokens: int) -> int:
        """Returns the number of components stored for each layer's K or V, if `tokens` tokens of the block are encoded.

        The block's other tokens are stored unchanged.
        """
        _, heads, _, dim = self._dims
        component_bytes = tokens + heads * dim + SCALES_BYTES
        return min(max(int(self._budget_bytes(tokens * heads * dim) / component_bytes), 1), tokens, heads * dim)

    def _sizes(self, tokens: int, per_channel: bool) -> tuple[int, int]:
        layers, heads, _, dim = self._dims
        components = layers * self.rank(tokens)
        return SCALES_BYTES * components, components * (tokens + heads * dim)

    def _write(self, part: Part, kv: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        x = self._to_code_space(part, kv.float()).transpose(1, 2).flatten(2)
        wide = x if x.shape[1] <= x.shape[2] else x.mT
        column_scales, column_codes = quantize(_basis(wide, self.rank(kv.shape[2])), -2, self.bits)
        basis = dequantize(column_codes, column_scales, torch.empty(column_codes.shape, device=x.device))
        row_scales, row_codes = quantize(basis.mT @ wide, -1, self.bits)
        scales = torch.cat([column_scales.flatten(2), row_scales.flatten(2)], -1).bfloat16()
        return scales, torch.cat([column_codes.flatten(), row_codes.flatten()]).cpu().numpy()

    def _read(self, part: Part, scales: torch.Tensor, codes: np.ndarray, out: torch.Tensor) -> None:
        layers, heads, tokens, dim = out.shape
        rank, (short, long) = self.rank(tokens), sorted((tokens, heads * dim))
        of_columns, of_rows = scales.view(2, layers, 2 * rank).split(rank, -1)
        columns, rows = torch.from_numpy(codes.copy()).to(out.device).split([layers * short * rank, layers * rank * long])
        basis = _dequantize(columns.view(layers, short, rank), of_columns.unsqueeze(2))
        coordinates = _dequantize(rows.view(layers, rank, long), of_rows.unsqueeze(3))
        left, right = (basis, coordinates) if tokens == short else (coordinates.mT, basis.mT)
        of_heads = right.unflatten(2, (heads, dim)).transpose(1, 2)
        rotated = self._from_code_space(part, out)
        chunks = chunks_of(out, ELEMENTS)
        scratch = scratch_of(out[chunks[0]].numel(), out.device)
        for chosen in chunks:
            x, spare = (memory[: out[chosen].numel()].view(out[chosen].shape) for memory in scratch)
            out[chosen] = rotated(torch.matmul(left[chosen, None], of_heads[chosen], out=x), spare)


def _basis(wide: torch.Tensor, rank: int) -> torch.Tensor:
    """Returns the left singular vectors (L, n, rank) of matrices (L, n, m) for their greatest singular values.

    They are computed as eigenvectors of the matrix times its transpose, scaled so that no square overflows. Returns NaN for
    matrices with numbers that are not finite.
    """
    greatest = wide.abs().amax((1, 2), keepdim=True)
    unit = wide / torch.where(greatest == 0, 1, greatest)
    try:
        vectors: torch.Tensor = torch.linalg.eigh(unit @ unit.mT).eigenvectors
        return vectors[..., -rank:]
    except torch.linalg.LinAlgError:  # the matrices have numbers that are not finite
        return wide.new_full((*wide.shape[:2], rank), torch.nan)


def _dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return dequantize(codes, scales, torch.empty(codes.shape, device=codes.device))
