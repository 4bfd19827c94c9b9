"""The content of one node as a checkpoint: its blocks as frames in content-addressed packs, and a manifest written last.

Writing again writes only packs that are not there yet, as far as blocks fall into the same packs. Reading verifies every frame
before the first one is loaded.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from tiered_kv.codecs.frame import open_pieces
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.ops.manifest import Manifest, Model
from tiered_kv.service.admission import Admission
from tiered_kv.service.node import Node
from tiered_kv.tiers.footer import Entry
from tiered_kv.tiers.log import Record
from tiered_kv.tiers.objectstore import ObjectStore
from tiered_kv.tiers.packs import PackWriter, read_footer, read_frame

log = logging.getLogger(__name__)

PACK_BYTES = 64 << 20
_AT_ONCE = 64  # blocks that are held in place together


class Saved(NamedTuple):
    """What a save wrote: blocks in all, packs in all, and how many of these were not there before."""

    blocks: int
    packs: int
    new_packs: int


class Loaded(NamedTuple):
    """What a load brought: blocks that are in the cache now, and those for which there was no room."""

    blocks: int
    refused: int


def save(node: Node, store: ObjectStore, name: str, models: Sequence[Model], extra: dict[str, Any]) -> Saved:
    """Write the blocks of these models, and then the manifest `name`. Raises (kind `storage`) when the store does; the manifest that
    was there before then still is.
    """
    there = set(store.sizes())
    packs: list[tuple[str, int]] = []
    new = blocks = 0
    writer = PackWriter(store)
    for model in models:
        for record in _records(node, model.root):
            writer.add(record)
            blocks += 1
            if writer.nbytes >= PACK_BYTES:
                new += _finish(writer, there, packs)
                writer = PackWriter(store)
    if len(writer):
        new += _finish(writer, there, packs)
    Manifest(tuple(packs), tuple(models), extra).write(store, name)
    return Saved(blocks, len(packs), new)


def _finish(writer: PackWriter, there: set[str], packs: list[tuple[str, int]]) -> bool:
    info = writer.seal()
    packs.append((info.name, info.nbytes))
    if info.name in there:
        return False
    writer.finish()
    return True


def _records(node: Node, root: bytes) -> Iterator[Record]:
    """The blocks below a root, each behind its parent, copied; those that leave meanwhile are left out."""
    with node.running():
        known = {key: (block.parent, block.depth or 0) for key, block in node.engine.machine.blocks.items() if block.root == root}
    keys = sorted(known, key=lambda key: (known[key][1], key))
    for start in range(0, len(keys), _AT_ONCE):
        rest = keys[start : start + _AT_ONCE]
        while rest:
            with node.serving(rest) as frames:
                for key, pieces in zip(rest, frames, strict=False):
                    frame = open_pieces(pieces, key)
                    copied = b"".join(bytes(piece) for piece in frame.pieces)
                    yield Record(key, [copied], frame.codec.id, frame.raw_bytes, known[key][0], root)
                rest = rest[len(frames) + 1 :]  # behind what was not there


def read(store: ObjectStore, name: str) -> tuple[Manifest, list[tuple[str, Entry]]]:
    """The manifest `name` and its frames by pack, all of them verified. Raises as `Manifest.read`, and (kinds `storage`, `corrupt`)
    where a pack is missing or damaged.
    """
    manifest = Manifest.read(store, name)
    sizes = store.sizes()
    entries: list[tuple[str, Entry]] = []
    for pack, nbytes in manifest.packs:
        if sizes.get(pack) != nbytes:
            is_there = f"has {sizes[pack]} bytes instead of {nbytes}" if pack in sizes else "is missing"
            raise TieredKVError(Kind.CORRUPT, f"checkpoint {name}: its pack {pack} {is_there}", object=name)
        for entry in read_footer(store, pack, nbytes).entries:
            read_frame(store, pack, entry.offset, entry.stored_bytes, entry.key, entry.root)
            entries.append((pack, entry))
    return manifest, entries


def load(node: Node, store: ObjectStore, models: Iterable[Model], entries: Sequence[tuple[str, Entry]]) -> Loaded:
    """Bring verified frames of these models into the node, in host memory first; what has no room there is refused."""
    layouts = {model.root: model.layout for model in models}
    depths: dict[bytes, int] = {}
    loaded = refused = 0
    with closing(node.open_session()) as session:
        for pack, entry in entries:
            depth = 0 if entry.parent is None else depths.get(entry.parent, -1) + 1
            if entry.root not in layouts or (entry.parent is not None and entry.parent not in depths):
                refused += 1
                continue
            frame = read_frame(store, pack, entry.offset, entry.stored_bytes, entry.key, entry.root)
            admit = Admission(node, session, entry.root, layouts[entry.root].block_bytes, [entry.key], entry.parent, depth)
            if admit([entry.key], [frame.pieces]):
                depths[entry.key] = depth
                loaded += 1
            else:
                refused += 1
    if refused:
        log.warning("%d of %d blocks of a checkpoint found no room", refused, len(entries))
    return Loaded(loaded, refused)
