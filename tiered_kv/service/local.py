"""Sessions over a unix socket: how a worker reaches the node actor of its machine, without Ray.

A message is a 4-byte length and msgpack: [method, arguments] there, [true, value] or [false, kind, text] back. A round
trip costs some 30 µs, a Ray call 700 µs (docs/design/002). The kernel closes the socket of a worker that dies, which
ends its session.
"""

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from typing import Any

import msgpack

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.service.session import Session

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
MESSAGE_BYTES_MAX = 64 << 20
CONNECTIONS_MAX = 1024
ACCEPT_AGAIN_S = 0.1
METHODS = frozenset({"introduce", "reserve", "commit", "release", "pull", "doubt", "bring", "hint", "locate", "probe", "stats"})


def _send(connection: socket.socket, message: object) -> None:
    body = msgpack.packb(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _receive(connection: socket.socket) -> object | None:
    """The next message, or None at the end of the stream."""
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MESSAGE_BYTES_MAX:
        raise TieredKVError(Kind.TRANSPORT, f"a message of {length} bytes is larger than {MESSAGE_BYTES_MAX}")
    body = _exactly(connection, length)
    return None if body is None else msgpack.unpackb(body)


def _exactly(connection: socket.socket, length: int) -> bytes | bytearray | None:
    body = connection.recv(length)
    if len(body) == length:
        return body
    whole = bytearray(body)
    while body and len(whole) < length:
        body = connection.recv(length - len(whole))
        whole += body
    return whole if len(whole) == length else None


class SessionServer:
    """Serves sessions on the socket at `path`, one thread a worker, until `close`; calls `afterwards` behind each answer."""

    def __init__(self, path: str, open_session: Callable[[], Session], afterwards: Callable[[], None] = lambda: None) -> None:
        self._open_session = open_session
        self._afterwards = afterwards
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._closing = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if os.path.exists(path):
            os.unlink(path)
        try:
            self._listener.bind(path)
        except OSError as error:
            self._listener.close()
            raise TieredKVError(
                Kind.MEMORY, f"shm_path: cannot make a socket at {path} ({error}); a shorter path may help", path=path
            ) from error
        os.chmod(path, 0o600)
        self._listener.listen(128)
        self._acceptor = threading.Thread(target=self._accept, name="tkv-accept", daemon=True)
        self._acceptor.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closing:
                    log.warning("a worker could not be let in: %s", error)  # no descriptors left, for a while
                    time.sleep(ACCEPT_AGAIN_S)
                continue
            with self._lock:
                if len(self._connections) >= CONNECTIONS_MAX:
                    connection.close()
                    continue
                self._connections.add(connection)
                thread = threading.Thread(target=self._serve, args=(connection,), name="tkv-session", daemon=True)
                self._threads.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with closing(self._open_session()) as session:
                while (message := _receive(connection)) is not None:
                    _send(connection, self._answer(session, message))
                    self._afterwards()
        except (OSError, TieredKVError, ValueError) as error:
            log.info("a worker's session ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())
            connection.close()

    @staticmethod
    def _answer(session: Session, message: object) -> list:
        """Boundary: whatever one request meets, the session goes on and the worker hears of it."""
        try:
            method, arguments = message
            if method not in METHODS:
                raise TieredKVError(Kind.TRANSPORT, f"unknown request {method!r}")
            return [True, getattr(session, method)(*arguments)]
        except TieredKVError as error:
            return [False, error.kind.value, str(error)]
        except Exception as error:
            log.exception("a request of a worker failed")
            return [False, Kind.TRANSPORT.value, f"the node failed: {type(error).__name__}: {error}"]

    def close(self) -> None:
        """Stop listening, end all sessions, and wait for their threads."""
        self._closing = True
        with suppress(OSError):  # not connected, says the kernel; the accept below it ends all the same
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._acceptor.join()
        with self._lock:
            threads = list(self._threads)
            for connection in self._connections:
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


class SocketSession:
    """A worker's end of a session: the same calls as `Session`. Not for two threads at once."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(timeout_s)
        try:
            self._connection.connect(path)
        except OSError as error:
            self._connection.close()
            raise TieredKVError(Kind.TRANSPORT, f"the node at {path} does not answer ({error})", path=path) from error

    def _call(self, method: str, *arguments: object, wait_s: float = 0.0) -> object:
        try:
            self._connection.settimeout(self._timeout_s + wait_s)
            _send(self._connection, [method, arguments])
            answer = _receive(self._connection)
        except (OSError, ValueError, TieredKVError) as error:
            self.close()
            raise TieredKVError(Kind.TRANSPORT, f"the node did not answer {method!r} ({error})", method=method) from error
        if answer is None:
            self.close()
            raise TieredKVError(Kind.TRANSPORT, f"the node went away during {method!r}", method=method)
        if not answer[0]:
            raise TieredKVError(Kind(answer[1]), answer[2], method=method)
        return answer[1]

    def reserve(self, nbytes: int, keys: list[BlockKey], tail: BlockKey | None) -> list[int]:
        return self._call("reserve", nbytes, keys, tail)

    def introduce(self, root: BlockKey, facts: dict[str, Any]) -> dict[str, Any]:
        return self._call("introduce", root, facts)

    def commit(self, root: BlockKey, nbytes: int, blocks: list[tuple[BlockKey, BlockKey | None, int, int]]) -> list[bool]:
        return self._call("commit", root, nbytes, blocks)

    def release(self, offsets: list[int]) -> None:
        self._call("release", offsets)

    def pull(self, root: BlockKey, nbytes: int, tail: BlockKey | None, keys: list[BlockKey], depth: int, wait_s: float) -> int:
        return self._call("pull", root, nbytes, tail, keys, depth, wait_s, wait_s=wait_s)

    def doubt(self, keys: list[BlockKey]) -> None:
        self._call("doubt", keys)

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        self._call("bring", keys, wait_s, wait_s=wait_s)

    def hint(self, tail: BlockKey, answer_tokens: int | None, pinned_s: float | None, reuse_within_s: float | None, ended: bool) -> None:
        self._call("hint", tail, answer_tokens, pinned_s, reuse_within_s, ended)

    def locate(self, keys: list[BlockKey]) -> list[list[str]]:
        return self._call("locate", keys)

    def probe(self, root: BlockKey, probe: Sequence[Any]) -> str:
        return self._call("probe", root, probe)

    def stats(self) -> dict:
        return self._call("stats")

    def close(self) -> None:
        self._connection.close()
