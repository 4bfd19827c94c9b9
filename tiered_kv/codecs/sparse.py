"""The sparse codec: stores the numbers of a head that are farthest from the mean of their group. The others decode as that mean.

Groups are those of `grouped`. Each head of a layer stores the same count of numbers, at any positions. A part is, with n as in `grouped`:
centers and steps (2, L, H, n) bf16 | mask: a bit a number, highest bit of a byte first, set if stored | a byte for each stored number.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from tiered_kv.codecs.grouped import GroupedCodec, as_bytes, round_to_bf16
from tiered_kv.codecs.reduced import ReducedCodec

CENTER = 128
"""The code of a group's center. Code 0 marks a number that is not stored."""


@dataclass(frozen=True)
class SparseCodec(ReducedCodec, GroupedCodec):
    """Stores the numbers farthest from their group's mean with 8 bits each.

    Let c be the mean of a group, and a the greatest distance from it. A finite number that is stored decodes with an error of at
    most a / 254, plus the rounding of the scales to bf16 and of the block's dtype. Other numbers decode as c.
    The bound of `BlockCodec` holds for the whole block.
    """

    id: ClassVar[int] = 9
    name: ClassVar[str] = "sparse"
    scales_of_group: ClassVar[int] = 2

    def _quantized(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        center = x.mean(axis, keepdim=True).bfloat16().float()
        apart = x - center
        step = round_to_bf16(apart.abs().amax(axis, keepdim=True) / (CENTER - 1), up=True)
        codes = (apart / torch.where(step > 0, step, 1)).round_().add_(CENTER).nan_to_num_(CENTER).clamp_(1, 2 * CENTER - 1)
        farthest = apart.abs().flatten(-2).topk(self._staying(x.shape[2], axis == -2), sorted=False).indices
        kept = torch.zeros_like(codes).flatten(-2)
        kept.scatter_(-1, farthest, codes.flatten(-2).gather(-1, farthest))
        return torch.stack([center, step]), as_bytes(kept.view(x.shape))

    def _dequantize(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        center, step = scales
        out.copy_(codes).sub_(CENTER).masked_fill_(codes == 0, 0).mul_(step).add_(center)

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        return np.concatenate([np.packbits(codes != 0), codes[codes != 0]])

    def _unpack(self, packed: np.ndarray, codes: int) -> np.ndarray:
        mask_bytes = -(-codes // 8)
        stays = np.unpackbits(packed[:mask_bytes], count=codes).view(bool)
        if np.count_nonzero(stays) != len(packed) - mask_bytes:
            message = f"the mask marks {np.count_nonzero(stays)} numbers as stored, but {len(packed) - mask_bytes} numbers are stored"
            raise self._corrupt(message)
        unpacked = np.zeros(codes, np.uint8)
        unpacked[stays] = packed[mask_bytes:]
        return unpacked

    def _packed_bytes(self, tokens: int, per_channel: bool) -> int:
        layers, heads, _, dim = self._dims
        return -(-layers * heads * tokens * dim // 8) + layers * heads * self._staying(tokens, per_channel)

    def _staying(self, tokens: int, per_channel: bool) -> int:
        """Returns how many numbers of each head are stored; the others decode as the mean of their group."""
        dim = self._dims[3]
        numbers, groups = tokens * dim, dim if per_channel else tokens
        room = self._budget_bytes(numbers) - numbers / 8 - 2 * self.scales_of_group * groups
        return min(max(int(room), 1), numbers)
