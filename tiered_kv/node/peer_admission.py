"""Taking the frames that a peer sent into the host tier: verified, copied, committed through a session of its own."""

import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs.frame import Frame
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.compression import BlockData
from tiered_kv.node.packed import Packed
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.tiers.host import Lineage

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

log = logging.getLogger(__name__)

ADMIT_WAIT_S = 0.05


class Admission:
    """Blocks of `nbytes` below `root`: the first of `keys` stands behind `tail`, with `depth` blocks before it."""

    def __init__(
        self,
        node: "Node",
        session: NodeSession,
        root: BlockKey,
        nbytes: int,
        keys: Sequence[BlockKey],
        tail: BlockKey | None,
        depth: int,
    ) -> None:
        self._storage = node.storage
        self._session = session
        self._root = root
        self._nbytes = nbytes
        self._parents = dict(zip(keys, [tail, *keys], strict=False))
        self._depths = {key: depth + number for number, key in enumerate(keys)}

    def __call__(self, keys: list[BlockKey], frames: list[FramePieces]) -> int:
        """How many of the leading frames are in place; a damaged one, or one too lossy, ends it."""
        opened = (self._storage.opened(key, pieces, self._root) for key, pieces in zip(keys, frames, strict=False))
        good: list[Frame] = list(takewhile(lambda frame: frame is not None and frame.raw_bytes == self._nbytes, opened))
        taken = 0
        while taken < len(good):
            form = self._storage.form_of(good[taken], self._root)
            same = list(takewhile(lambda frame, form=form: self._storage.form_of(frame, self._root) == form, good[taken:]))
            wanted, tail, is_coded = keys[taken : taken + len(same)], self._parents[keys[taken]], form.codec != 0
            offsets = self._session.reserve_within(form.nbytes, wanted, tail, ADMIT_WAIT_S, is_coded=is_coded)
            packed = self._packed(keys[taken:], same, [Location(Tier.HOST, form.codec, 0, at, form.nbytes, self._nbytes) for at in offsets])
            done = len(self._session.commit_packed(self._root, packed))
            self._session.release(offsets[len(packed) :])
            taken += done
            if not done or done < len(offsets):
                break
        return taken

    def _packed(self, keys: Sequence[BlockKey], frames: Sequence[Frame], locations: Sequence[Location]) -> list[Packed]:
        """Fill the extents, as long as the frames give their blocks."""
        packed = []
        for key, frame, location in zip(keys, frames, locations, strict=False):
            parent, depth = self._parents[key], self._depths[key]
            try:
                digest = self._storage.put(BlockData.of(frame), location, Lineage(key, parent, self._root, depth))
            except TieredKVError as error:
                log.warning("a frame for block %s was refused: %s", key.hex(), str(error))
                break
            packed.append(Packed(key, parent, location, depth, frame.error, digest))
        return packed
