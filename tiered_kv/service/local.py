"""Sessions over a unix socket: how a worker reaches the node actor of its machine, without Ray.

A message is a 4-byte length and msgpack: [number, method, arguments] there, [number, true, value] or [number, false, kind,
text] back. The first request is `hello`. A worker checks each answer (`answers`), and closes the session when one is not
what was asked for. A round trip costs some 30 µs, a Ray call 700 µs (docs/design/002). The kernel closes the socket of a
worker that dies, which ends its session.
"""

import itertools
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

from tiered_kv import forking
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.service import answers
from tiered_kv.service.session import PROTOCOL, Life, Session

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
MESSAGE_BYTES_MAX = 64 << 20
CONNECTIONS_MAX = 1024
ACCEPT_AGAIN_S = 0.1
METHODS = frozenset({"hello", "introduce", "reserve", "commit", "release", "pull", "doubt", "bring", "hint", "locate", "probe", "stats"})

GRACE_S = 0.03
"""So much later than its deadline a call ends if the node does not answer: its way there and back on a machine that is busy."""
COMMIT_GRACE_S = 0.25
"""The same for a commit whose deadline passed while the worker packed: the work is done, and a node that lives will take it."""
LATE_S = 0.01


def _send(connection: socket.socket, message: object) -> None:
    body = msgpack.packb(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _receive(connection: socket.socket, until_s: float | None = None) -> object | None:
    """The next message, or None at the end of the stream. `until_s`: when to give up, on the monotonic clock."""
    head = _exactly(connection, _LENGTH.size, until_s)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MESSAGE_BYTES_MAX:
        raise TieredKVError(Kind.TRANSPORT, f"a message of {length} bytes is larger than {MESSAGE_BYTES_MAX}")
    body = _exactly(connection, length, until_s)
    return None if body is None else msgpack.unpackb(body)


def _exactly(connection: socket.socket, length: int, until_s: float | None) -> bytes | bytearray | None:
    body = _part(connection, length, until_s)
    if len(body) == length:
        return body
    whole = bytearray(body)
    while body and len(whole) < length:
        body = _part(connection, length - len(whole), until_s)
        whole += body
    return whole if len(whole) == length else None


def _part(connection: socket.socket, length: int, until_s: float | None) -> bytes:
    """What is there of a message; waits no longer than `until_s`, also where every part of it comes late."""
    if until_s is not None:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        if left_s < connection.gettimeout() - LATE_S:
            connection.settimeout(left_s)
    return connection.recv(length)


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
        forking.register(self)

    def after_fork(self) -> None:
        """Let go of the parent's connections, so that each ends when the parent ends it."""
        self._closing = True
        for connection in [self._listener, *self._connections]:
            connection.close()
        self._connections, self._threads, self._lock = set(), set(), threading.Lock()

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
        number = None
        try:
            number, method, arguments = message
            if method not in METHODS:
                raise TieredKVError(Kind.TRANSPORT, f"unknown request {method!r}")
            return [number, True, getattr(session, method)(*arguments)]
        except TieredKVError as error:
            return [number, False, error.kind.value, str(error)]
        except Exception as error:
            log.exception("a request of a worker failed")
            return [number, False, Kind.TRANSPORT.value, f"the node failed: {type(error).__name__}: {error}"]

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
    """A worker's end of a session: the same calls as `Session`. Not for two threads at once.

    `wait_s` bounds connecting with the first exchange, and each later call until `allow` says otherwise. Where a call meets an
    error of kind `transport` the session is closed; its context has `timed_out`, whether the node was silent. A child process
    must not use it: there it is closed.
    """

    def __init__(self, path: str, wait_s: float) -> None:
        self._wait_s = wait_s
        self._numbers = itertools.count(1)
        self._arena_bytes = 0
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        forking.register(self)
        self.allow(wait_s)
        self._connection.settimeout(wait_s + GRACE_S)
        try:
            self._connection.connect(path)
        except OSError as error:
            self._connection.close()
            silent = isinstance(error, TimeoutError | BlockingIOError)  # the latter: others wait to be let in as well
            raise TieredKVError(Kind.TRANSPORT, f"the node at {path} does not answer ({error})", path=path, timed_out=silent) from error
        try:
            told = self._call("hello", PROTOCOL)
        except TieredKVError:
            self.close()
            raise
        self.life, self._arena_bytes = Life(told["identity"], told["generation"]), told["arena_bytes"]
        self._until_s: float | None = None

    def allow(self, wait_s: float) -> None:
        self._until_s = time.monotonic() + wait_s

    def after_fork(self) -> None:
        """Close the child's copy of the socket, without a word to the node: the session is the parent's."""
        self._connection.close()

    def _call(
        self,
        method: str,
        *arguments: object,
        wait_s: float = 0.0,
        late_s: float = GRACE_S,
        check: Callable[[Any], bool] | None = None,
    ) -> Any:
        """The answer, if `check` (default: the one in `answers`) finds it to be one.

        Ends with what `allow` gave, at most `late_s` after it where that is over, else within the session's own `wait_s` and this one's.
        """
        now_s = time.monotonic()
        until_s = now_s + self._wait_s + wait_s if self._until_s is None else self._until_s + GRACE_S
        if self._until_s is not None and now_s > self._until_s:
            until_s = now_s + late_s
        number = next(self._numbers)
        try:
            self._connection.settimeout(until_s - now_s)
            _send(self._connection, [number, method, arguments])
            answer = _receive(self._connection, until_s)
        except (OSError, ValueError, TieredKVError) as error:
            raise self._broken(f"the node did not answer {method!r} ({error})", method, isinstance(error, TimeoutError)) from error
        if answer is None:
            raise self._broken(f"the node went away during {method!r}", method)
        if answers.is_error(answer, number):
            kind = Kind(answer[2])
            raise TieredKVError(Kind.TRANSPORT if kind is Kind.CLOSED else kind, answer[3], method=method)
        is_right = check or answers.CHECKS[method]
        if not answers.is_answer(answer, number) or not is_right(answer[2]):
            raise self._broken(f"the node's answer to {method!r} is not one: {str(answer)[:100]}", method)
        return answer[2]

    def _broken(self, message: str, method: str, timed_out: bool = False) -> TieredKVError:
        self.close()
        return TieredKVError(Kind.TRANSPORT, message, method=method, timed_out=timed_out)

    def reserve(self, nbytes: int, keys: list[BlockKey], tail: BlockKey | None, wait_s: float | None = None) -> list[int]:
        return self._call(
            "reserve",
            nbytes,
            keys,
            tail,
            wait_s,
            wait_s=wait_s or 0.0,
            check=lambda offsets: answers.are_offsets(offsets, len(keys), nbytes, self._arena_bytes),
        )

    def introduce(self, root: BlockKey, facts: dict[str, Any]) -> dict[str, Any]:
        return self._call("introduce", root, facts)

    def commit(self, root: BlockKey, nbytes: int, blocks: list[tuple]) -> list[bool]:
        return self._call("commit", root, nbytes, blocks, late_s=COMMIT_GRACE_S, check=lambda added: answers.are_truths(added, len(blocks)))

    def release(self, offsets: list[int]) -> None:
        self._call("release", offsets)

    def pull(self, root: BlockKey, nbytes: int, tail: BlockKey | None, keys: list[BlockKey], depth: int, wait_s: float) -> int:
        arguments = (root, nbytes, tail, keys, depth, wait_s)
        return self._call("pull", *arguments, wait_s=wait_s, check=lambda count: answers.is_whole(count, len(keys)))

    def doubt(self, keys: list[BlockKey]) -> None:
        self._call("doubt", keys)

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        self._call("bring", keys, wait_s, wait_s=wait_s)

    def hint(self, tail: BlockKey, answer_tokens: int | None, pinned_s: float | None, reuse_within_s: float | None, ended: bool) -> None:
        self._call("hint", tail, answer_tokens, pinned_s, reuse_within_s, ended)

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        return self._call("locate", keys, wait_s, wait_s=wait_s, check=lambda nodes: answers.are_names(nodes, len(keys)))

    def probe(self, root: BlockKey, probe: Sequence[Any]) -> str:
        return self._call("probe", root, probe)

    def stats(self) -> dict:
        return self._call("stats")

    def close(self) -> None:
        self._connection.close()
