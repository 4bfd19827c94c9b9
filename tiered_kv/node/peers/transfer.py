"""The transfer of a run of blocks over a stream from a peer.

A request names all the keys of a run. The peer answers with batches, each a message with offers and the payloads after it. If it does
not have all the blocks, a message ends the run. Each payload is received straight into the memory that was reserved for its block.
"""

import time
from collections.abc import Callable
from typing import Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.peers.figures import PeerFigures, reason_of
from tiered_kv.node.peers.streams import Streams
from tiered_kv.protocol.peer_channel import Channel, Limit, refused
from tiered_kv.protocol.peer_transport import HUNG_AFTER_S, BlockOffer, Receiver
from tiered_kv.tiers.host import HEADER_BYTES

NOT_A_PEER = frozenset({"connect", "secret", "version", "cluster", "greeting", "busy"})
"""Reasons why no stream to the peer can be opened. After an error with one of them, the puller may retry over the other link."""


class StreamTransfer:
    """Implements `Transfer`: blocks of one run from the peer `node` at `address`. `on_unreachable`: called if no stream can be opened."""

    def __init__(
        self,
        streams: Streams,
        figures: PeerFigures,
        node: str,
        address: str,
        keys: list[BlockKey],
        on_unreachable: Callable[[], None] = lambda: None,
    ) -> None:
        self._streams = streams
        self._figures = figures
        self._node = node
        self._address = address
        self._keys = keys
        self._on_unreachable = on_unreachable
        self._stored = 0
        self._nbytes = 0

    def prefetch(self) -> None:
        pass

    def deliver(self, receiver: Receiver, wait_s: float, patience_s: float, meanwhile: Callable[[], None]) -> int:
        begun_s = time.monotonic()
        limit = Limit(begun_s + wait_s, patience_s)
        channel, is_whole = None, False
        meanwhile()
        try:
            channel = self._streams.take(self._address, limit)
            channel.send(["get", wait_s, self._keys], limit)
            receiver.expect(self._keys)
            while self._stored < len(self._keys) and (offers := self._next(channel, limit)):
                self._receive(channel, offers, receiver, limit)
            self._streams.give_back(self._address, channel)
            is_whole = True
        except BaseException as error:
            if channel is not None:
                self._streams.drop(channel)
            if isinstance(error, TieredKVError):
                self._note(error, time.monotonic() - begun_s)
            raise
        finally:
            receiver.expect(())
            self._figures.fetched(self._node, self._stored, self._nbytes, time.monotonic() - begun_s, is_whole=is_whole)
        return self._stored

    def _next(self, channel: Channel, limit: Limit) -> list[BlockOffer]:
        """Returns the offers of the next batch; [] at the end of the run. Raises (kind `transport`) for anything else."""
        offers = _offers_in(channel.next(limit))
        if len(offers) > len(self._keys) - self._stored:
            raise refused("unexpected", f"{self._node} must send at most the blocks that it was asked for, got {len(offers)} more")
        return offers

    def _receive(self, channel: Channel, offers: list[BlockOffer], receiver: Receiver, limit: Limit) -> None:
        while offers:
            landing = receiver.land(self._keys[self._stored :], offers)
            try:
                for target in landing.targets:
                    channel.receive_into(target.memory, limit, target.update)
                done = landing.commit()
            finally:
                landing.abandon()
            self._stored += done
            self._nbytes += sum(offer.nbytes for offer in offers[:done])
            if done < len(landing.targets):
                raise refused("no_room", f"only {self._stored} of {len(self._keys)} blocks have room", own_fault=True)
            offers = offers[done:]

    def _note(self, error: TieredKVError, took_s: float) -> None:
        """Count a failure, and add to the error's context what the puller needs to react to it."""
        if error.context.get("own_fault") or error.kind is Kind.CLOSED:
            return
        self._figures.failed(self._node, error)
        reason = reason_of(error)
        if reason in NOT_A_PEER:
            self._on_unreachable()
            error.context["other_way"] = True
        if reason == "timeout":
            error.context["hung"] = took_s >= HUNG_AFTER_S
        if reason == "checksum":
            self._doubt(error.context.get("key"))

    def _doubt(self, key: object) -> None:
        """Report to the peer that a block arrived damaged, so that the peer examines its copy. A failure to do so is ignored."""
        limit = Limit.within(HUNG_AFTER_S)
        channel = None
        try:
            channel = self._streams.take(self._address, limit)
            channel.send(["doubt", [key]], limit)
            self._streams.give_back(self._address, channel)
        except TieredKVError:
            if channel is not None:
                self._streams.drop(channel)


def _offers_in(message: Any) -> list[BlockOffer]:
    """Returns the offers in a peer's message; [] for the end of a run. Raises (kind `transport`) if it is neither."""
    if isinstance(message, list) and message[:1] == ["end"]:
        return []
    try:
        name, rows = message
        offers = [BlockOffer(*row) for row in rows]
        is_valid = name == "blocks" and len(offers) > 0 and all(map(_is_valid, offers))
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise refused("unexpected", f"a peer must send blocks or an end, got {str(message)[:100]}")
    return offers


def _is_valid(offer: BlockOffer) -> bool:
    numbers = (offer.nbytes, offer.raw_bytes, offer.codec)
    are_whole = all(type(number) is int and 0 <= number < 1 << 32 for number in numbers)
    return are_whole and offer.nbytes > 0 and type(offer.head) is bytes and len(offer.head) in (0, HEADER_BYTES)
