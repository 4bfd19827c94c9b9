"""Packing by strides moves exactly the same bytes as plain indexing, for all layouts, runs and tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.client.kv_copy import ArenaBlocks, CopyRun, runs_of
from tiered_kv.layout import ITEM_BYTES, KVLayout

ALIGN_BYTES = 64

layouts = st.builds(
    KVLayout,
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    dtype=st.sampled_from(sorted(ITEM_BYTES)),
    block_tokens=st.integers(1, 5),
)


@st.composite
def placed_blocks(draw) -> tuple[KVLayout, list[int], int, int]:
    """Draws a layout, offsets of blocks that do not overlap, the bytes of their arena, and the first block's number."""
    layout = draw(layouts)
    step = -(-layout.block_bytes // ALIGN_BYTES) * ALIGN_BYTES
    places = draw(st.lists(st.integers(0, 11), min_size=1, max_size=6, unique=True))
    if draw(st.booleans()):
        places.sort()
    lead = draw(st.integers(0, 2)) * ALIGN_BYTES
    return layout, [lead + place * step for place in places], lead + 12 * step, draw(st.integers(0, 3))


def random_bytes(nbytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def kv_tensor(layout: KVLayout, tokens: int, kind: str, seed: int) -> torch.Tensor:
    """Returns random KV (L, 2, H, tokens, D): contiguous, a slice of a longer tensor, or with another axis order in memory."""
    longer = tokens + 3 if kind == "part" else tokens
    shape = layout.kv_shape(longer)
    raw = random_bytes(longer * layout.token_bytes, seed).view(layout.torch_dtype)
    if kind == "tokens first":  # as engines keep it: (tokens, L, 2, H, D)
        return raw.view(longer, shape[0], 2, shape[2], shape[4]).permute(1, 2, 3, 0, 4)
    kv = raw.view(shape)
    return kv[..., 2 : 2 + tokens, :] if kind == "part" else kv


kinds = st.sampled_from(["contiguous", "part", "tokens first"])


def plain_block(kv: torch.Tensor, layout: KVLayout, block: int) -> torch.Tensor:
    """Returns the block's bytes by plain indexing."""
    t = layout.block_tokens
    return as_bytes(kv[..., block * t : (block + 1) * t, :])


@given(placed=placed_blocks(), kind=kinds, seed=st.integers(0, 99))
def test_unpack_equals_plain_indexing(placed, kind, seed):
    layout, offsets, arena_bytes, first = placed
    arena = random_bytes(arena_bytes, seed)
    kv = kv_tensor(layout, (first + len(offsets) + 1) * layout.block_tokens, kind, seed + 1)
    before = as_bytes(kv).clone()
    expected = kv.clone()
    for block, offset in enumerate(offsets, first):
        columns = expected[..., block * layout.block_tokens : (block + 1) * layout.block_tokens, :]
        columns.copy_(arena[offset : offset + layout.block_bytes].clone().view(layout.torch_dtype).view(layout.block_shape))
    blocks = ArenaBlocks(arena, layout)
    for run in runs_of(offsets, first):
        blocks.unpack(run, kv)
    assert torch.equal(as_bytes(kv), as_bytes(expected))
    if first:  # what lies before the run is as it was
        head = kv_tensor(layout, (first + len(offsets) + 1) * layout.block_tokens, kind, seed + 1)
        assert torch.equal(as_bytes(head), before)
        assert torch.equal(plain_block(kv, layout, 0), plain_block(head, layout, 0))


@given(placed=placed_blocks(), kind=kinds, seed=st.integers(0, 99), skip=st.integers(0, 4), in_layers=st.booleans())
def test_pack_equals_plain_indexing(placed, kind, seed, skip, in_layers):
    layout, offsets, arena_bytes, first = placed
    arena = random_bytes(arena_bytes, seed)
    expected = arena.clone()
    whole = kv_tensor(layout, skip + (first + len(offsets)) * layout.block_tokens + 1, kind, seed + 1)
    kv = whole[..., skip:, :]  # a store that starts inside a block leaves its rest out
    for block, offset in enumerate(offsets, first):
        expected[offset : offset + layout.block_bytes] = plain_block(kv, layout, block)
    blocks = ArenaBlocks(arena, layout)
    for run in runs_of(offsets, first):
        if in_layers:
            blocks.pack_layers(run, [(kv[layer, 0], kv[layer, 1]) for layer in range(layout.layers)])
        else:
            blocks.pack(run, kv)
    assert torch.equal(arena, expected)


@given(offsets=st.lists(st.integers(0, 40).map(lambda place: place * ALIGN_BYTES), unique=True, max_size=30), first=st.integers(0, 5))
def test_runs_name_every_block_once_and_in_order(offsets, first):
    named = [(run.first + number, run.offset + number * run.stride) for run in runs_of(offsets, first) for number in range(run.blocks)]
    assert named == list(enumerate(offsets, first))


def test_adjacent_blocks_are_one_run():
    assert list(runs_of([64, 192, 320, 448], first=2)) == [CopyRun(2, 64, 128, 4)]


LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=4, dtype="bfloat16", block_tokens=2)


def test_a_run_past_the_end_of_kv_is_rejected_even_if_its_memory_continues():
    kv = torch.zeros(LAYOUT.kv_shape(9), dtype=torch.bfloat16)[..., :4, :]
    blocks = ArenaBlocks(torch.zeros(4096, dtype=torch.uint8), LAYOUT)
    with pytest.raises(ValueError, match="must have at least 6 tokens for blocks 2 to 2 of 2 tokens each, got 4"):
        blocks.unpack(CopyRun(2, 0, 0, 1), kv)


def test_a_run_past_the_end_of_the_arena_is_rejected():
    blocks = ArenaBlocks(torch.zeros(LAYOUT.block_bytes * 2, dtype=torch.uint8), LAYOUT)
    with pytest.raises(RuntimeError, match="out of bounds"):
        blocks.unpack(CopyRun(0, LAYOUT.block_bytes + 64, 0, 1), torch.zeros(LAYOUT.kv_shape(2), dtype=torch.bfloat16))


def test_a_block_at_an_odd_byte_is_rejected():
    blocks = ArenaBlocks(torch.zeros(4096, dtype=torch.uint8), LAYOUT)
    with pytest.raises(ValueError, match="must be multiples of 2 bytes, got 65 and 0"):
        blocks.unpack(CopyRun(0, 65, 0, 1), torch.zeros(LAYOUT.kv_shape(2), dtype=torch.bfloat16))


def test_packing_kv_that_requires_grad_leaves_no_gradient_in_the_arena():
    arena = torch.zeros(4096, dtype=torch.uint8)
    kv = torch.randn(LAYOUT.kv_shape(4), requires_grad=True).to(torch.bfloat16)
    blocks = ArenaBlocks(arena, LAYOUT)
    blocks.pack(CopyRun(0, 0, 128, 2), kv)
    blocks.pack_layers(CopyRun(0, 1024, 128, 2), [(kv[layer, 0], kv[layer, 1]) for layer in range(2)])
    assert torch.equal(blocks.blocks(CopyRun(0, 0, 128, 2)), blocks.blocks(CopyRun(0, 1024, 128, 2)))
    assert not blocks.blocks(CopyRun(0, 0, 128, 2)).requires_grad
