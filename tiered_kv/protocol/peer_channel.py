"""The authenticated stream between two processes of a cluster: a handshake, then messages, each with or without payload bytes after it.

A message is a 4-byte length, its body (msgpack) and 16 bytes of HMAC-SHA256 over its number and its body. Each side has a key of its own,
derived from the cluster's secret and both sides' random numbers. So a message that was changed, left out, repeated or moved ends the
connection. Payload bytes are not authenticated here: the message before them contains their checksum, which the receiver verifies.

The handshake is one message each way, then the caller's proof. Neither side sends anything else before the other side has proved that
it knows the secret. Nothing is encrypted: see TLS in docs/design/031.
"""

import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgpack

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.unpacking import unpacked

PEER_PROTOCOL = 2
MAGIC = "tiered_kv peer"
NONCE_BYTES = 32
MAC_BYTES = 16
GREETING_BYTES_MAX = 1024
MESSAGE_BYTES_MAX = 16 << 20
ITEMS_MAX = 1 << 19  # keys of 32 bytes in a message
BUFFER_BYTES = 16 << 10
PIECE_BYTES = 256 << 10
"""A payload is received in pieces of this size, so that each is hashed while it is in the processor's cache."""
NEAR_S = 0.005  # the kernel's limit of a call may differ by this much
BOUND_S_MAX = 3600.0
BUFFERS_AT_ONCE = 512  # below the kernel's limit for one call

_LENGTH = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")


class PeerIdentity(NamedTuple):
    """The identity that a process proves to its peers. `name`: the process's name in their figures. `secret`: the cluster's secret."""

    cluster_id: str
    name: str
    secret: bytes


class Limit:
    """The time by which an exchange must end, and how long it may pause until then.

    `until_s`: on the monotonic clock. `patience_s`: the longest wait for the next byte.
    """

    __slots__ = ("patience_s", "until_s")

    def __init__(self, until_s: float, patience_s: float = float("inf")) -> None:
        self.until_s = until_s
        self.patience_s = patience_s

    @classmethod
    def within(cls, wait_s: float, patience_s: float = float("inf")) -> "Limit":
        """Returns a limit of `wait_s` from now."""
        return cls(time.monotonic() + wait_s, patience_s)

    def wait_s(self) -> float:
        """Returns how long to wait for the next byte. Raises `TimeoutError` if the time is over."""
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the time is over")
        return min(left_s, self.patience_s)


def refused(reason: str, message: str, **context: object) -> TieredKVError:
    """Returns the error (kind `transport`) for a peer, a message or a block that is refused. `reason`: one word, for the figures."""
    return TieredKVError(Kind.TRANSPORT, message, reason=reason, **context)


class Channel:
    """One end of an authenticated connection. One thread at a time may use it. `peer`: the other side's name.

    Every method raises `TieredKVError` (kind `transport`, with a `reason`) if the stream is damaged or its limit has passed; the
    channel cannot be used afterwards, and must be closed.
    """

    def __init__(self, connection: socket.socket, peer: str, keys: tuple[bytes, bytes]) -> None:
        self._connection = connection
        self.peer = peer
        self._send_key, self._receive_key = keys
        self._sent = self._received = 0
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._start = self._end = 0  # of the bytes in the buffer that are not used yet
        self._bounds: dict[int, float] = {}
        connection.setblocking(True)

    # Sending

    def send(self, message: object, limit: Limit, payload: Sequence[memoryview] = ()) -> None:
        """Send a message, then the bytes of `payload`, straight from their memory."""
        body = msgpack.packb(message)
        code = _code(self._send_key, self._sent, body)
        self._sent += 1
        self.send_bytes([memoryview(_LENGTH.pack(len(body)) + body + code), *payload], limit)

    def send_bytes(self, buffers: Sequence[memoryview], limit: Limit) -> None:
        """Send buffers one after the other, without a copy in this process."""
        left = [buffer for buffer in buffers if buffer.nbytes]
        try:
            while left:
                self._bound(socket.SO_SNDTIMEO, limit.wait_s())
                sent = self._connection.sendmsg(left[:BUFFERS_AT_ONCE])
                done = 0
                while done < len(left) and sent >= left[done].nbytes:
                    sent -= left[done].nbytes
                    done += 1
                del left[:done]
                if sent:
                    left[0] = left[0][sent:]
        except OSError as error:
            raise _broken(error) from error

    def send_file(self, fd: int, offset: int, nbytes: int, limit: Limit) -> None:
        """Send `nbytes` of a file from `offset` on, without a copy in this process."""
        end = offset + nbytes
        try:
            while offset < end:
                self._bound(socket.SO_SNDTIMEO, limit.wait_s())
                sent = os.sendfile(self._connection.fileno(), fd, offset, end - offset)
                if not sent:
                    raise refused("short", f"the file ended {end - offset} bytes too early")
                offset += sent
        except OSError as error:
            raise _broken(error) from error

    def _bound(self, direction: int, wait_s: float) -> None:
        """Have the kernel end a call that waits longer than `wait_s`. A call that has moved some bytes by then returns their number.

        The socket stays in blocking mode, in which one call moves a whole payload. In non-blocking mode, as with Python's timeouts,
        a sender would wake up for each part of the payload that the receiver has taken, and use twice the processor time.
        """
        wait_s = min(wait_s, BOUND_S_MAX)
        if abs(self._bounds.get(direction, float("inf")) - wait_s) > NEAR_S:
            self._bounds[direction] = wait_s
            self._connection.setsockopt(socket.SOL_SOCKET, direction, _timeval(self._bounds[direction]))

    # Receiving

    def next(self, limit: Limit) -> Any:
        """Returns the next message. Raises with the reason `closed` at the end of the stream."""
        length: int = _LENGTH.unpack(self._take(_LENGTH.size, limit))[0]
        if length > MESSAGE_BYTES_MAX:
            raise refused("length", f"a message must be at most {MESSAGE_BYTES_MAX} bytes, got {length}")
        signed = self._take(length + MAC_BYTES, limit)
        body = signed[:length]
        if not hmac.compare_digest(signed[length:], _code(self._receive_key, self._received, body)):
            raise refused("mac", f"message {self._received} from {self.peer} was changed, repeated or moved")
        self._received += 1
        try:
            return unpacked(body, items_max=ITEMS_MAX, depth_max=0)
        except ValueError as error:
            raise refused("message", f"a message from {self.peer} cannot be read: {error}") from error

    def requests(self, idle_s: float) -> Iterator[Any]:
        """Yields the messages of a peer that asks, until none has come for `idle_s`. Raises as `next` for any other end."""
        while True:
            try:
                message = self.next(Limit.within(idle_s))
            except TieredKVError as error:
                if error.context.get("reason") == "timeout":
                    return
                raise
            yield message

    def receive_into(self, target: memoryview, limit: Limit, update: Callable[[memoryview], object] | None = None) -> None:
        """Receive exactly the bytes of `target`, straight into its memory. `update`: called with each piece after it has arrived."""
        got, size = 0, target.nbytes
        if self._start < self._end:
            got = min(self._end - self._start, size)
            target[:got] = self._buffer[self._start : self._start + got]
            self._start += got
            if update:
                update(target[:got])
        while got < size:
            count = self._receive(target[got : got + PIECE_BYTES], limit)
            if update:
                update(target[got : got + count])
            got += count

    def _take(self, nbytes: int, limit: Limit) -> bytes:
        """Returns the next `nbytes` of the stream."""
        if self._end - self._start < nbytes <= BUFFER_BYTES:
            have = self._end - self._start
            self._buffer[:have] = self._buffer[self._start : self._end]
            self._start, self._end = 0, have
            while self._end < nbytes:
                self._end += self._receive(self._buffer[self._end :], limit)
        if nbytes <= BUFFER_BYTES:
            self._start += nbytes
            return bytes(self._buffer[self._start - nbytes : self._start])
        whole = bytearray(nbytes)
        self.receive_into(memoryview(whole), limit)
        return bytes(whole)

    def _receive(self, target: memoryview, limit: Limit) -> int:
        try:
            self._bound(socket.SO_RCVTIMEO, limit.wait_s())
            count = self._connection.recv_into(target)
        except OSError as error:
            raise _broken(error) from error
        if not count:
            raise refused("closed", f"{self.peer} closed the connection")
        return count

    def is_idle(self) -> bool:
        """Returns whether the connection is open and has no unread bytes. Between two exchanges, unread bytes would be an error."""
        if self._start < self._end:
            return False
        try:
            self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def shut(self) -> None:
        """End the stream in both directions. A thread that uses the channel then gets an error. Any thread may call this."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def greet(connection: socket.socket, own: PeerIdentity, limit: Limit) -> Channel:
    """Carry out the caller's side of the handshake. Returns the channel. Raises (kind `transport`, with a reason) if a side refuses."""
    tune(connection)
    hello = msgpack.packb([MAGIC, PEER_PROTOCOL, own.cluster_id, own.name, os.urandom(NONCE_BYTES)])
    _send_greeting(connection, hello, limit)
    answer = _greeting(connection, limit)
    signed, proof = _split_answer(answer)
    reason, peer, said = _read_answer(signed)
    if reason:
        raise refused(reason, f"the peer refuses this connection: {said}", refused_by_peer=True)
    script = hashlib.sha256(hello + signed).digest()
    if not hmac.compare_digest(proof, _proof(own.secret, b"answering", script)):
        raise refused("secret", f"{peer} does not know this cluster's secret")
    _send_greeting(connection, _proof(own.secret, b"calling", script), limit)
    ours, theirs = _proof(own.secret, b"from the caller", script), _proof(own.secret, b"to the caller", script)
    return Channel(connection, peer, (ours, theirs))


def answer_greeting(connection: socket.socket, own: PeerIdentity, limit: Limit) -> Channel:
    """Carry out the listener's side of the handshake. Returns the channel.

    Raises (kind `transport`, with a reason) if it refuses the caller.
    """
    tune(connection)
    hello = _greeting(connection, limit)
    reason, said, peer = _judge(hello, own)
    signed = msgpack.packb([MAGIC, PEER_PROTOCOL, reason, own.name if not reason else said, os.urandom(NONCE_BYTES)])
    script = hashlib.sha256(hello + signed).digest()
    if reason:
        _send_greeting(connection, signed + bytes(hashlib.sha256().digest_size), limit)
        raise refused(reason, f"a connection is refused: {said}")
    _send_greeting(connection, signed + _proof(own.secret, b"answering", script), limit)
    if not hmac.compare_digest(_greeting(connection, limit), _proof(own.secret, b"calling", script)):
        raise refused("secret", f"{peer} does not know this cluster's secret")
    ours, theirs = _proof(own.secret, b"to the caller", script), _proof(own.secret, b"from the caller", script)
    return Channel(connection, peer, (ours, theirs))


def tune(connection: socket.socket) -> None:
    """Set the options of a connection: send small messages at once, and notice a machine that is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def _judge(hello: bytes, own: PeerIdentity) -> tuple[str, str, str]:
    """Returns the reason to refuse a caller ("" for none), a sentence about it, and the caller's name."""
    try:
        magic, version, cluster_id, name, nonce = unpacked(hello)
    except (ValueError, TypeError):
        magic = version = cluster_id = name = nonce = None
    if magic != MAGIC or not isinstance(name, str) or not isinstance(nonce, bytes) or len(nonce) != NONCE_BYTES:
        return "greeting", "it did not begin as a peer of tiered_kv does", "?"
    if version != PEER_PROTOCOL:
        return "version", f"both sides must speak one version of the peer protocol, got {version} and {PEER_PROTOCOL}", name
    if cluster_id != own.cluster_id:
        return "cluster", "it belongs to another cluster", name
    return "", "", name


def _split_answer(answer: bytes) -> tuple[bytes, bytes]:
    size = hashlib.sha256().digest_size
    return answer[:-size], answer[-size:]


def _read_answer(signed: bytes) -> tuple[str, str, str]:
    """Returns the listener's reason to refuse ("" if it does not), then twice its name, or a sentence about the reason if it refuses."""
    try:
        magic, version, reason, name, nonce = unpacked(signed)
    except (ValueError, TypeError) as error:
        raise refused("greeting", "the peer did not answer as a peer of tiered_kv does") from error
    if magic != MAGIC or not (isinstance(reason, str) and isinstance(name, str) and isinstance(nonce, bytes)) or len(nonce) != NONCE_BYTES:
        raise refused("greeting", "the peer did not answer as a peer of tiered_kv does")
    if version != PEER_PROTOCOL and not reason:
        raise refused("version", f"both sides must speak one version of the peer protocol, got {PEER_PROTOCOL} and {version}")
    return reason, name, name


def _send_greeting(connection: socket.socket, body: bytes, limit: Limit) -> None:
    try:
        connection.settimeout(limit.wait_s())
        connection.sendall(_LENGTH.pack(len(body)) + body)
    except OSError as error:
        raise _broken(error) from error


def _greeting(connection: socket.socket, limit: Limit) -> bytes:
    """Returns the next message of a handshake. Reads no byte beyond it."""
    length: int = _LENGTH.unpack(_exactly(connection, _LENGTH.size, limit))[0]
    if not hashlib.sha256().digest_size <= length <= GREETING_BYTES_MAX:
        raise refused("greeting", f"a greeting has at most {GREETING_BYTES_MAX} bytes, got {length}")
    return _exactly(connection, length, limit)


def _exactly(connection: socket.socket, nbytes: int, limit: Limit) -> bytes:
    got = b""
    try:
        while len(got) < nbytes:
            connection.settimeout(limit.wait_s())
            more = connection.recv(nbytes - len(got))
            if not more:
                raise refused("closed", "the connection was closed during the handshake")
            got += more
    except OSError as error:
        raise _broken(error) from error
    return got


def _code(key: bytes, number: int, body: bytes) -> bytes:
    return hmac.digest(key, _NUMBER.pack(number) + body, "sha256")[:MAC_BYTES]


def _proof(secret: bytes, label: bytes, script: bytes) -> bytes:
    return hmac.digest(secret, label + b"\0" + script, "sha256")


def _timeval(seconds: float) -> bytes:
    """Returns a `struct timeval` of at least a microsecond, because 0 would mean no limit."""
    whole = int(seconds)
    return struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), 1))


def _broken(error: OSError) -> TieredKVError:
    timed_out = isinstance(error, TimeoutError | BlockingIOError)
    words = "timed out" if timed_out else str(error)
    return TieredKVError(Kind.TRANSPORT, f"the connection to a peer failed: {words}", reason="timeout" if timed_out else "closed")
