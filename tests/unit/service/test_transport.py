"""The two ways of a worker to its node: direct calls, and a socket; and what only a socket can meet."""

import errno
import os
import socket
import threading
from contextlib import closing

import msgpack
import pytest

from tests.contracts.transport import NBYTES, PATIENCE_S, ROOT, TransportContract, key_of, keys_of, wait_until
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.service.local import MESSAGE_BYTES_MAX, SessionServer, SocketSession
from tiered_kv.service.node import Node


class TestDirectSession(TransportContract):
    def open(self, node: Node):
        return node.open_session()

    def test_a_session_closed_while_it_waits_for_room_keeps_nothing(self, node_factory) -> None:
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
def test_nonsense_ends_one_session_and_no_other(server, said: bytes) -> None:
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
def test_requests_that_are_none_are_answered_with_an_error(server, message: object) -> None:
    _, path, _ = server
    with raw_connection(path) as connection:
        for _ in range(2):  # the session goes on
            connection.sendall(framed(message))
            length = int.from_bytes(connection.recv(4), "little")
            good, kind, text = msgpack.unpackb(connection.recv(length))
            assert not good
            assert Kind(kind)
            assert text


@pytest.mark.parametrize(
    "answer",
    [(MESSAGE_BYTES_MAX + 1).to_bytes(4, "little"), b"\x01\x00\x00\x00\xc1", b"\x09\x00\x00\x00\x93", b""],
    ids=["long", "junk", "cut", "end"],
)
def test_a_node_that_answers_nonsense_is_one_that_does_not_answer(tmp_path, answer: bytes) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        with session_at(path) as session:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                with pytest.raises(TieredKVError) as refusal:
                    session.stats()
                assert refusal.value.kind is Kind.TRANSPORT
                with pytest.raises(TieredKVError):
                    session.stats()


def test_a_connection_that_cannot_be_let_in_does_not_end_the_others(server, monkeypatch) -> None:
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


def test_a_path_too_long_for_a_socket_names_the_setting(tmp_path) -> None:
    with pytest.raises(TieredKVError, match="shm_path"):
        SessionServer(str(tmp_path / ("x" * 120)), lambda: None)
