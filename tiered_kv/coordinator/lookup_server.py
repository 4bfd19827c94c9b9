"""Answers look-ups of the directory over authenticated streams, without Ray."""

import socket
from itertools import groupby
from typing import Any

from tiered_kv.coordinator.coordinator import Coordinator
from tiered_kv.keys import KEY_BYTES, BlockKey
from tiered_kv.protocol.peer_channel import Channel, Limit, PeerIdentity, refused
from tiered_kv.protocol.peer_listener import PeerListener

IDLE_S = 600.0
ANSWER_WITHIN_S = 5.0
KEYS_MAX = 1 << 16


class LookupServer:
    """Listens on `listener`, with one thread for each calling node. An answer leaves out the calling node, whose name is in its
    handshake.
    """

    def __init__(self, coordinator: Coordinator, own: PeerIdentity, listener: socket.socket) -> None:
        self._coordinator = coordinator
        self._listener = PeerListener(listener, own)
        self.address = self._listener.address
        """The address at which nodes reach this server, as "HOST:PORT"."""
        self._listener.start(self._serve)

    def _serve(self, channel: Channel) -> None:
        for message in channel.requests(IDLE_S):
            channel.send(self._answer(channel.peer, message), Limit.within(ANSWER_WITHIN_S))

    def _answer(self, asking: str, message: Any) -> list[Any]:
        keys = _keys_in(message)
        holders = self._coordinator.locate(asking, keys)
        names = {name for names in holders for name in names}
        runs = [[len(list(run)), names] for names, run in groupby(holders)]
        return ["located", runs, self._coordinator.addresses_of(names)]

    @property
    def refusals(self) -> dict[str, int]:
        """The number of callers that were refused, by reason."""
        return dict(self._listener.refusals)

    def close(self) -> None:
        """End all streams."""
        self._listener.close()


def _keys_in(message: Any) -> list[BlockKey]:
    match message:
        case ["locate", [*keys]] if len(keys) <= KEYS_MAX and all(type(key) is bytes and len(key) == KEY_BYTES for key in keys):
            return keys
    raise refused("unexpected", f"a node must ask for keys, got {str(message)[:100]}")
