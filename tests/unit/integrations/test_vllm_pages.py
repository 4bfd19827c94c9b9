"""vLLM's KV caches as pages: each order of axes gives the bytes of one block, and an order that is not certain is refused."""

import pytest
import torch

from tiered_kv.client.page_copy import pages_of
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.integrations.vllm.pages import ARRAYS_MAX, block_axis, pages_in

B, H, N, D = 11, 3, 4, 8
"""Blocks, heads, tokens of a block, and channels. No two are equal."""


def filled(shape: tuple[int, ...], axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """A cache whose elements are the number of their block. `order`: the axes as they follow in memory."""
    order = order or tuple(range(len(shape)))
    memory = torch.empty([shape[each] for each in order]).permute([order.index(each) for each in range(len(shape))])
    for block in range(shape[axis]):
        memory.select(axis, block).fill_(float(block))
    return memory


CACHES = {
    "blocks first": (filled((B, 2, N, H, D), 0), 1),
    "blocks first, K and V in one axis": (filled((B, H, N, 2 * D), 0), 1),
    "K and V first": (filled((2, B, N, H, D), 1), 2),
    "K and V first, heads before tokens in memory": (filled((2, B, N, H, D), 1, (0, 1, 3, 2, 4)), 2),
    "heads before blocks in memory": (filled((2, B, N, H, D), 1, (0, 3, 1, 2, 4)), 2 * H),
    "blocks first, K and V outermost in memory": (filled((B, 2, N, H, D), 0, (1, 0, 2, 3, 4)), 2),
    "latent attention": (filled((B, N, 5 * D), 0), 1),
}


@pytest.mark.parametrize("name", CACHES)
def test_a_page_has_the_bytes_of_its_block(name: str) -> None:
    cache, pieces = CACHES[name]
    arrays = pages_in({"layer": cache}, B)
    assert len(arrays) == pieces
    assert sum(array.shape[1] for array in arrays) * B == cache.numel() * cache.element_size()
    for block in range(B):
        assert all((array[block].view(torch.float32) == block).all() for array in arrays)
    assert cache.data_ptr() <= min(array.data_ptr() for array in arrays)


@pytest.mark.parametrize("name", CACHES)
def test_a_block_moves_to_another_place(name: str) -> None:
    """As from one engine to another, through memory."""
    source, _ = CACHES[name]
    target = torch.full_like(source, -1.0)
    pages, other = (pages_of(pages_in({"layer": cache}, B)) for cache in (source, target))
    memory = torch.zeros(pages.block_bytes, dtype=torch.uint8)
    pages.gather(memory, [0], [7])
    other.scatter(memory, [0], [2])
    axis = block_axis("layer", source, B)
    assert (target.select(axis, 2) == 7.0).all()
    rest = [block for block in range(B) if block != 2]
    assert (target.index_select(axis, torch.tensor(rest)) == -1.0).all()


def test_a_block_of_layers_that_are_views_of_one_memory() -> None:
    memory = torch.zeros(B, 3, 2, N, H, D)
    layers = {f"layer {number}": memory[:, number] for number in range(3)}
    for number, cache in enumerate(layers.values()):
        cache.fill_(float(number))
    arrays = pages_in(layers, B)
    assert [array.view(torch.float32).unique().tolist() for array in map(torch.Tensor.contiguous, arrays)] == [[0.0], [1.0], [2.0]]


def test_layers_that_share_a_cache_count_once() -> None:
    cache = torch.zeros(B, 2, N, H, D)
    assert len(pages_in({"one": cache, "two": cache}, B)) == 1
    assert len(pages_in({"one": [cache, torch.zeros(B, N, D)]}, B)) == 2


@pytest.mark.parametrize(
    "shape",
    [(2, 2, N, H, D), (3, 3, N, H, D), (12, N, H, D), (N, H, D)],
    ids=["K and V or blocks", "heads or blocks", "another number of blocks", "no blocks"],
)
def test_what_is_not_certain_is_refused(shape: tuple[int, ...]) -> None:
    blocks = shape[0] if shape[0] == shape[1] else B
    with pytest.raises(TieredKVError, match="one axis") as caught:
        pages_in({"layer": torch.zeros(shape)}, blocks)
    assert caught.value.kind is Kind.LAYOUT


def test_memory_that_repeats_is_refused() -> None:
    with pytest.raises(TieredKVError, match="repeat"):
        pages_in({"layer": torch.zeros(B, 1, N, D).expand(B, 2, N, D)}, B)


def test_too_many_pieces_are_refused() -> None:
    with pytest.raises(TieredKVError, match="at most"):
        pages_in({f"layer {number}": torch.zeros(2, B, 4) for number in range(ARRAYS_MAX // 2 + 1)}, B)
