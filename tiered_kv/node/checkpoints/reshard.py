"""Blocks of tensor-parallel ranks made of those that other ranks, of another world, have left in a checkpoint's packs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs import RawCodec
from tiered_kv.codecs.frame import Frame, encode_frame, open_pieces
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.layout import KVLayout
from tiered_kv.node.checkpoints.reshard_layout import Piece, join
from tiered_kv.tiers.objects.mounted import MountedBlock, MountedPacks, Run, runs_of

AT_ONCE_BYTES = 32 << 20
_RAW = RawCodec()


class Made(NamedTuple):
    """A block to be made. `sources`: for each of the `pieces` the block that has it, of the layout `layout`; see `resharding.join`."""

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey
    depth: int
    uses: int
    raw_bytes: int
    sources: tuple[MountedBlock, ...]
    pieces: tuple[Piece, ...]
    layout: KVLayout

    @property
    def block(self) -> MountedBlock:
        """The block as if it lay in a pack: it lies in none."""
        nowhere = Location(Tier.CHECKPOINT, 0, 0, 0, self.raw_bytes, self.raw_bytes)
        return MountedBlock(self.key, self.parent, self.root, self.depth, nowhere, self.uses)


class Maker:
    """Makes blocks of sources whose packs are those from `first` on. Each source is read once for all that are made of it together."""

    def __init__(self, packs: MountedPacks, first: int) -> None:
        self._packs = packs
        self._first = first

    def work(
        self, blocks: Sequence[Made], wanted: Callable[[BlockKey], bool]
    ) -> Iterator[tuple[list[MountedBlock], int, Callable[[], list[Frame | TieredKVError]]]]:
        """The blocks that are still `wanted`, some at a time: what they are, bytes, and the call that makes their frames."""
        batch: list[Made] = []
        nbytes = 0
        for block in blocks:
            if wanted(block.key):
                batch.append(block)
                nbytes += block.raw_bytes
            if nbytes >= AT_ONCE_BYTES:
                yield [each.block for each in batch], nbytes, partial(self._made, batch)
                batch, nbytes = [], 0
        if batch:
            yield [each.block for each in batch], nbytes, partial(self._made, batch)

    def _made(self, batch: Sequence[Made]) -> list[Frame | TieredKVError]:
        sources = {source.key: source for each in batch for source in each.sources}
        frames: dict[BlockKey, Frame | TieredKVError] = {}
        for run in runs_of(source._replace(location=self._location(source)) for source in sources.values()):
            frames.update(zip((block.key for block in run.blocks), self._read(run), strict=True))
        raw = {key: frame if isinstance(frame, TieredKVError) else _decoded(frame) for key, frame in frames.items()}
        return [_joined(each, raw) for each in batch]

    def _read(self, run: Run) -> list[Frame | TieredKVError]:
        try:
            return self._packs.read_run(run)
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            return [error] * len(run.blocks)

    def _location(self, source: MountedBlock) -> Location:
        return source.location._replace(segment=self._first + source.location.segment)


_Decoded = tuple[torch.Tensor, float]


def _decoded(frame: Frame) -> _Decoded | TieredKVError:
    out = torch.empty(frame.raw_bytes, dtype=torch.uint8)
    try:
        frame.decode(out)
    except TieredKVError as error:
        return TieredKVError(error.kind, str(error))
    return out, frame.error


def _joined(block: Made, raw: dict[BlockKey, _Decoded | TieredKVError]) -> Frame | TieredKVError:
    """The frame of a block; it carries the largest error of its sources."""
    parts = [raw[source.key] for source in block.sources]
    for part in parts:
        if isinstance(part, TieredKVError):
            return TieredKVError(Kind.CORRUPT, f"a block that it is made of cannot be had: {part}")
    joined = join([part for part, _ in parts], block.pieces, block.layout)
    return open_pieces(encode_frame(block.key, block.root, _RAW, joined, max(error for _, error in parts)), block.key)
