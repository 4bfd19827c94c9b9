"""Copies between a worker's KV tensors and the bytes of blocks. A run of blocks is one strided copy.

Axes: L layers, 2 (key, value), H KV heads, N tokens, T tokens of a block, D head dim; R = L * 2 * H rows of a block.
A block is (R, T * D) contiguous; in a KV tensor (R, N * D) it is a column range. So blocks at equal distances in the arena are one
strided tensor (blocks, R, T * D), and so are their tokens in the KV tensor.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from tiered_kv.layout import Layout

LayerPairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


class CopyRun(NamedTuple):
    """`blocks` consecutive blocks, starting with block `first` of the prompt.

    Their payloads start at `offset` of the arena and are `stride` bytes apart.
    """

    first: int
    offset: int
    stride: int
    blocks: int


def runs_of(offsets: Sequence[int], first: int = 0) -> Iterator[CopyRun]:
    """Yields few runs that cover consecutive blocks with these payload offsets, the first of which is block `first` of the prompt.

    Within a run, each offset is larger than the one before by the same distance.
    """
    start = 0
    while start < len(offsets):
        end = start + 1
        stride = offsets[end] - offsets[start] if end < len(offsets) else 0
        if stride > 0:
            while end < len(offsets) and offsets[end] - offsets[end - 1] == stride:
                end += 1
        yield CopyRun(first + start, offsets[start], max(stride, 0), end - start)  # the next run may have lower offsets
        start = end


class ArenaBlocks:
    """The blocks of one layout in an arena (1-D uint8 tensor over mapped memory)."""

    def __init__(self, arena: torch.Tensor, layout: Layout) -> None:
        self._layout = layout
        self._dtype = layout.torch_dtype
        with torch.inference_mode(False):  # a tensor created in inference mode cannot be written to outside of it
            self._items = arena[: len(arena) // self._dtype.itemsize * self._dtype.itemsize].view(self._dtype)
        shape, strides = layout.block_shape, [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        self._block_shape, self._block_strides = tuple(shape), tuple(strides)

    def holds(self, run: CopyRun) -> bool:
        """Returns whether the run's payloads are aligned to the dtype and within the arena."""
        itemsize, end = self._dtype.itemsize, run.offset + run.stride * (run.blocks - 1) + self._layout.block_bytes
        return not run.offset % itemsize and not run.stride % itemsize and run.offset >= 0 and end <= self._items.nbytes

    def blocks(self, run: CopyRun) -> torch.Tensor:
        """Returns the run's payloads as a tensor (blocks, L, 2, H, T, D) that shares the arena's memory."""
        start, odd = divmod(run.offset, self._dtype.itemsize)
        stride, odd_stride = divmod(run.stride, self._dtype.itemsize)
        if odd or odd_stride:
            raise ValueError(f"run: offset and stride must be multiples of {self._dtype.itemsize} bytes, got {run.offset} and {run.stride}")
        shape, strides = (run.blocks, *self._block_shape), (stride, *self._block_strides)
        return self._items.as_strided(shape, strides, self._items.storage_offset() + start)

    def unpack(self, run: CopyRun, kv_L2HND: torch.Tensor) -> None:
        """Copy the run's blocks from the arena to their tokens in `kv`."""
        self._columns(_detached(kv_L2HND), run).copy_(self.blocks(run))

    def pack(self, run: CopyRun, kv_L2HND: torch.Tensor) -> None:
        """Copy the tokens of the run's blocks from `kv` to the arena."""
        self.blocks(run).copy_(self._columns(_detached(kv_L2HND), run))

    def pack_layers(self, run: CopyRun, pairs_HND: LayerPairs) -> None:
        """As `pack`, from one (key, value) pair for each layer, each tensor (H, N, D), without stacking the layers first."""
        blocks = self.blocks(run)
        for layer, pair in enumerate(pairs_HND):
            for which, heads_HND in enumerate(pair):
                blocks[:, layer, which].copy_(self._columns(_detached(heads_HND), run))

    def _columns(self, kv: torch.Tensor, run: CopyRun) -> torch.Tensor:
        """Returns the run's tokens of `kv`, (…, N, D), as a tensor (blocks, …, T, D) that shares the memory of `kv`."""
        t = self._layout.block_tokens
        *outer, tokens, d = kv.shape
        end = run.first + run.blocks
        if end * t > tokens:  # as_strided would read past the tensor's end
            raise ValueError(
                f"kv: must have at least {end * t} tokens for blocks {run.first} to {end - 1} of {t} tokens each, got {tokens}"
            )
        strides = kv.stride()
        step = t * strides[-2]
        return kv.as_strided((run.blocks, *outer, t, d), (step, *strides), kv.storage_offset() + run.first * step)


def _detached(kv: torch.Tensor) -> torch.Tensor:
    return kv.detach() if kv.requires_grad else kv
