"""Look-ups in the coordinator's directory over a stream, without Ray."""

import time
from typing import Any

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.peers.figures import COORDINATOR, PeerFigures
from tiered_kv.node.peers.streams import Streams
from tiered_kv.protocol.peer_channel import Limit, refused

TRY_S_MAX = 0.25
"""The longest time that a look-up waits for the stream before it uses the other link. At most half of the look-up's time."""
PAUSE_S = 5.0
"""After a failed look-up, streams are not tried for this long, or until the directory has another address."""
KEYS_MAX = 1 << 16

Located = tuple[list[list[str]], dict[str, str]]
"""The holders of each leading key, and the addresses of their streams."""


class Lookups:
    """Asks the directory over streams. Thread-safe."""

    def __init__(self, streams: Streams, figures: PeerFigures) -> None:
        self._streams = streams
        self._figures = figures
        self._address: str | None = None
        self._paused_until_s = float("-inf")

    def use(self, address: str | None) -> None:
        """Send look-ups to this address from now on. With None, send none."""
        if address != self._address:
            self._address, self._paused_until_s = address, float("-inf")

    def locate(self, keys: list[BlockKey], wait_s: float) -> Located | None:
        """Returns the nodes that hold each leading key, and these nodes' addresses; None if no stream to the directory works now."""
        address, now_s = self._address, time.monotonic()
        if address is None or now_s < self._paused_until_s:
            return None
        limit = Limit.within(min(wait_s / 2, TRY_S_MAX))
        channel = None
        try:
            channel = self._streams.take(address, limit)
            channel.send(["locate", keys], limit)
            located = _located_in(channel.next(limit), len(keys))
        except TieredKVError as error:
            if channel is not None:
                self._streams.drop(channel)
            if error.kind is not Kind.CLOSED:
                self._figures.failed(COORDINATOR, error)
            self._paused_until_s = time.monotonic() + PAUSE_S
            return None
        self._streams.give_back(address, channel)
        self._figures.located()
        return located


def _located_in(message: Any, count: int) -> Located:
    """Returns the holders and addresses in the directory's answer, which lists runs of [number of keys, holders].

    Raises (kind `transport`) for an invalid answer.
    """
    match message:
        case ["located", list() as runs, dict() as addresses] if all(map(_is_run, runs)) and _are_addresses(addresses):
            holders = [names for number, names in runs for _ in range(number)]
            if len(holders) <= count:
                return holders, addresses
    raise refused("unexpected", f"the directory must answer with nodes, got {str(message)[:100]}")


def _is_run(run: Any) -> bool:
    match run:
        case [int() as number, list() as names] if 0 < number <= KEYS_MAX:
            return bool(names) and all(isinstance(name, str) for name in names)
    return False


def _are_addresses(addresses: dict[Any, Any]) -> bool:
    return all(isinstance(node, str) and isinstance(address, str) for node, address in addresses.items())
