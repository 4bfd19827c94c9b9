"""Loads a checkpoint into the node of this process. All frames are verified before the first block is loaded."""

import logging
from collections.abc import Collection
from contextlib import closing
from typing import NamedTuple

from tiered_kv.checkpoint.manifest import Manifest
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.node import Node
from tiered_kv.node.peer_admission import Admission
from tiered_kv.protocol.messages import BlockRun
from tiered_kv.tiers.objects.packs import read_footer, read_frame
from tiered_kv.tiers.objects.store import ObjectStore

log = logging.getLogger(__name__)


class LoadResult(NamedTuple):
    """The counts of a load.

    blocks: blocks loaded. refused: blocks not loaded, because there was no room, the layout was unknown, or the parent was not
    loaded.
    """

    blocks: int
    refused: int


def read(store: ObjectStore, name: str) -> Manifest:
    """Read the manifest `name`, and verify all frames that it lists. Returns the manifest.

    Raises the errors of `Manifest.read`, and (kinds `storage`, `corrupt`) if a pack is missing or damaged.
    """
    manifest = Manifest.read(store, name)
    sizes = store.sizes()
    for pack, nbytes in manifest.packs:
        if sizes.get(pack) != nbytes:
            problem = f"must have {nbytes} bytes, got {sizes[pack]}" if pack in sizes else "is missing"
            raise TieredKVError(Kind.CORRUPT, f"checkpoint {name}: its pack {pack} {problem}", object=name)
        read_footer(store, pack, nbytes)
    for row in manifest.rows:
        read_frame(store, manifest.packs[row.pack][0], row.offset, row.stored_bytes, row.key, row.root)
    return manifest


def load(node: Node, store: ObjectStore, manifest: Manifest, roots: Collection[BlockKey]) -> LoadResult:
    """Load the blocks of a verified checkpoint whose root is in `roots` into the node, host memory first. Returns the counts.

    A block is refused if there is no room, if its parent was not loaded, or if the layout of its model is unknown.
    """
    layouts = {model.root: model.layout for model in manifest.models}
    loaded: set[BlockKey] = set()
    refused = 0
    rows = [row for row in manifest.rows if row.root in roots]
    with closing(node.open_session()) as session:
        for row in rows:
            layout = layouts[row.root]
            if layout is None or (row.parent is not None and row.parent not in loaded):
                refused += 1
                continue
            frame = read_frame(store, manifest.packs[row.pack][0], row.offset, row.stored_bytes, row.key, row.root)
            admit = Admission(node, session, BlockRun(row.root, layout.block_bytes, row.parent, [row.key], row.depth))
            if admit.take([row.key], [frame.pieces]):
                loaded.add(row.key)
            else:
                refused += 1
    if refused:
        log.warning(
            "%d of %d blocks of a checkpoint were not loaded: no room, no layout, or their parent was not loaded", refused, len(rows)
        )
    return LoadResult(len(loaded), refused)
