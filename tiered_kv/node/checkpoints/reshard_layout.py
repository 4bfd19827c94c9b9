"""Splits and joins blocks along their heads, to convert them between worlds (numbers of tensor-parallel ranks).

Axes of a block: (L, 2, H, T, D), L layers, 2 (key, value), H KV heads of the rank, T tokens, D head dim. A model in a world of N
ranks has the heads 0 … H·N-1; rank r has the H heads from r·H on.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.layout import KVLayout, Layout

if TYPE_CHECKING:
    import torch


class Piece(NamedTuple):
    """Consecutive KV heads that a rank takes from rank `source` of the other world.

    first: the number of the first head in the source. heads: how many heads. target: the number of the first head in this rank.
    """

    source: int
    first: int
    heads: int
    target: int


def pieces(world: int, target_world: int, heads: int, rank: int) -> list[Piece]:
    """Returns the pieces of rank `rank` of the target world, in the order of its heads: at most one from each rank of `world`.

    `heads`: KV heads of the whole model. Raises (kind `layout`) if one of the worlds cannot divide them evenly.
    """
    ours, theirs = heads_of_rank(heads, target_world), heads_of_rank(heads, world)
    if not 0 <= rank < target_world:
        raise TieredKVError(Kind.LAYOUT, f"rank: must be from 0 to {target_world - 1} in a world of {target_world}, got {rank}", rank=rank)
    begin, end = rank * ours, (rank + 1) * ours
    found = []
    for source in range(begin // theirs, -(-end // theirs)):
        first, last = max(begin, source * theirs), min(end, (source + 1) * theirs)
        found.append(Piece(source, first - source * theirs, last - first, first - begin))
    return found


def heads_of_rank(heads: int, world: int) -> int:
    """Returns the number of KV heads per rank. Raises (kind `layout`) if `world` ranks cannot divide `heads` evenly."""
    if type(world) is not int or world < 1:
        raise TieredKVError(Kind.LAYOUT, f"world: must be a whole number of at least 1, got {world!r}", world=world)
    if heads % world:
        raise TieredKVError(Kind.LAYOUT, f"{heads} KV heads cannot be divided evenly among {world} ranks", heads=heads, world=world)
    return heads // world


def opened_layout(layout: Layout | None) -> KVLayout:
    """Returns the layout, or raises (kind `layout`) if it is opaque or unknown (None)."""
    if not isinstance(layout, KVLayout):
        kind = "unknown" if layout is None else "opaque"
        raise TieredKVError(Kind.LAYOUT, f"blocks of an {kind} layout cannot be split: the positions of their heads are unknown")
    return layout


def resharded(layout: Layout | None, world: int, target_world: int) -> KVLayout:
    """Returns the layout of a rank of the target world. `layout`: that of a rank of `world`, None if it is unknown.

    Raises (kind `layout`) for an opaque or unknown layout, and if the ranks of the target world cannot divide the heads evenly.
    """
    opened = opened_layout(layout)
    return replace(opened, kv_heads=heads_of_rank(opened.kv_heads * world, target_world))


def join(blocks: "Sequence[torch.Tensor]", made_of: Sequence[Piece], layout: KVLayout) -> "torch.Tensor":
    """Returns a block of a rank of the target world: raw, 1-D uint8, newly allocated. Cost: one copy, without arithmetic.

    `blocks`: for each piece the raw block of its source, 1-D uint8. `layout`: that of the sources. Raises (kind `layout`) if a
    block does not have this layout, or if there is not one block per piece.
    """
    import torch

    shape = (layout.layers, 2, layout.kv_heads, layout.block_tokens * layout.head_dim * layout.item_bytes)
    for block in blocks:
        if block.dtype != torch.uint8 or block.shape != (layout.block_bytes,):
            message = (
                f"blocks: a block of {layout.spec} must be {layout.block_bytes} bytes, got shape {tuple(block.shape)} of {block.dtype}"
            )
            raise TieredKVError(Kind.LAYOUT, message)
    if not blocks or len(blocks) != len(made_of):
        raise TieredKVError(Kind.LAYOUT, f"blocks: expected one for each of {len(made_of)} pieces, got {len(blocks)}")
    heads = sum(piece.heads for piece in made_of)
    whole = torch.empty((*shape[:2], heads, shape[3]), dtype=torch.uint8)
    for block, (_, first, count, target) in zip(blocks, made_of, strict=True):
        whole[:, :, target : target + count] = block.view(shape)[:, :, first : first + count]
    return whole.view(-1)
