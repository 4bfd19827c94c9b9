"""Serves a node's blocks to its peers over streams.

Payloads are sent straight from the arena or from a disk segment; the blocks are pinned meanwhile. The peer verifies them: raw blocks by
the seal in their header, frames by their own checksum.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from tiered_kv.blocks import Location, Tier
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.node.peers.figures import PeerFigures
from tiered_kv.protocol.peer_channel import Channel, Limit, refused
from tiered_kv.protocol.peer_transport import BlockOffer
from tiered_kv.tiers.disk.segments import FilePart

if TYPE_CHECKING:
    from tiered_kv.node.node import Node

BATCH_BYTES = 8 << 20
"""The most payload bytes that one message announces. A larger block is a batch of its own."""
BATCH_BLOCKS = 128
FIRST_BLOCKS = 8  # in the first batch of a run, before the size of its blocks is known
IDLE_S = 60.0
"""How long an unused connection stays open."""
SERVE_S_MAX = 60.0
STALLED_AFTER_S = 5.0
"""A transfer of which the peer accepts no byte for this long fails, because blocks are pinned for it."""
KEYS_MAX = 1 << 16


class Item(NamedTuple):
    """A block to send: its offer, and its payload in memory or in a file."""

    offer: BlockOffer
    payload: Sequence[memoryview] | FilePart


class BlockServer:
    """Answers the requests of peers. `serve` runs on a thread of the listener for each connection."""

    def __init__(self, node: "Node", figures: PeerFigures) -> None:
        self._node = node
        self._figures = figures

    def serve(self, channel: Channel) -> None:
        """Answer one peer until it closes the connection, is idle for IDLE_S, or sends an invalid request."""
        for message in channel.requests(IDLE_S):
            name, arguments = _checked(message)
            if name == "doubt":
                self._node.doubt(*arguments)
            else:
                self._send_run(channel, *arguments)

    def _send_run(self, channel: Channel, wait_s: float, keys: list[BlockKey]) -> None:
        limit = Limit.within(min(wait_s, SERVE_S_MAX), STALLED_AFTER_S)
        sent, count = 0, FIRST_BLOCKS
        while sent < len(keys):
            with self._node.pinned(keys[sent : sent + count]) as here, ExitStack() as lent:
                items = list(self._items(here, lent))
                if not items:
                    break
                self._send(channel, items, limit)
            sent += len(items)
            nbytes = max(item.offer.nbytes for item in items)
            count = max(1, min(BATCH_BYTES // nbytes, BATCH_BLOCKS))
        if sent < len(keys):
            channel.send(["end"], limit)

    def _send(self, channel: Channel, items: Sequence[Item], limit: Limit) -> None:
        """Send one batch: the offers, then the payloads."""
        memory: list[memoryview] = []
        message = ["blocks", [tuple(item.offer) for item in items]]
        is_announced = False

        def flush() -> None:
            nonlocal is_announced, memory
            if is_announced:
                channel.send_bytes(memory, limit)
            else:
                channel.send(message, limit, memory)
            is_announced, memory = True, []

        for item in items:
            if isinstance(item.payload, FilePart):
                flush()
                channel.send_file(*item.payload, limit)
            else:
                memory += item.payload
        flush()
        self._figures.served(len(items), sum(item.offer.nbytes for item in items))

    def _items(self, here: Sequence[tuple[BlockKey, BlockKey | None, Location]], lent: ExitStack) -> Iterator[Item]:
        """Yields the leading blocks that can be sent, about BATCH_BYTES in all. `lent` keeps their segments' files open until it exits."""
        nbytes = 0
        for key, root, location in here:
            item = self._item(key, root, location, lent)
            if item is None:
                return
            yield item
            nbytes += item.offer.nbytes
            if nbytes >= BATCH_BYTES:
                return

    def _item(self, key: BlockKey, root: BlockKey | None, location: Location, lent: ExitStack) -> Item | None:
        storage = self._node.storage
        if location.tier is Tier.HOST:
            head = storage.sealed_header(key, location)
            if head is None:
                return None
            memory = storage.host.headers.bytes[location.offset : location.offset + location.stored_bytes]
            return Item(BlockOffer(location.stored_bytes, location.raw_bytes, location.codec, head), [memory])
        if location.tier is Tier.DISK and storage.disk is not None:
            try:
                part = lent.enter_context(storage.disk.lend(location))
            except TieredKVError:
                return None
            return Item(BlockOffer(location.stored_bytes, location.raw_bytes, location.codec), part)
        pieces = next(storage.frames([(key, root, location)]), None)
        if pieces is None:
            return None
        views = [memoryview(piece).cast("B") for piece in pieces]
        return Item(BlockOffer(sum(view.nbytes for view in views), location.raw_bytes, location.codec), views)


def _checked(message: Any) -> tuple[str, tuple[Any, ...]]:
    """Returns the name and the arguments of a request. Raises (kind `transport`) if the message is not a valid request."""
    match message:
        case ["get", float() | int() as wait_s, [*keys]] if 0 <= wait_s < float("inf") and len(keys) <= KEYS_MAX and _are_keys(keys):
            return "get", (wait_s, keys)
        case ["doubt", [*keys]] if len(keys) <= BATCH_BLOCKS and _are_keys(keys):
            return "doubt", (keys,)
    raise refused("unexpected", f"a peer must ask for blocks, got {str(message)[:100]}")


def _are_keys(keys: list[Any]) -> bool:
    return all(type(key) is bytes and len(key) == KEY_BYTES for key in keys)
