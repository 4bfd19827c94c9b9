"""Stores frames from a peer in the host tier: verifies, copies and commits them through a session of their own."""

import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.codecs.frame import Frame
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.compression import BlockData
from tiered_kv.node.packed import Packed
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.protocol.messages import BlockRun
from tiered_kv.protocol.peer_transport import FramePieces
from tiered_kv.store.engine import BlockFormat

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

log = logging.getLogger(__name__)

ADMIT_WAIT_S = 0.05


class Admission:
    """Stores the blocks of one run."""

    def __init__(self, node: "Node", session: NodeSession, run: BlockRun) -> None:
        self._storage = node.storage
        self._session = session
        self._root = run.root
        self._nbytes = run.nbytes
        self._parents = dict(zip(run.keys, [run.parent, *run.keys], strict=False))
        self._depths = {key: run.depth + number for number, key in enumerate(run.keys)}

    def __call__(self, keys: list[BlockKey], frames: list[FramePieces]) -> int:
        """Store the leading frames. Returns how many were stored; it stops at a damaged frame and at one that is too lossy."""
        opened = (self._storage.opened(key, pieces, self._root) for key, pieces in zip(keys, frames, strict=False))
        good: list[Frame] = []
        for frame in opened:
            if frame is None or frame.raw_bytes != self._nbytes:
                break
            good.append(frame)
        taken = 0
        while taken < len(good):
            form = self._storage.form_of(good[taken], self._root)
            same = self._leading_of(form, good[taken:])
            wanted, parent, is_coded = keys[taken : taken + len(same)], self._parents[keys[taken]], form.codec != 0
            offsets = self._session.reserve_within(form.nbytes, wanted, parent, ADMIT_WAIT_S, is_coded=is_coded)
            packed = self._packed(keys[taken:], same, [Location(Tier.HOST, form.codec, 0, at, form.nbytes, self._nbytes) for at in offsets])
            done = len(self._session.commit_packed(packed))
            self._session.release(offsets[len(packed) :])
            taken += done
            if not done or done < len(offsets):
                break
        return taken

    def _leading_of(self, form: BlockFormat, frames: Sequence[Frame]) -> list[Frame]:
        return list(takewhile(lambda frame: self._storage.form_of(frame, self._root) == form, frames))

    def _packed(self, keys: Sequence[BlockKey], frames: Sequence[Frame], locations: Sequence[Location]) -> list[Packed]:
        """Write the frames into extents. Returns the packed blocks up to the first frame that cannot be decoded or may not be shown."""
        packed = []
        for key, frame, location in zip(keys, frames, locations, strict=False):
            info = BlockInfo(key, self._parents[key], self._root, self._depths[key])
            try:
                digest = self._storage.put(BlockData.of(frame), location, info)
            except TieredKVError as error:
                log.warning("a frame from a peer for block %s was refused: %s", key.hex(), str(error))
                break
            packed.append(Packed(info, location, frame.error, digest))
        return packed
