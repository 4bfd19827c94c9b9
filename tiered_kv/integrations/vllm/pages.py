"""vLLM's KV cache as pages: finds which bytes belong to a block, whatever the order of axes that the attention backend chose."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch

from tiered_kv.errors import Kind, TieredKVError

ARRAYS_MAX = 8192


def pages_in(kv_caches: Mapping[str, Any], blocks: int) -> list[torch.Tensor]:
    """Returns arrays (blocks, page bytes) of uint8 that share the memory of the KV caches, in the order of the layers.

    Raises (kind `layout`) if it is not certain which axis of a cache counts the blocks.
    """
    arrays: list[torch.Tensor] = []
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, cache in kv_caches.items():
        for tensor in cache if isinstance(cache, list | tuple) else [cache]:
            mark = tensor.data_ptr(), tuple(tensor.shape)
            if mark not in seen:  # layers may share a cache
                seen.add(mark)
                arrays += _pages_of(name, tensor, blocks)
    if len(arrays) > ARRAYS_MAX:
        raise TieredKVError(Kind.LAYOUT, f"the KV cache has {len(arrays)} pieces a block; at most {ARRAYS_MAX} are supported")
    return arrays


def block_axis(name: str, cache: torch.Tensor, blocks: int) -> int:
    """Returns the axis of a layer's cache that counts the blocks. Raises (kind `layout`) if that is not certain."""
    axes = [axis for axis, size in enumerate(cache.shape) if size == blocks and cache.stride(axis)]
    if len(axes) > 1:  # prefer an axis in front: after it come heads, tokens and channels
        axes = [axis for axis in axes if axis < 2]
    if len(axes) != 1:
        raise TieredKVError(
            Kind.LAYOUT, f"the KV cache of {name} must have one axis of {blocks} blocks, got the shape {tuple(cache.shape)}", layer=name
        )
    return axes[0]


def _pages_of(name: str, cache: torch.Tensor, blocks: int) -> list[torch.Tensor]:
    axis = block_axis(name, cache, blocks)
    rest = sorted((cache.stride(other), cache.shape[other]) for other in range(cache.ndim) if other != axis and cache.shape[other] > 1)
    run, outer = 1, []
    for stride, size in rest:
        if stride == run and not outer:
            run *= size
        else:
            outer.append((stride, size))
    if any(not stride for stride, _ in rest):
        raise TieredKVError(Kind.LAYOUT, f"the KV cache of {name} must not repeat its memory, got strides {cache.stride()}", layer=name)
    width, memory = cache.element_size(), _bytes_of(cache)
    starts = [
        sum(index * stride for index, (stride, _) in zip(place, outer, strict=True)) for place in product(*(range(s) for _, s in outer))
    ]
    first = cache.storage_offset()
    return [memory.as_strided((blocks, run * width), (cache.stride(axis) * width, 1), (first + start) * width) for start in starts]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the whole memory of a tensor as 1-D uint8."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
