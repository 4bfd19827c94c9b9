"""The content of one node as a checkpoint: its blocks as frames in content-addressed packs, and a manifest written last.

Writing again writes only packs that are not there yet, as far as blocks fall into the same packs. Reading verifies every frame
before the first one is loaded.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from tiered_kv.blocks import Tier
from tiered_kv.codecs.frame import open_pieces
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.ops.manifest import Manifest, Model
from tiered_kv.ops.repository import Repository
from tiered_kv.ops.rows import Row, hottest_first
from tiered_kv.service.admission import Admission
from tiered_kv.service.node import Node
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
    with Repository(store).lease():
        there = set(store.sizes())
        packs: list[tuple[str, int]] = []
        rows: dict[tuple[BlockKey | None, BlockKey], Row] = {}
        new = 0
        writer = PackWriter(store)
        for model in models:
            for record, tier, hits in _records(node, model.root):
                parent = rows.get((record.parent, model.root))
                if parent is None and record.parent is not None:
                    continue  # it left while its children were being written
                at = writer.add(record)
                facts = at.offset, at.stored_bytes, at.raw_bytes, at.codec, tier, hits
                rows[at.key, model.root] = Row(at.key, at.parent, model.root, parent.depth + 1 if parent else 0, len(packs), *facts)
                if writer.nbytes >= PACK_BYTES:
                    new += _finish(writer, there, packs)
                    writer = PackWriter(store)
        if len(writer):
            new += _finish(writer, there, packs)
        ordered = hottest_first(list(rows.values()))
        Manifest(tuple(packs), tuple(models), ordered, time.time(), "library", extra).write(store, name)
        return Saved(len(rows), len(packs), new)


def _finish(writer: PackWriter, there: set[str], packs: list[tuple[str, int]]) -> bool:
    info = writer.seal()
    packs.append((info.name, info.nbytes))
    if info.name in there:
        return False
    writer.finish()
    return True


def _records(node: Node, root: bytes) -> Iterator[tuple[Record, int, int]]:
    """The blocks below a root with tier and uses, each behind its parent, copied; those that leave meanwhile are left out."""
    with node.running():
        blocks = node.engine.machine.blocks.items()
        known = {
            key: (each.parent, each.depth or 0, min(each.copies, default=Tier.HOST), each.uses) for key, each in blocks if each.root == root
        }
    keys = sorted(known, key=lambda key: (known[key][1], key))
    for start in range(0, len(keys), _AT_ONCE):
        rest = keys[start : start + _AT_ONCE]
        while rest:
            with node.serving(rest) as frames:
                for key, pieces in zip(rest, frames, strict=False):
                    frame = open_pieces(pieces, key)
                    copied = b"".join(bytes(piece) for piece in frame.pieces)
                    parent, _, tier, uses = known[key]
                    yield Record(key, [copied], frame.codec.id, frame.raw_bytes, parent, root), tier.value, uses
                rest = rest[len(frames) + 1 :]  # behind what was not there


def read(store: ObjectStore, name: str) -> Manifest:
    """The manifest `name`, all its frames verified. Raises as `Manifest.read`, and (kinds `storage`, `corrupt`) where a pack is missing
    or damaged.
    """
    manifest = Manifest.read(store, name)
    sizes = store.sizes()
    for pack, nbytes in manifest.packs:
        if sizes.get(pack) != nbytes:
            is_there = f"has {sizes[pack]} bytes instead of {nbytes}" if pack in sizes else "is missing"
            raise TieredKVError(Kind.CORRUPT, f"checkpoint {name}: its pack {pack} {is_there}", object=name)
        read_footer(store, pack, nbytes)
    for row in manifest.rows:
        read_frame(store, manifest.packs[row.pack][0], row.offset, row.stored_bytes, row.key, row.root)
    return manifest


def load(node: Node, store: ObjectStore, manifest: Manifest) -> Loaded:
    """Bring a verified checkpoint into the node, in host memory first; what has no room there is refused."""
    layouts = {model.root: model.layout for model in manifest.models}
    there: set[BlockKey] = set()
    refused = 0
    with closing(node.open_session()) as session:
        for row in manifest.rows:
            if layouts[row.root] is None or (row.parent is not None and row.parent not in there):
                refused += 1
                continue
            frame = read_frame(store, manifest.packs[row.pack][0], row.offset, row.stored_bytes, row.key, row.root)
            admit = Admission(node, session, row.root, layouts[row.root].block_bytes, [row.key], row.parent, row.depth)
            if admit([row.key], [frame.pieces]):
                there.add(row.key)
            else:
                refused += 1
    if refused:
        log.warning("%d of %d blocks of a checkpoint found no room", refused, len(manifest.rows))
    return Loaded(len(there), refused)
