"""Memory for blocks that arrive over a stream, and the checks that they must pass before they are visible.

A raw block is received into its extent, and its bytes are hashed on the way. The hash must match the seal in the header that the peer
sent before. A frame is received into its extent too, if host memory keeps frames of its model. Else it is received into a buffer, from
which it is decoded.
"""

import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

from tiered_kv.blocks import PEER, BlockInfo, Location
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.compression import BlockData
from tiered_kv.node.packed import Packed
from tiered_kv.node.storage import NodeStorage
from tiered_kv.protocol.peer_channel import refused
from tiered_kv.protocol.peer_transport import BlockOffer, PayloadTarget
from tiered_kv.store.engine import BlockFormat
from tiered_kv.tiers.host import FRAME_DIGEST, is_sealed_for, read_header, running_digest

log = logging.getLogger(__name__)

FRAME_BYTES_MORE = 64 << 10
"""How much larger than its block a frame may be: its header, and bytes that a codec could not make smaller."""


class Shelf(Protocol):
    """Makes verified blocks of a run visible. Implemented by the run's `Admission`."""

    def packed(self, key: BlockKey, location: Location, error: float, digest: int) -> Packed:
        """Returns a block of the run that is complete and verified at `location`."""

    def info(self, key: BlockKey) -> BlockInfo:
        """Returns the block info of a block of the run."""

    def show(self, packed: Sequence[Packed], locations: Sequence[Location]) -> int:
        """Commit the `packed` blocks, which fill the leading `locations`, and free the other locations. Returns how many are visible."""


class BlockLanding:
    """Implements `Landing`. Subclasses verify their kind of payload."""

    targets: Sequence[PayloadTarget]

    def __init__(self, shelf: Shelf, storage: NodeStorage, keys: Sequence[BlockKey], locations: Sequence[Location]) -> None:
        self._shelf = shelf
        self._storage = storage
        self._keys = keys[: len(locations)]
        self._locations = locations
        self._is_open = True

    def _memory(self, location: Location) -> memoryview:
        return self._storage.host.headers.bytes[location.offset : location.offset + location.stored_bytes]

    def _verified(self, number: int) -> Packed:
        """Returns block `number`. Raises (kind `transport`, with a reason) if its payload does not match its offer."""
        raise NotImplementedError

    def commit(self) -> int:
        packed: list[Packed] = []
        wrong: TieredKVError | None = None
        try:
            for number in range(len(self._keys)):
                packed.append(self._verified(number))
        except TieredKVError as error:
            wrong = error
        self._is_open = False
        done = self._shelf.show(packed, self._locations)
        if wrong is not None:
            raise wrong
        return done

    def abandon(self) -> None:
        if self._is_open:
            self._is_open = False
            self._shelf.show([], self._locations)


class RawLanding(BlockLanding):
    """Raw blocks, which are received into their extents."""

    def __init__(
        self,
        shelf: Shelf,
        storage: NodeStorage,
        keys: Sequence[BlockKey],
        locations: Sequence[Location],
        offers: Sequence[BlockOffer],
    ) -> None:
        super().__init__(shelf, storage, keys, locations)
        self._heads = [offer.head for offer in offers[: len(locations)]]
        self._digests = [running_digest() for _ in locations]
        self.targets = [
            PayloadTarget(self._memory(location), digest.update) for location, digest in zip(locations, self._digests, strict=True)
        ]

    def _verified(self, number: int) -> Packed:
        key, head, digest = self._keys[number], self._heads[number], self._digests[number].intdigest()
        if not is_sealed_for(head, digest):
            raise damaged(key, "its bytes do not agree with their seal")
        return self._shelf.packed(key, self._locations[number], read_header(head).error, digest)


class FrameLanding(BlockLanding):
    """Frames, which are received into their extents if host memory keeps them, else into buffers."""

    def __init__(
        self,
        shelf: Shelf,
        storage: NodeStorage,
        keys: Sequence[BlockKey],
        locations: Sequence[Location],
        offers: Sequence[BlockOffer],
        root: BlockKey,
    ) -> None:
        super().__init__(shelf, storage, keys, locations)
        self._offers = offers[: len(locations)]
        self._root = root
        self.targets = [
            PayloadTarget(self._memory(location) if location.codec else memoryview(bytearray(offer.nbytes)))
            for location, offer in zip(locations, self._offers, strict=True)
        ]

    def _verified(self, number: int) -> Packed:
        key, location, offer = self._keys[number], self._locations[number], self._offers[number]
        frame = self._storage.opened_whole(key, self.targets[number].memory, self._root)
        if frame is None:
            raise damaged(key, "its frame is damaged, of another block, or may not be shown here")
        if (frame.raw_bytes, frame.codec.id) != (offer.raw_bytes, offer.codec):
            raise damaged(key, "its frame is not of the codec and size that were offered")
        if location.codec:
            return self._shelf.packed(key, location, frame.error, FRAME_DIGEST)
        try:
            digest = self._storage.put(BlockData.of(frame), location, self._shelf.info(key))
        except TieredKVError as error:
            raise damaged(key, str(error)) from error
        return self._shelf.packed(key, location, frame.error, digest)


def leading_form(
    storage: NodeStorage, keys: Sequence[BlockKey], offers: Sequence[BlockOffer], root: BlockKey, nbytes: int
) -> tuple[BlockFormat, list[BlockOffer]]:
    """Returns the block format in host memory of the first offer, and the leading offers of the same format.

    `nbytes`: the raw bytes of each block that was requested. Raises (kind `transport`, with a reason) if the first offer does not fit
    the first key, or is too lossy.
    """
    checked: list[BlockOffer] = []
    try:
        for key, offer in zip(keys, offers, strict=False):
            _check(storage, key, offer, root, nbytes)
            checked.append(offer)
    except TieredKVError:
        if not checked:
            raise
    form = _form(storage, checked[0], root)
    kind = bool(checked[0].head), checked[0].codec, checked[0].nbytes
    return form, list(takewhile(lambda offer: (bool(offer.head), offer.codec, offer.nbytes) == kind, checked))


def _form(storage: NodeStorage, offer: BlockOffer, root: BlockKey) -> BlockFormat:
    return (
        BlockFormat(0, offer.raw_bytes)
        if offer.head
        else storage.form_in_host(BlockFormat(offer.codec, offer.nbytes), offer.raw_bytes, root)
    )


def _check(storage: NodeStorage, key: BlockKey, offer: BlockOffer, root: BlockKey, nbytes: int) -> None:
    """Raise (kind `transport`, with a reason) unless an offer is of the block `key` below `root`, has `nbytes`, and is not too lossy."""
    if offer.raw_bytes != nbytes or offer.nbytes > nbytes + max(nbytes, FRAME_BYTES_MORE) or (offer.head and offer.nbytes != nbytes):
        raise refused("size", f"block {key.hex()}: {nbytes} bytes expected, a peer offers {offer.nbytes} for {offer.raw_bytes}")
    if not offer.head:
        return
    try:
        header = read_header(offer.head)
    except TieredKVError as error:
        raise refused("header", f"block {key.hex()}: {error}") from error
    if header.info.key != key:
        raise refused("key", f"block {key.hex()} expected, a peer offers {header.info.key.hex()}")
    if header.info.root != root:
        raise refused("root", f"block {key.hex()}: it belongs to another model than the one that was asked for")
    if (offer.codec, header.codec, header.nbytes, header.raw_bytes) != (0, 0, nbytes, nbytes):
        raise refused("size", f"block {key.hex()}: {nbytes} raw bytes expected, its header describes {header}")
    if not storage.allowance.admits(key, root, 0, header.error):
        storage.allowance.refuse(PEER, 1, 0)
        raise refused("too_lossy", f"block {key.hex()}: its error of {header.error:.2g} is larger than allowed here")


def damaged(key: BlockKey, why: str) -> TieredKVError:
    """Returns the error for a payload that does not match its offer."""
    log.warning("a block from a peer was refused, %s: %s", key.hex(), why)
    return TieredKVError(Kind.TRANSPORT, f"block {key.hex()} from a peer: {why}", reason="checksum", key=key)
