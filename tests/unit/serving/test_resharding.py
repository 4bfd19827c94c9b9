"""Resharding blocks along the heads: each head of each token is, byte for byte, in the block of the rank that owns it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv import KVLayout, OpaqueLayout
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES
from tiered_kv.node.checkpoints.reshard_layout import Piece, join, pieces, resharded

HEADS = 12
WORLDS = [1, 2, 3, 4, 6, 12]
worlds = st.sampled_from(WORLDS)
layouts = st.builds(KVLayout, st.integers(1, 3), st.just(HEADS), st.integers(1, 5), st.sampled_from(sorted(ITEM_BYTES)), st.integers(1, 4))


def refusal(match: str):
    return pytest.raises(TieredKVError, match=match, check=lambda error: error.kind is Kind.LAYOUT)


def halves_by_torch(whole: torch.Tensor, layout: KVLayout, world: int) -> list[torch.Tensor]:
    """Returns the raw blocks of all ranks, split with torch."""
    cut = whole.view(layout.torch_dtype).view(layout.block_shape).chunk(world, dim=2)
    return [part.contiguous().view(-1).view(torch.uint8) for part in cut]


def cut_anew(blocks: list[torch.Tensor], layout: KVLayout, target: int) -> list[torch.Tensor]:
    """Returns the raw blocks of all ranks of the target world, resharded from those of all ranks of another."""
    made = []
    for rank in range(target):
        needed = pieces(len(blocks), target, layout.kv_heads * len(blocks), rank)
        made.append(join([blocks[piece.source] for piece in needed], needed, layout))
    return made


def random_block(layout: KVLayout, seed: int) -> torch.Tensor:
    """Returns arbitrary bytes, including those of NaN."""
    return torch.randint(0, 256, (layout.block_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(layouts, worlds, worlds, st.integers(0, 2**32))
def test_blocks_of_any_world_can_be_resharded_to_any_other(layout, world, target, seed):
    whole = random_block(layout, seed)
    theirs, expected = halves_by_torch(whole, layout, world), halves_by_torch(whole, layout, target)
    made = cut_anew(theirs, resharded(layout, 1, world), target)
    assert len(made) == target
    for ours, wanted in zip(made, expected, strict=True):
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, wanted)


@given(layouts, st.lists(worlds, min_size=1, max_size=4), st.integers(0, 2**32))
def test_resharding_through_several_worlds_restores_the_block(layout, way, seed):
    whole = random_block(layout, seed)
    blocks, world, shape = [whole], 1, layout
    for target in [*way, 1]:
        blocks, shape, world = cut_anew(blocks, shape, target), resharded(shape, world, target), target
    assert shape == layout
    assert torch.equal(blocks[0], whole)


@given(worlds, worlds)
def test_pieces_cover_every_head_once_and_no_rank_is_read_twice(world, target):
    for rank in range(target):
        made_of = pieces(world, target, HEADS, rank)
        assert [head for _, _, count, at in made_of for head in range(at, at + count)] == list(range(HEADS // target))
        first = rank * (HEADS // target)
        assert all(piece.source * (HEADS // world) + piece.first == first + piece.target for piece in made_of)
        assert all(piece.first + piece.heads <= HEADS // world for piece in made_of)
        assert len({piece.source for piece in made_of}) == len(made_of)


def test_worlds_that_split_at_different_heads():
    assert pieces(2, 3, 12, 1) == [Piece(0, 4, 2, 0), Piece(1, 0, 2, 2)]
    assert pieces(4, 4, 12, 3) == [Piece(3, 0, 3, 0)]


def test_resharded_blocks_share_no_memory_with_their_sources():
    layout = KVLayout(1, 2, 4, "float16", 2)
    block = random_block(layout, 1)
    (made,) = cut_anew([block], layout, 1)
    kept = made.clone()
    block.zero_()
    assert torch.equal(made, kept)


@pytest.mark.parametrize("world", [0, -1, 5, 8, 1.0, "2", None, True])
def test_a_world_that_cannot_split_the_heads_is_rejected(world):
    for asked in (
        lambda: pieces(2, world, HEADS, 0),
        lambda: pieces(world, 2, HEADS, 0),
        lambda: resharded(KVLayout(1, 6, 4, "float16"), 2, world),
    ):
        with refusal("evenly among|whole number"):
            asked()


def test_a_rank_outside_the_world_is_rejected():
    for rank in (-1, 2):
        with refusal("rank: must be from 0 to"):
            pieces(1, 2, HEADS, rank)


def test_an_engines_own_layout_is_rejected():
    with refusal("unknown layout cannot be split"):
        resharded(None, 2, 4)
    with refusal("opaque layout cannot be split"):
        resharded(OpaqueLayout(4096, 16, "pages of a test"), 2, 4)


def test_blocks_of_another_size_are_rejected():
    layout = KVLayout(1, 6, 4, "float16", 2)
    good, made_of = random_block(layout, 1), pieces(2, 1, HEADS, 0)
    for blocks in ([good], [good, good[:-1]], [good, good.view(torch.float16)], [good, good.view(2, -1)], []):
        with refusal("bytes|pieces"):
            join(blocks, made_of, layout)
