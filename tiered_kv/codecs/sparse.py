"""The sparse codec: the numbers of a head that are farthest from the mean of their group; the others come back as that mean.

Groups are those of `grouped`; the numbers that stay are as many in each head of a layer, wherever they lie. Of a part, with n as there:
centers and steps (2, L, H, n) bf16 | a bit a number, the first the highest of its byte: it stays | a byte for each that stays.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from tiered_kv.codecs.grouped import GroupedCodec, as_bytes, towards_bf16
from tiered_kv.codecs.reduced import ReducedCodec

CENTER = 128
"""The code of a group's center; 0 is that of a number which does not stay, and is not kept itself."""


@dataclass(frozen=True)
class SparseCodec(ReducedCodec, GroupedCodec):
    """A finite number x of a group with the mean c and the greatest distance a from it comes back as x ± a / 254 if it stays, else as c,
    up to the rounding of the scales to bf16 and of the dtype. For the whole block the bound of `BlockCodec` holds.
    """

    id: ClassVar[int] = 9
    name: ClassVar[str] = "sparse"
    scales_of_group: ClassVar[int] = 2

    def _coded(self, x: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        center = x.mean(axis, keepdim=True).bfloat16().float()
        apart = x - center
        step = towards_bf16(apart.abs().amax(axis, keepdim=True) / (CENTER - 1), up=True)
        codes = (apart / torch.where(step > 0, step, 1)).round_().add_(CENTER).nan_to_num_(CENTER).clamp_(1, 2 * CENTER - 1)
        farthest = apart.abs().flatten(-2).topk(self._staying(x.shape[2], axis == -2), sorted=False).indices
        kept = torch.zeros_like(codes).flatten(-2)
        kept.scatter_(-1, farthest, codes.flatten(-2).gather(-1, farthest))
        return torch.stack([center, step]), as_bytes(kept.view(x.shape))

    def _numbers(self, codes: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        center, step = scales
        out.copy_(codes).sub_(CENTER).masked_fill_(codes == 0, 0).mul_(step).add_(center)

    def _pack(self, codes: np.ndarray) -> np.ndarray:
        return np.concatenate([np.packbits(codes != 0), codes[codes != 0]])

    def _unpack(self, packed: np.ndarray, codes: int) -> np.ndarray:
        mask_bytes = -(-codes // 8)
        stays = np.unpackbits(packed[:mask_bytes], count=codes).view(bool)
        if np.count_nonzero(stays) != len(packed) - mask_bytes:
            raise self._corrupt(f"a mask of {np.count_nonzero(stays)} numbers before {len(packed) - mask_bytes}")
        unpacked = np.zeros(codes, np.uint8)
        unpacked[stays] = packed[mask_bytes:]
        return unpacked

    def _packed_bytes(self, tokens: int, per_channel: bool) -> int:
        layers, heads, _, dim = self._dims
        return -(-layers * heads * tokens * dim // 8) + layers * heads * self._staying(tokens, per_channel)

    def _staying(self, tokens: int, per_channel: bool) -> int:
        """How many numbers of a head stay."""
        dim = self._dims[3]
        numbers, groups = tokens * dim, dim if per_channel else tokens
        room = self._budget_bytes(numbers) - numbers / 8 - 2 * self.scales_of_group * groups
        return min(max(int(room), 1), numbers)
