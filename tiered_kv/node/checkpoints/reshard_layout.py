"""Blocks of the ranks of one world from those of another: the same KV, cut along its heads at other places.

Axes of a block: (L, 2, H, T, D), L layers, 2 (key, value), H KV heads of the rank, T tokens, D head dim. Of a model with heads
0 … H·N-1 rank r of world N has the heads from r·H on.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import ITEM_BYTES, KVLayout


class Piece(NamedTuple):
    """`count` heads that a rank takes from one rank of the other world: from head `first` there to head `target` here."""

    source: int
    first: int
    count: int
    target: int


def pieces(world: int, target_world: int, heads: int, rank: int) -> list[Piece]:
    """What rank `rank` of the target world consists of, in the order of its heads: at most one piece of each rank of `world`.

    `heads`: KV heads of the whole model. Raises (kind `layout`) where one of the worlds cannot share them evenly.
    """
    ours, theirs = heads_of_rank(heads, target_world), heads_of_rank(heads, world)
    if not 0 <= rank < target_world:
        raise TieredKVError(Kind.LAYOUT, f"there is no rank {rank} in a world of {target_world}", rank=rank)
    begin, end = rank * ours, (rank + 1) * ours
    made = []
    for source in range(begin // theirs, -(-end // theirs)):
        first, last = max(begin, source * theirs), min(end, (source + 1) * theirs)
        made.append(Piece(source, first - source * theirs, last - first, first - begin))
    return made


def heads_of_rank(heads: int, world: int) -> int:
    """KV heads of each rank; raises (kind `layout`) for a world that cannot share `heads` evenly."""
    if type(world) is not int or world < 1:
        raise TieredKVError(Kind.LAYOUT, f"world must be a whole number of at least 1, not {world!r}", world=world)
    if heads % world:
        raise TieredKVError(Kind.LAYOUT, f"{heads} KV heads cannot be shared evenly by {world} ranks", heads=heads, world=world)
    return heads // world


def resharded(layout: KVLayout | None, world: int, target_world: int) -> KVLayout:
    """The layout of a rank of the target world, from that of a rank of `world`; None is an engine's own layout, and refused.

    Raises (kind `layout`) where the ranks of the target world cannot share the heads evenly.
    """
    if layout is None:
        raise TieredKVError(Kind.LAYOUT, "blocks of an engine's own layout cannot be split: nobody knows where their heads lie")
    return replace(layout, kv_heads=heads_of_rank(layout.kv_heads * world, target_world))


def join(blocks: Sequence[torch.Tensor], made_of: Sequence[Piece], layout: KVLayout) -> torch.Tensor:
    """A block of a rank of the target world: raw, 1-D uint8, newly allocated. Costs one copy, without arithmetic on any dtype.

    `blocks`: the raw block of each piece's source, 1-D uint8 of `layout`, which is that of a source's rank. Raises (kind `layout`)
    for blocks that are not.
    """
    shape = (layout.layers, 2, layout.kv_heads, layout.block_tokens * layout.head_dim * ITEM_BYTES[layout.dtype])
    for block in blocks:
        if block.dtype != torch.uint8 or block.shape != (layout.block_bytes,):
            message = f"a block of {layout.spec} has {layout.block_bytes} bytes, not {tuple(block.shape)} of {block.dtype}"
            raise TieredKVError(Kind.LAYOUT, message)
    if not blocks or len(blocks) != len(made_of):
        raise TieredKVError(Kind.LAYOUT, f"{len(made_of)} pieces are of as many blocks, not of {len(blocks)}")
    heads = sum(piece.count for piece in made_of)
    whole = torch.empty((*shape[:2], heads, shape[3]), dtype=torch.uint8)
    for block, (_, first, count, target) in zip(blocks, made_of, strict=True):
        whole[:, :, target : target + count] = block.view(shape)[:, :, first : first + count]
    return whole.view(-1)
