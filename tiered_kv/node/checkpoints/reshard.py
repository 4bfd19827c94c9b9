"""Resharding on a node: builds blocks of tensor-parallel ranks from the blocks of other ranks in a checkpoint's packs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.codecs.frame import Frame, encode_frame, open_pieces
from tiered_kv.codecs.raw import RawCodec
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.layout import KVLayout
from tiered_kv.node.checkpoints.reshard_layout import Piece, join
from tiered_kv.tiers.objects.mounted import MountedBlock, MountedPacks, PackRange, runs_of

if TYPE_CHECKING:
    import torch

AT_ONCE_BYTES = 32 << 20
_RAW = RawCodec()


class ReshardedBlock(NamedTuple):
    """A block to build.

    sources: for each of `pieces`, the block that contains this piece. layout: the layout of the sources. See `reshard_layout.join`.
    """

    info: BlockInfo
    uses: int
    raw_bytes: int
    sources: tuple[MountedBlock, ...]
    pieces: tuple[Piece, ...]
    layout: KVLayout

    @property
    def key(self) -> BlockKey:
        """The block's key."""
        return self.info.key

    @property
    def block(self) -> MountedBlock:
        """This block in the form that the loader handles. Its location is a placeholder, because no pack contains it."""
        nowhere = Location(Tier.CHECKPOINT, 0, 0, 0, self.raw_bytes, self.raw_bytes)
        return MountedBlock(self.info, nowhere, self.uses)


class ReshardBatch(NamedTuple):
    """Blocks that are built together. `build`: returns for each block its frame, or the error if it cannot be built."""

    blocks: list[MountedBlock]
    nbytes: int
    build: Callable[[], list[Frame | TieredKVError]]


class Resharder:
    """Builds blocks from mounted packs. A source that several blocks of a batch share is read once.

    `first`: the number that `packs` has given to the pack which the sources call segment 0.
    """

    def __init__(self, packs: MountedPacks, first: int) -> None:
        self._packs = packs
        self._first = first

    def batches(self, blocks: Iterable[ReshardedBlock], is_missing: Callable[[BlockKey], bool]) -> Iterator[ReshardBatch]:
        """Yields the blocks that are still missing in the cache, in batches of about `AT_ONCE_BYTES`."""
        batch: list[ReshardedBlock] = []
        nbytes = 0
        for block in blocks:
            if is_missing(block.key):
                batch.append(block)
                nbytes += block.raw_bytes
            if nbytes >= AT_ONCE_BYTES:
                yield self._batch(batch, nbytes)
                batch, nbytes = [], 0
        if batch:
            yield self._batch(batch, nbytes)

    def _batch(self, blocks: list[ReshardedBlock], nbytes: int) -> ReshardBatch:
        return ReshardBatch([each.block for each in blocks], nbytes, partial(self._built, blocks))

    def _built(self, batch: Sequence[ReshardedBlock]) -> list[Frame | TieredKVError]:
        sources = {source.key: source for each in batch for source in each.sources}
        frames: dict[BlockKey, Frame | TieredKVError] = {}
        for run in runs_of(source._replace(location=self._location(source)) for source in sources.values()):
            frames.update(zip((block.key for block in run.blocks), self._read(run), strict=True))
        raw = {key: frame if isinstance(frame, TieredKVError) else _decoded(frame) for key, frame in frames.items()}
        return [_joined(each, raw) for each in batch]

    def _read(self, run: PackRange) -> list[Frame | TieredKVError]:
        try:
            return self._packs.read_run(run)
        except TieredKVError as error:
            if error.kind is not Kind.CORRUPT and not error.context.get("missing"):
                raise
            return [error] * len(run.blocks)

    def _location(self, source: MountedBlock) -> Location:
        return source.location._replace(segment=self._first + source.location.segment)


_Decoded = tuple["torch.Tensor", float]


def _decoded(frame: Frame) -> _Decoded | TieredKVError:
    import torch

    out = torch.empty(frame.raw_bytes, dtype=torch.uint8)
    try:
        frame.decode(out)
    except TieredKVError as error:
        return TieredKVError(error.kind, str(error))
    return out, frame.error


def _joined(block: ReshardedBlock, raw: dict[BlockKey, _Decoded | TieredKVError]) -> Frame | TieredKVError:
    """Returns the frame of a block, or the error if one of its sources is damaged. The lossy error is the largest of its sources'."""
    key, _, root, _ = block.info
    assert root is not None, "a block to build has a root"
    parts: list[_Decoded] = []
    for source in block.sources:
        part = raw[source.key]
        if isinstance(part, TieredKVError):
            return TieredKVError(Kind.CORRUPT, f"a source block cannot be read: {part}")
        parts.append(part)
    joined = join([part for part, _ in parts], block.pieces, block.layout)
    return open_pieces(encode_frame(key, root, _RAW, joined, max(error for _, error in parts)), key)
