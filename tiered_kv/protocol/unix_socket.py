"""Sessions over a unix socket: a worker calls the node of its machine without Ray.

A message is a 4-byte length, then msgpack. A request is [number, method, arguments]; its answer is [number, true, value] or
[number, false, kind, text]. The first request is `hello`. A worker checks each answer (`answers`) and closes the session if one is
invalid. A round trip takes about 30 µs, a Ray call 700 µs (docs/design/002). When a worker dies, the kernel closes its socket,
which ends its session.
"""

import itertools
import logging
import os
import reprlib
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
from tiered_kv.protocol import answers
from tiered_kv.protocol.explanation import Explanation, KnownNamespace
from tiered_kv.protocol.messages import BlockRun, Introduction, NodeStats, PackedBlock
from tiered_kv.protocol.session import PROTOCOL, Life, Session
from tiered_kv.unpacking import unpacked

log = logging.getLogger(__name__)

_LENGTH = struct.Struct("<I")
LATE_S = 0.01  # a socket timeout that is too long by less than this stays as it is
MESSAGE_BYTES_MAX = 64 << 20
RECEIVE_BYTES = 64 << 10
PACKER_BYTES_MAX = 1 << 20
CONNECTIONS_MAX = 1024
ACCEPT_AGAIN_S = 0.1
METHODS = frozenset({"hello", "introduce", "reserve", "commit", "release", "pull", "doubt", "bring", "hint", "locate", "probe", "stats"})
METHODS |= {"new_epoch", "salt", "explain", "namespaces"}

GRACE_S = 0.03
"""A call that the node does not answer ends this long after its deadline: time for a round trip on a busy machine."""
LATE_CALL_S = 0.005
"""A call that begins after its deadline gets this long at least."""
COMMIT_GRACE_S = 0.25
"""A commit gets this long if its deadline passed while the worker packed the blocks: the work is done, and a live node accepts it."""


class _Messages:
    """Sends and receives the messages of one connection. A small message costs one system call. One thread at a time may use it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._packer = msgpack.Packer()
        self._received = b""  # bytes received after the last message

    def send(self, message: object) -> None:
        body = self._packer.pack(message)
        self._connection.sendall(_LENGTH.pack(len(body)) + body)
        if len(body) > PACKER_BYTES_MAX:
            self._packer = msgpack.Packer()  # the old packer's buffer has grown with the message

    def next(self, until_s: float | None = None) -> Any:
        """Returns the next message; None at the end of the stream.

        `until_s`: the deadline on the monotonic clock. Raises `TimeoutError` at the deadline, even if bytes keep arriving slowly.
        """
        received: bytes | bytearray = self._received or self._part(RECEIVE_BYTES, until_s)
        end = _end_of(received)
        if len(received) == end:
            self._received = b""
            return unpacked(received[_LENGTH.size :], depth_max=0)
        while len(received) < end:
            more = self._part(max(RECEIVE_BYTES, end - len(received)), until_s) if received else b""
            if not more:
                return None
            if type(received) is bytes:
                received = bytearray(received)
            received += more
            end = _end_of(received)
        self._received = bytes(received[end:])
        return unpacked(memoryview(received)[_LENGTH.size : end], depth_max=0)

    def _part(self, nbytes: int, until_s: float | None) -> bytes:
        if until_s is not None:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError("timed out")
            timeout_s = self._connection.gettimeout()
            if timeout_s is None or left_s < timeout_s - LATE_S:
                self._connection.settimeout(left_s)
        return self._connection.recv(nbytes)


def _end_of(received: bytes | bytearray) -> int:
    """Returns the offset at which the first message ends, or its length field if that is incomplete.

    Raises (kind `transport`) if the message is too long.
    """
    if len(received) < _LENGTH.size:
        return _LENGTH.size
    length: int = _LENGTH.unpack_from(received)[0]
    if length > MESSAGE_BYTES_MAX:
        raise TieredKVError(Kind.TRANSPORT, f"a message must be at most {MESSAGE_BYTES_MAX} bytes, got {length}")
    return _LENGTH.size + length


class SessionServer:
    """Serves sessions on the socket at `path`, with a thread for each worker. Calls `afterwards` after sending each answer."""

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
                Kind.MEMORY, f"shm_path: cannot create a socket at {path} ({error}); a shorter path may help", path=path
            ) from error
        os.chmod(path, 0o600)
        self._listener.listen(128)
        self._acceptor = threading.Thread(target=self._accept, name="tkv-accept", daemon=True)
        self._acceptor.start()
        forking.register(self)

    def after_fork(self) -> None:
        """Close the child's copies of the parent's connections, so that each ends when the parent closes it."""
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
                    log.warning("cannot accept a worker's connection: %s", error)  # the process has no free file descriptor for a while
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
            messages = _Messages(connection)
            with closing(self._open_session()) as session:
                while (message := messages.next()) is not None:
                    messages.send(self._answer(session, message))
                    self._afterwards()
        except (OSError, TieredKVError, ValueError) as error:
            log.info("a worker's session ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._threads.discard(threading.current_thread())
            connection.close()

    @staticmethod
    def _answer(session: Session, message: Any) -> list[Any]:
        """Boundary: a request that fails is answered with its error, and the session goes on."""
        number: Any = None
        try:
            number, method, arguments = message
            if method not in METHODS:
                raise TieredKVError(Kind.TRANSPORT, f"method must be one of {', '.join(sorted(METHODS))}, got {method!r}")
            if method == "pull":  # on the wire, each field of the run is an argument of its own
                arguments = (BlockRun(*arguments[:-1]), arguments[-1])
            return [number, True, getattr(session, method)(*arguments)]
        except TieredKVError as error:
            return [number, False, error.kind.value, str(error)]
        except Exception as error:
            log.exception("a worker's request failed")
            return [number, False, Kind.TRANSPORT.value, f"the node failed: {type(error).__name__}: {error}"]

    def close(self) -> None:
        """Stop listening, end all sessions, and wait for their threads."""
        self._closing = True
        with suppress(OSError):  # raises "not connected", but ends the pending accept all the same
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
    """A worker's end of a session: the calls of `Session`. One thread at a time may use it.

    `wait_s` bounds connecting and the first exchange together, and each later call until `allow` sets another bound. An error of
    kind `transport` closes the session. Its context has `timed_out`: True if the node sent no answer in time. In a forked child process
    the session is closed.
    """

    def __init__(self, path: str, wait_s: float) -> None:
        self._wait_s = wait_s
        self._numbers = itertools.count(1)
        self._arena_bytes = 0
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._messages = _Messages(self._connection)
        forking.register(self)
        self.allow(wait_s)
        self._connection.settimeout(wait_s + GRACE_S)
        try:
            self._connection.connect(path)
        except OSError as error:
            self._connection.close()
            silent = isinstance(error, TimeoutError | BlockingIOError)  # the latter: the queue of waiting connections is full
            raise TieredKVError(Kind.TRANSPORT, f"the node at {path} does not answer: {error}", path=path, timed_out=silent) from error
        try:
            hello = self._call("hello", PROTOCOL)
        except TieredKVError:
            self.close()
            raise
        self.life, self._arena_bytes = Life(hello["identity"], hello["generation"]), hello["arena_bytes"]
        self._until_s: float | None = None

    def allow(self, wait_s: float) -> None:
        self._until_s = time.monotonic() + wait_s

    def after_fork(self) -> None:
        """Close the child's copy of the socket and send nothing: the session belongs to the parent."""
        self._connection.close()

    def _call(
        self,
        method: str,
        *arguments: object,
        wait_s: float = 0.0,
        late_s: float = 0.0,
        check: Callable[[object], bool] | None = None,
    ) -> Any:
        """Send a request. Returns the answer, if `check` (default: the check in `answers`) accepts it.

        The call ends within GRACE_S after the time that `allow` set. If that time has passed already, it gets `late_s` at least. If
        `allow` was not called, it ends within the session's `wait_s` plus this call's.
        """
        now_s = time.monotonic()
        if self._until_s is None:
            until_s = now_s + self._wait_s + wait_s
        else:
            until_s = self._until_s + GRACE_S
            if now_s > self._until_s:
                until_s = max(until_s, now_s + (late_s or LATE_CALL_S))
        number = next(self._numbers)
        try:
            self._connection.settimeout(until_s - now_s)
            self._messages.send([number, method, arguments])
            answer = self._messages.next(until_s)
        except (OSError, ValueError, TieredKVError) as error:
            raise self._broken(f"no answer from the node to {method!r}: {error}", method, isinstance(error, TimeoutError)) from error
        if answer is None:
            raise self._broken(f"the node closed the connection during {method!r}", method)
        is_valid = check or answers.CHECKS[method]
        if answers.is_answer(answer, number) and is_valid(answer[2]):
            return answer[2]
        if answers.is_error(answer, number):
            kind = Kind(answer[2])
            raise TieredKVError(Kind.TRANSPORT if kind is Kind.CLOSED else kind, answer[3], method=method)
        raise self._broken(f"invalid answer from the node to {method!r}: {reprlib.repr(answer)}", method)

    def _broken(self, message: str, method: str, timed_out: bool = False) -> TieredKVError:
        self.close()
        return TieredKVError(Kind.TRANSPORT, message, method=method, timed_out=timed_out)

    def reserve(self, nbytes: int, keys: list[BlockKey], parent: BlockKey | None, wait_s: float | None = None) -> list[int]:
        offsets: list[int] = self._call(
            "reserve",
            nbytes,
            keys,
            parent,
            wait_s,
            wait_s=wait_s or 0.0,
            check=lambda answer: answers.are_offsets(answer, len(keys), nbytes, self._arena_bytes),
        )
        return offsets

    def introduce(self, root: BlockKey, info: dict[str, Any]) -> Introduction:
        answer: Introduction = self._call("introduce", root, info)
        return answer

    def commit(self, root: BlockKey, nbytes: int, blocks: list[PackedBlock]) -> list[bool]:
        added: list[bool] = self._call(
            "commit", root, nbytes, blocks, late_s=COMMIT_GRACE_S, check=lambda answer: answers.are_booleans(answer, len(blocks))
        )
        return added

    def release(self, offsets: list[int]) -> None:
        self._call("release", offsets)

    def pull(self, run: BlockRun, wait_s: float) -> int:
        count: int = self._call("pull", *run, wait_s, wait_s=wait_s, check=lambda answer: answers.is_whole(answer, len(run.keys)))
        return count

    def doubt(self, keys: list[BlockKey]) -> None:
        self._call("doubt", keys)

    def bring(self, keys: list[BlockKey], wait_s: float) -> None:
        self._call("bring", keys, wait_s, wait_s=wait_s)

    def hint(
        self, last_block: BlockKey, answer_tokens: int | None, pinned_s: float | None, reuse_within_s: float | None, ended: bool
    ) -> None:
        self._call("hint", last_block, answer_tokens, pinned_s, reuse_within_s, ended)

    def locate(self, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        nodes: list[list[str]] = self._call(
            "locate", keys, wait_s, wait_s=wait_s, check=lambda answer: answers.are_names(answer, len(keys))
        )
        return nodes

    def explain(self, keys: list[BlockKey], wait_s: float, ask_peers: bool) -> Explanation:
        answer: Explanation = self._call(
            "explain", keys, wait_s, ask_peers, wait_s=wait_s, check=lambda answer: answers.is_explanation(answer, len(keys))
        )
        return answer

    def namespaces(self, tenant: str) -> list[KnownNamespace]:
        answer: list[KnownNamespace] = self._call("namespaces", tenant)
        return answer

    def probe(self, root: BlockKey, probe: Sequence[Any]) -> str:
        variant: str = self._call("probe", root, probe)
        return variant

    def salt(self, tenant: str) -> str:
        salt: str = self._call("salt", tenant)
        return salt

    def new_epoch(self, families: list[bytes], keep: bool) -> tuple[int, list[str]]:
        number, unreached = self._call("new_epoch", families, keep)
        return number, unreached

    def stats(self) -> NodeStats:
        answer: NodeStats = self._call("stats")
        return answer

    def close(self) -> None:
        self._connection.close()
