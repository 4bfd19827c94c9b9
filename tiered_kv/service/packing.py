"""Between the worker's KV tensors and the bytes of blocks: runs of blocks move with one strided copy.

Axes: L layers, 2 (key, value), H KV heads, N tokens, T tokens of a block, D head dim; R = L * 2 * H rows of a block.
A block is (R, T * D) contiguous; in a KV tensor (R, N * D) it is a column range. Blocks that lie at equal distances in
the arena are therefore one tensor (blocks, R, T * D), copied with a single call of torch.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from tiered_kv.layout import KVLayout

LayerPairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Run(NamedTuple):
    """`count` blocks from block `first` on whose payloads begin at `offset`, `stride` bytes apart."""

    first: int
    offset: int
    stride: int
    count: int


def runs_of(offsets: Sequence[int], first: int = 0) -> Iterator[Run]:
    """The offsets of consecutive blocks as few runs of equal, ascending distances."""
    start = 0
    while start < len(offsets):
        end = start + 1
        stride = offsets[end] - offsets[start] if end < len(offsets) else 0
        if stride > 0:
            while end < len(offsets) and offsets[end] - offsets[end - 1] == stride:
                end += 1
        yield Run(first + start, offsets[start], stride, end - start)
        start = end


class ArenaBlocks:
    """The blocks of one layout in an arena (1-D uint8 tensor over mapped memory)."""

    def __init__(self, arena: torch.Tensor, layout: KVLayout) -> None:
        self._arena = arena
        self._layout = layout
        self._rows = layout.layers * 2 * layout.kv_heads
        self._row_items = layout.block_tokens * layout.head_dim
        self._dtype = layout.torch_dtype

    def blocks(self, run: Run) -> torch.Tensor:
        """The run's payloads as (count, L, 2, H, T, D), sharing the arena's memory."""
        layout = self._layout
        span = (run.count - 1) * run.stride + layout.block_bytes
        items = self._arena[run.offset : run.offset + span].view(self._dtype)
        t, d = layout.block_tokens, layout.head_dim
        h_stride = t * d
        strides = (run.stride // self._dtype.itemsize, 2 * layout.kv_heads * h_stride, layout.kv_heads * h_stride, h_stride, d, 1)
        return items.as_strided((run.count, *layout.block_shape), strides)

    def unpack(self, run: Run, kv_L2HND: torch.Tensor) -> None:
        """Copy the run's blocks to their tokens of `kv`."""
        self._columns(kv_L2HND, run).copy_(self.blocks(run))

    def pack(self, run: Run, kv_L2HND: torch.Tensor) -> None:
        """Copy the tokens of the run's blocks out of `kv`."""
        self.blocks(run).copy_(self._columns(kv_L2HND, run))

    def pack_layers(self, run: Run, pairs_HND: LayerPairs) -> None:
        """The same from one (key, value) pair a layer, each (H, N, D): no stacking copy before."""
        blocks = self.blocks(run)
        for layer, pair in enumerate(pairs_HND):
            for which, heads_HND in enumerate(pair):
                blocks[:, layer, which].copy_(self._split(heads_HND, run).movedim(-3, 0))

    def _columns(self, kv: torch.Tensor, run: Run) -> torch.Tensor:
        """The run's tokens of `kv` as (count, L, 2, H, T, D)."""
        return self._split(kv, run).movedim(-3, 0)

    def _split(self, kv: torch.Tensor, run: Run) -> torch.Tensor:
        t = self._layout.block_tokens
        return kv[..., run.first * t : (run.first + run.count) * t, :].unflatten(-2, (run.count, t))
