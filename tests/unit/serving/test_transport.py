"""A worker's two transports to its node, direct calls and a socket, and failures that only a socket can have."""

import errno
import os
import socket
import threading
import time
from contextlib import closing, contextmanager

import msgpack
import pytest

from tests.contracts.transport import NBYTES, PATIENCE_S, ROOT, TransportContract, key_of, keys_of, wait_until
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.node import Node
from tiered_kv.protocol import unix_socket
from tiered_kv.protocol.messages import BlockRun
from tiered_kv.protocol.session import PROTOCOL
from tiered_kv.protocol.unix_socket import MESSAGE_BYTES_MAX, SessionServer, SocketSession


class TestDirectSession(TransportContract):
    def open(self, node: Node):
        return node.open_session()

    def test_a_session_closed_while_it_waits_for_room_reserves_nothing(self, node_factory) -> None:
        node = node_factory(host="1MiB")
        session = node.open_session()
        reserve, entered, gate = node.engine.reserve, threading.Event(), threading.Event()

        def slow(*arguments, **options):
            entered.set()
            with node.engine.lock:
                node.engine.freed.wait_for(gate.is_set, PATIENCE_S)
            return reserve(*arguments, **options)

        node.engine.reserve = slow
        failures = []

        def ask() -> None:
            try:
                session.reserve(NBYTES, keys_of(2), None)
            except TieredKVError as error:
                failures.append(error.kind)

        thread = threading.Thread(target=ask)
        thread.start()
        assert entered.wait(PATIENCE_S)
        session.close()
        gate.set()
        with node.engine.lock:
            node.engine.freed.notify_all()
        thread.join(PATIENCE_S)
        assert failures == [Kind.TRANSPORT]
        assert node.stats()["tiers"]["host"]["used_bytes"] == 0

    def test_a_closed_node_does_not_answer(self, node_factory) -> None:
        node = node_factory(host="1MiB")
        session = node.open_session()
        offsets = session.reserve(NBYTES, keys_of(1), None)
        node.close()
        calls = [
            lambda: session.reserve(NBYTES, keys_of(1), None),
            lambda: session.commit(ROOT, NBYTES, [(key_of(1), None, offsets[0], 0)]),
            lambda: session.release(offsets),
            session.stats,
            node.open_session,
        ]
        for call in calls:
            with pytest.raises(TieredKVError) as refusal:
                call()
            assert refusal.value.kind is Kind.TRANSPORT
        session.close()
        node.close()


@pytest.fixture
def server(node_factory):
    node = node_factory(host="1MiB", store_wait_ms=0)
    server = SessionServer(f"{node.directory}/sock", node.open_session)
    yield node, f"{node.directory}/sock", server
    server.close()


class TestSocketSession(TransportContract):
    @pytest.fixture
    def node(self, server) -> Node:
        return server[0]

    def open(self, node: Node):
        return SocketSession(f"{node.directory}/sock", PATIENCE_S)


def session_at(path: str):
    return closing(SocketSession(path, PATIENCE_S))


def raw_connection(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE_S)
    connection.connect(path)
    return connection


def framed(message: object) -> bytes:
    body = msgpack.packb(message)
    return len(body).to_bytes(4, "little") + body


@pytest.mark.parametrize(
    "said",
    [b"\xff\xff\xff\xff", (MESSAGE_BYTES_MAX + 1).to_bytes(4, "little"), b"\x01\x00\x00\x00\xc1", b"\x02\x00\x00\x00\x91\x91", b"\x04"],
    ids=["huge", "too long", "no msgpack", "cut msgpack", "cut length"],
)
def test_invalid_bytes_end_one_session_and_no_other(server, said: bytes) -> None:
    _node, path, _ = server
    with session_at(path) as good, raw_connection(path) as bad:
        assert good.stats()["sessions"] >= 1
        bad.sendall(said)
        bad.shutdown(socket.SHUT_WR)
        assert bad.recv(1) == b""
        assert good.reserve(NBYTES, keys_of(1), None)


@pytest.mark.parametrize(
    "message",
    [7, [], ["reserve"], ["close", []], ["__init__", []], [["reserve"], []], ["reserve", [1, 2, 3, 4, 5]], ["commit", [ROOT, 1, 7]]],
)
def test_invalid_requests_get_an_error(server, message: object) -> None:
    _, path, _ = server
    with raw_connection(path) as connection:
        for _ in range(2):  # the session goes on
            connection.sendall(framed(message))
            length = int.from_bytes(connection.recv(4), "little")
            _, good, kind, text = msgpack.unpackb(connection.recv(length))
            assert not good
            assert Kind(kind)
            assert text


@pytest.mark.parametrize(
    "answer",
    [(MESSAGE_BYTES_MAX + 1).to_bytes(4, "little"), b"\x01\x00\x00\x00\xc1", b"\x09\x00\x00\x00\x93", b""],
    ids=["long", "junk", "cut", "end"],
)
def test_invalid_answers_count_as_no_answer(tmp_path, answer: bytes) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        with speaking(listener, answer, after=1), session_at(path) as session:
            for _ in range(2):
                with pytest.raises(TieredKVError) as refusal:
                    session.stats()
                assert refusal.value.kind is Kind.TRANSPORT


HELLO = {"protocol": PROTOCOL, "identity": 7, "generation": 1, "arena_bytes": 1 << 20}


@contextmanager
def speaking(listener: socket.socket, said: bytes, after: int = 0, until_closed: bool = False):
    """A node that answers `after` requests correctly, the first one `hello`, then sends the given bytes, and nothing more.

    `until_closed`: it keeps the connection open until the worker closes it.
    """

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for _ in range(after):
                number, _, _ = msgpack.unpackb(connection.recv(int.from_bytes(connection.recv(4), "little")))
                connection.sendall(framed([number, True, HELLO]))
            connection.sendall(said)
            if not until_closed:
                connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE_S)


@pytest.mark.parametrize(
    "hello",
    [
        HELLO | {"protocol": PROTOCOL + 1},
        HELLO | {"identity": 0},
        HELLO | {"identity": True},
        HELLO | {"generation": -1},
        HELLO | {"arena_bytes": "all"},
        {},
        None,
        [HELLO],
    ],
)
def test_a_session_is_not_opened_if_the_first_answer_is_invalid(tmp_path, hello: object) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        with speaking(listener, framed([1, True, hello])), pytest.raises(TieredKVError, match=r"invalid answer .* to 'hello'") as refusal:
            SocketSession(path, PATIENCE_S)
        assert refusal.value.kind is Kind.TRANSPORT


FAR = 1 << 20
CALLS = {
    "reserve": (
        lambda session: session.reserve(NBYTES, keys_of(2), None),
        [[128, 128], [128, FAR - NBYTES + 128], [129], [-384], [True, False], [128.0], ["128"], [128, 66176, 140000], 128, None, {}, [0]],
    ),
    "commit": (
        lambda session: session.commit(ROOT, NBYTES, [(key_of(1), None, 128, 0)]),
        [[1], [True, True], [None], True, None, [128]],
    ),
    "pull": (lambda session: session.pull(BlockRun(ROOT, NBYTES, None, keys_of(2), 0), 1.0), [-1, 3, True, 1.0, None, [1]]),
    "locate": (lambda session: session.locate(keys_of(1), 1.0), [["n0"], [["n0"], ["n1"]], [[1]], {}, None, "n0"]),
    "explain": (
        lambda session: session.explain(keys_of(1), 1.0, True),
        [None, [], {}, {"node": "n0", "blocks": [], "recorded_s": 1.0, "directory": True}, [["n0"]]],
    ),
    "namespaces": (lambda session: session.namespaces("default"), [None, {}, [1], [{"namespace": {}}]]),
    "introduce": (lambda session: session.introduce(ROOT, {}), [{}, None, [], {"plan": {}}, {"plan": {}, "calibration": 7}]),
    "stats": (lambda session: session.stats(), [None, [], 1]),
    "hint": (lambda session: session.hint(key_of(1), None, None, None, True), [True, 0, []]),
}


@pytest.mark.parametrize(("call", "answer"), [(name, answer) for name, (_, answers) in CALLS.items() for answer in answers])
def test_an_answer_of_the_wrong_type_ends_the_session(tmp_path, call: str, answer: object) -> None:
    """These include answers to other requests: a commit's booleans must never be used as offsets."""
    assert_refused(tmp_path, call, framed([2, True, answer]))


@pytest.mark.parametrize(
    "message",
    [[1, True, {}], [3, True, {}], [True, {}], [2, True], [2, 1, {}], [2, False, "memory"], [2, False, "no", ""], {}, [2, False, [], ""]],
)
def test_an_answer_to_another_request_ends_the_session(tmp_path, message: object) -> None:
    assert_refused(tmp_path, "stats", framed(message))


def assert_refused(tmp_path, call: str, said: bytes) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        with speaking(listener, said, after=1), session_at(path) as session:
            for _ in range(2):
                with pytest.raises(TieredKVError) as refusal:
                    CALLS[call][0](session)
                assert refusal.value.kind is Kind.TRANSPORT


def test_a_closed_node_counts_as_no_answer(tmp_path) -> None:
    """For a caller, an error of kind `closed` means that its own client is closed."""
    assert_refused(tmp_path, "stats", framed([2, False, "closed", "the view is closed"]))


def test_a_worker_of_another_version_gets_an_error(server, monkeypatch) -> None:
    monkeypatch.setattr("tiered_kv.protocol.unix_socket.PROTOCOL", PROTOCOL + 1)
    with pytest.raises(TieredKVError, match=f"version {PROTOCOL + 1} of the session protocol, this node version {PROTOCOL}"):
        SocketSession(server[1], PATIENCE_S)


def test_a_rejected_connection_does_not_end_the_others(server, monkeypatch) -> None:
    _node, path, running = server
    accept, failed = running._listener.accept, threading.Event()

    class Listener:
        def __getattr__(self, name: str):
            return getattr(real, name)

        def accept(self):
            if not failed.is_set():
                failed.set()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return accept()

    real = running._listener
    monkeypatch.setattr(running, "_listener", Listener())
    for _ in range(2):  # the first one may be taken by the accept that waits already
        with session_at(path) as session:
            assert session.stats()
    assert failed.is_set()


def test_closing_the_server_ends_sessions_that_wait(server) -> None:
    node, path, running = server
    with session_at(path) as session:
        session.reserve(NBYTES, keys_of(1), None)
        running.close()
        with pytest.raises(TieredKVError):
            session.stats()
        wait_until(node, lambda: node.stats()["sessions"] == 0)
        assert node.stats()["reserved_bytes"] == 0
    with pytest.raises(TieredKVError):
        SocketSession(path, 1.0)


def test_a_call_that_begins_late_ends_with_the_grace_of_the_call_before_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unix_socket, "GRACE_S", 1.0)
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen()
        with speaking(listener, b"", after=1, until_closed=True), closing(SocketSession(str(tmp_path / "sock"), 1.0)) as session:
            begun_s = time.monotonic()
            session.allow(0.0)
            time.sleep(0.9)
            with pytest.raises(TieredKVError, match="timed out"):
                session.stats()
            assert 0.99 < time.monotonic() - begun_s < 1.6  # a grace of its own would end it at 1.9


def test_the_error_for_a_too_long_socket_path_names_the_setting(tmp_path) -> None:
    with pytest.raises(TieredKVError, match="shm_path"):
        SessionServer(str(tmp_path / ("x" * 120)), lambda: None)
