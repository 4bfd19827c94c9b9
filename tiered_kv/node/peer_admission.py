"""Stores blocks from peers in the host tier: verifies them and makes them visible, through a session that the pull opened.

Blocks arrive as whole frames (`take`), or over a stream that writes straight into their extents (`land`). Both pass the same checks.
"""

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
from tiered_kv.node.peers.landing import BlockLanding, FrameLanding, RawLanding, leading_form
from tiered_kv.node.worker_session import NodeSession
from tiered_kv.protocol.messages import BlockRun
from tiered_kv.protocol.peer_channel import refused
from tiered_kv.protocol.peer_transport import BlockOffer, FramePieces
from tiered_kv.store.engine import BlockFormat

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

log = logging.getLogger(__name__)

ADMIT_WAIT_S = 0.05
EXPECTED_BYTES = 8 << 20
"""The most bytes of blocks for which memory is reserved before the peer has offered them. At least one block."""


class Admission:
    """Stores the blocks of one block run that is pulled from peers. Implements `Receiver`."""

    def __init__(self, node: "Node", session: NodeSession, run: BlockRun) -> None:
        self._storage = node.storage
        self._session = session
        self._root = run.root
        self._nbytes = run.nbytes
        self._parents = dict(zip(run.keys, [run.parent, *run.keys], strict=False))
        self._depths = {key: run.depth + number for number, key in enumerate(run.keys)}
        self._expected: list[tuple[BlockKey, Location]] = []  # reserved for raw blocks; freed with the session if not used

    def take(self, keys: Sequence[BlockKey], frames: Sequence[FramePieces]) -> int:
        """As `Receiver.take`. It also stops at the first frame that is too lossy."""
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
            locations = self._room(form, keys[taken : taken + len(same)])
            done = self.show(self._put(keys[taken:], same, locations), locations)
            taken += done
            if not done or done < len(locations):
                break
        return taken

    def expect(self, keys: Sequence[BlockKey]) -> None:
        """As `Receiver.expect`."""
        self._expected_room(())
        if first := keys[: max(1, EXPECTED_BYTES // self._nbytes)]:
            self._expected = list(zip(first, self._room(BlockFormat(0, self._nbytes), first), strict=False))

    def land(self, keys: Sequence[BlockKey], offers: Sequence[BlockOffer]) -> BlockLanding:
        form, same = leading_form(self._storage, keys, offers, self._root, self._nbytes)
        expected = self._expected_room(keys[: len(same)] if same[0].head else ())  # frees it all if the peer sends frames
        locations = expected or self._room(form, keys[: len(same)])
        if not locations:
            raise refused("no_room", "no room for a block of a peer", own_fault=True)
        if same[0].head:
            return RawLanding(self, self._storage, keys, locations, same)
        return FrameLanding(self, self._storage, keys, locations, same, self._root)

    def _expected_room(self, keys: Sequence[BlockKey]) -> list[Location]:
        """Returns the locations that `expect` has reserved for leading blocks of `keys`. If there are none, frees all that are left."""
        count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1][0], zip(keys, self._expected, strict=False)))
        used, rest = self._expected[:count], self._expected[count:]
        if not used:
            self._session.release([location.offset for _, location in rest])
        self._expected = rest if used else []
        return [location for _, location in used]

    def _room(self, form: BlockFormat, keys: Sequence[BlockKey]) -> list[Location]:
        """Reserve extents of one block format for the leading `keys`. Returns their locations, [] if there is no room."""
        parent, is_coded = self._parents[keys[0]], form.codec != 0
        offsets = self._session.reserve_within(form.nbytes, list(keys), parent, ADMIT_WAIT_S, is_coded=is_coded)
        return [Location(Tier.HOST, form.codec, 0, offset, form.nbytes, self._nbytes) for offset in offsets]

    def show(self, packed: Sequence[Packed], locations: Sequence[Location]) -> int:
        """Commit the `packed` blocks, which fill the leading `locations`, and free the other locations. Returns how many are visible."""
        done = len(self._session.commit_packed(list(packed), note_touches=False)) if packed else 0
        self._session.release([location.offset for location in locations[len(packed) :]])
        return done

    def info(self, key: BlockKey) -> BlockInfo:
        """Returns the block info of a block of this run."""
        return BlockInfo(key, self._parents[key], self._root, self._depths[key])

    def packed(self, key: BlockKey, location: Location, error: float, digest: int) -> Packed:
        """Returns a block of this run that is complete and verified at `location`."""
        return Packed(self.info(key), location, error, digest)

    def _leading_of(self, form: BlockFormat, frames: Sequence[Frame]) -> list[Frame]:
        return list(takewhile(lambda frame: self._storage.form_of(frame, self._root) == form, frames))

    def _put(self, keys: Sequence[BlockKey], frames: Sequence[Frame], locations: Sequence[Location]) -> list[Packed]:
        """Write the frames into extents. Ends at the first that cannot be decoded or is too lossy. Returns the blocks before it."""
        packed = []
        for key, frame, location in zip(keys, frames, locations, strict=False):
            try:
                digest = self._storage.put(BlockData.of(frame), location, self.info(key))
            except TieredKVError as error:
                log.warning("a frame from a peer for block %s was refused: %s", key.hex(), str(error))
                break
            packed.append(self.packed(key, location, frame.error, digest))
        return packed
