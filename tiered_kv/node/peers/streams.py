"""A node's connections to its peers. A connection serves one exchange at a time, and is then kept for the next."""

import socket
import threading
import time
from collections import defaultdict

from tiered_kv import forking
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.peer_address import parse_address
from tiered_kv.protocol.peer_channel import Channel, Limit, PeerIdentity, greet, refused

IDLE_MAX = 8
"""The most idle connections to one address that are kept for later requests."""
CONNECT_WITHIN_S = 1.0


class Streams:
    """Authenticated connections to other processes of the cluster, by address. Thread-safe."""

    def __init__(self, own: PeerIdentity) -> None:
        self._own = own
        self._idle: defaultdict[str, list[Channel]] = defaultdict(list)
        self._busy: set[Channel] = set()
        self._lock = threading.Lock()
        self._closed = False
        forking.register(self)

    def after_fork(self) -> None:
        """Close the child's copies of the connections."""
        for channel in [*self._busy, *(each for idle in self._idle.values() for each in idle)]:
            channel.close()
        self._lock, self._closed = threading.Lock(), True

    def take(self, address: str, limit: Limit) -> Channel:
        """Returns an idle connection, or a new one. End its use with `give_back` or `drop`.

        Raises (kind `transport`; reason `connect` if nobody answers at the address) if none can be opened within CONNECT_WITHIN_S.
        """
        while (channel := self._kept(address)) is not None:
            if channel.is_idle():
                return channel
            self.drop(channel)
        channel = self._opened(address, Limit(min(limit.until_s, time.monotonic() + CONNECT_WITHIN_S), limit.patience_s))
        with self._lock:
            if not self._closed:
                self._busy.add(channel)
                return channel
        channel.close()
        raise TieredKVError(Kind.CLOSED, "the node is closing")

    def _kept(self, address: str) -> Channel | None:
        with self._lock:
            channel = self._idle[address].pop() if self._idle[address] and not self._closed else None
            if channel is not None:
                self._busy.add(channel)
            return channel

    def _opened(self, address: str, limit: Limit) -> Channel:
        try:
            connection = socket.create_connection(parse_address(address), limit.wait_s())
        except OSError as error:
            raise refused("connect", f"nobody answers at {address}: {error}") from error
        try:
            return greet(connection, self._own, limit)
        except BaseException:
            connection.close()
            raise

    def give_back(self, address: str, channel: Channel) -> None:
        """Keep a connection whose last exchange is complete."""
        with self._lock:
            self._busy.discard(channel)
            if not self._closed and len(self._idle[address]) < IDLE_MAX:
                self._idle[address].append(channel)
                return
        channel.close()

    def drop(self, channel: Channel) -> None:
        """Close a connection whose exchange failed."""
        with self._lock:
            self._busy.discard(channel)
        channel.close()

    def close(self) -> None:
        """Close all connections. Exchanges under way fail at once."""
        with self._lock:
            self._closed = True
            busy, idle = list(self._busy), [each for channels in self._idle.values() for each in channels]
            self._idle.clear()
        for channel in busy:
            channel.shut()
        for channel in idle:
            channel.close()
