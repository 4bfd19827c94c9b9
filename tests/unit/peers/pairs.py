"""Channels between two threads of a test, without a network: the same keys on both sides, or a handshake over a socket pair."""

import socket
import threading
from collections.abc import Callable

from tiered_kv.errors import TieredKVError
from tiered_kv.protocol.peer_channel import Channel, Limit, PeerIdentity, answer_greeting, greet

SECRET = bytes(range(32))
KEYS = b"one way", b"the other"
PATIENCE_S = 30.0


def identity_of(name: str = "n0", cluster_id: str = "c0", secret: bytes = SECRET) -> PeerIdentity:
    return PeerIdentity(cluster_id, name, secret)


def within(wait_s: float = PATIENCE_S) -> Limit:
    return Limit.within(wait_s)


def channel_pair() -> tuple[Channel, Channel]:
    """Returns two connected channels, as after a handshake."""
    left, right = socket.socketpair()
    return Channel(left, "right", KEYS), Channel(right, "left", KEYS[::-1])


def shake_hands(
    caller: PeerIdentity, listener: PeerIdentity, wait_s: float = PATIENCE_S
) -> tuple[Channel | TieredKVError, Channel | TieredKVError]:
    """Returns what the handshake gives the caller and the listener. The caller needs TCP options, so the pair is a TCP pair."""
    left, right = tcp_pair()
    outcome: list[Channel | TieredKVError] = []
    thread = threading.Thread(target=lambda: outcome.append(tried(right, lambda: answer_greeting(right, listener, within(wait_s)))))
    thread.start()
    called = tried(left, lambda: greet(left, caller, within(wait_s)))
    thread.join(PATIENCE_S)
    return called, outcome[0]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    return left, right


def tried(connection: socket.socket, call: Callable[[], Channel]) -> Channel | TieredKVError:
    """Returns the result of a call, or its error; then the connection is closed."""
    try:
        return call()
    except TieredKVError as error:
        connection.close()
        return error
