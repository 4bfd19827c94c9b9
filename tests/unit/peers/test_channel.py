"""The stream between peers: nobody without the secret gets a byte, and no message that was changed or moved is believed."""

import os
import socket
import threading
import time

import msgpack
import pytest

from tests.unit.peers.pairs import channel_pair, identity_of, shake_hands, tcp_pair, tried, within
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol import peer_channel
from tiered_kv.protocol.peer_channel import MESSAGE_BYTES_MAX, Channel, Limit, answer_greeting, greet


@pytest.fixture
def pair(checked):
    left, right = channel_pair()
    return checked(left), checked(right)


def reason(caught) -> str:
    assert caught.value.kind is Kind.TRANSPORT
    return caught.value.context["reason"]


def test_messages_and_payloads_arrive_in_order(pair) -> None:
    left, right = pair
    payload = os.urandom(50_000)
    received, pieces = bytearray(len(payload)), []
    left.send(["first", 1], within(), [memoryview(payload[:30]), memoryview(payload[30:])])
    left.send(["second", b"x" * 30_000], within())
    assert right.next(within()) == ["first", 1]
    right.receive_into(memoryview(received), within(), lambda piece: pieces.append(bytes(piece)))
    assert bytes(received) == b"".join(pieces) == payload
    assert right.next(within()) == ["second", b"x" * 30_000]


def test_many_buffers_are_sent_although_one_call_takes_few(pair) -> None:
    left, right = pair
    buffers = [memoryview(os.urandom(100)) for _ in range(3000)]
    thread = threading.Thread(target=lambda: left.send("many", within(), buffers))
    thread.start()
    assert right.next(within()) == "many"
    received = bytearray(300_000)
    right.receive_into(memoryview(received), within())
    thread.join()
    assert bytes(received) == b"".join(buffers)


def test_part_of_a_file_is_sent(pair, tmp_path) -> None:
    left, right = pair
    content = os.urandom(3 << 20)
    (tmp_path / "segment").write_bytes(content)
    with (tmp_path / "segment").open("rb") as file:
        thread = threading.Thread(target=lambda: left.send_file(file.fileno(), 1000, 2 << 20, within()))
        thread.start()
        received = bytearray(2 << 20)
        right.receive_into(memoryview(received), within())
        thread.join()
        assert bytes(received) == content[1000 : 1000 + (2 << 20)]
        with pytest.raises(TieredKVError) as caught:
            left.send_file(file.fileno(), len(content) - 10, 20, within())
        assert reason(caught) == "short"


@pytest.mark.parametrize("at", [0, 3, 4, 10, -1, -16])
def test_a_changed_message_is_refused(pair, at: int) -> None:
    left, right = pair
    wire = captured(left, ["get", 1.0, [b"k" * 32]])
    wire[at] ^= 1
    left._connection.sendall(wire)
    left.shut()
    with pytest.raises(TieredKVError) as caught:
        right.next(within())
    assert reason(caught) in ("mac", "length", "closed")


def test_a_message_that_is_repeated_left_out_or_sent_back_is_refused(pair, checked) -> None:
    left, right = pair
    first, second, back = captured(left, "first"), captured(left, "second"), captured(right, "back")
    for wire, good in [(first + first, 1), (second, 0), (second + first, 0), (back, 0)]:
        sender, receiver = map(checked, channel_pair())
        sender._connection.sendall(wire)
        for _ in range(good):
            assert receiver.next(within()) == "first"
        with pytest.raises(TieredKVError) as caught:
            receiver.next(within())
        assert reason(caught) == "mac"


def captured(channel: Channel, message: object) -> bytearray:
    """Returns the bytes of a message without sending them."""
    wire = bytearray()
    send_bytes, channel.send_bytes = channel.send_bytes, lambda buffers, limit: wire.extend(b"".join(buffers))
    try:
        channel.send(message, within())
    finally:
        channel.send_bytes = send_bytes
    return wire


def test_a_length_above_the_limit_is_refused_before_memory_is_taken(pair) -> None:
    left, right = pair
    left._connection.sendall((MESSAGE_BYTES_MAX + 1).to_bytes(4, "little"))
    with pytest.raises(TieredKVError) as caught:
        right.next(within())
    assert reason(caught) == "length"


def test_a_limit_ends_an_exchange_even_if_bytes_keep_coming(pair) -> None:
    left, right = pair
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.01):
            left._connection.send(b"\0")

    thread = threading.Thread(target=trickle)
    thread.start()
    begun_s = time.monotonic()
    with pytest.raises(TieredKVError) as caught:
        right.receive_into(memoryview(bytearray(1 << 20)), within(0.1))
    stop.set()
    thread.join()
    assert reason(caught) == "timeout"
    assert time.monotonic() - begun_s < 0.6


def test_patience_ends_an_exchange_that_stands_still(pair) -> None:
    _, right = pair
    begun_s = time.monotonic()
    with pytest.raises(TieredKVError) as caught:
        right.next(Limit.within(30.0, patience_s=0.05))
    assert reason(caught) == "timeout"
    assert time.monotonic() - begun_s < 5.0


@pytest.mark.parametrize(("first_s", "second_s"), [(0.2, 0.3), (0.3, 0.1), (0.1, 0.102)])
def test_each_limit_counts_whatever_the_one_before_was(pair, first_s: float, second_s: float) -> None:
    left, right = pair
    left.send("in time", within())
    assert right.next(within(first_s)) == "in time"
    begun_s = time.monotonic()
    with pytest.raises(TieredKVError):
        right.next(within(second_s))
    assert second_s - 0.02 < time.monotonic() - begun_s < second_s + 5.0


def test_a_full_peer_ends_a_sender_at_its_limit(pair) -> None:
    left, _ = pair
    begun_s = time.monotonic()
    with pytest.raises(TieredKVError) as caught:
        left.send("much", within(0.1), [memoryview(bytearray(64 << 20))])
    assert reason(caught) == "timeout"
    assert time.monotonic() - begun_s < 5.0


def test_an_idle_channel_is_known_from_a_closed_or_talking_one(pair) -> None:
    left, right = pair
    assert right.is_idle()
    left.send("unasked", within())
    assert not right.is_idle()
    left.close()
    assert not right.is_idle()
    assert not left.is_idle()


# The handshake


def test_both_sides_learn_each_others_names_and_can_talk(checked) -> None:
    caller, listener = map(checked, shake_hands(identity_of("n1"), identity_of("n2")))
    assert (caller.peer, listener.peer) == ("n2", "n1")
    caller.send("hello", within())
    assert listener.next(within()) == "hello"
    listener.send("hello yourself", within())
    assert caller.next(within()) == "hello yourself"


@pytest.mark.parametrize(
    ("caller", "why"),
    [(identity_of(secret=bytes(32)), "secret"), (identity_of(cluster_id="c1"), "cluster"), (identity_of(secret=b""), "secret")],
    ids=["another secret", "another cluster", "no secret"],
)
def test_a_caller_of_another_secret_or_cluster_is_refused_on_both_sides(caller, why) -> None:
    called, listened = shake_hands(caller, identity_of())
    assert called.context["reason"] == why
    assert listened.context["reason"] in (why, "closed")


def test_a_caller_of_another_version_is_refused_and_told(monkeypatch) -> None:
    left, right = tcp_pair()
    answers: list = []
    thread = threading.Thread(target=lambda: answers.append(tried(right, lambda: answer_greeting(right, identity_of(), within()))))
    judge = peer_channel._judge
    monkeypatch.setattr(
        peer_channel, "_judge", lambda hello, own: judge(msgpack.packb([*msgpack.unpackb(hello)[:1], 99, *msgpack.unpackb(hello)[2:]]), own)
    )
    thread.start()
    called = tried(left, lambda: greet(left, identity_of(), within()))
    thread.join()
    assert called.context["reason"] == answers[0].context["reason"] == "version"
    assert "got 99" in str(called)


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 400, b"\x40\0\0\0" + bytes(64), b"\x40\0\0\0" + bytes(10)])
def test_a_stranger_is_refused_and_gets_no_byte_that_proves_anything(said: bytes) -> None:
    left, right = tcp_pair()
    with left, right:
        left.sendall(said)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(TieredKVError) as caught:
            answer_greeting(right, identity_of(), within())
        assert caught.value.context["reason"] in ("closed", "greeting")
        right.shutdown(socket.SHUT_WR)
        answer = left.recv(4096)
    assert answer == b"" or answer.endswith(bytes(32)), "a refusal has no proof"


def test_a_caller_cannot_prove_itself_with_the_listeners_own_proof() -> None:
    left, right = tcp_pair()
    with left, right:
        outcome: list = []
        thread = threading.Thread(target=lambda: outcome.append(tried(right, lambda: answer_greeting(right, identity_of(), within()))))
        thread.start()
        hello = msgpack.packb([peer_channel.MAGIC, peer_channel.PEER_PROTOCOL, "c0", "n1", bytes(32)])
        peer_channel._send_greeting(left, hello, within())
        proof = peer_channel._greeting(left, within())[-32:]
        peer_channel._send_greeting(left, proof, within())
        thread.join()
    assert outcome[0].context["reason"] == "secret"


def test_a_listener_that_does_not_know_the_secret_gets_no_proof_from_the_caller() -> None:
    left, right = tcp_pair()
    with left, right:
        signed = msgpack.packb([peer_channel.MAGIC, peer_channel.PEER_PROTOCOL, "", "n2", bytes(32)])
        peer_channel._send_greeting(right, signed + bytes(32), within())
        with pytest.raises(TieredKVError, match="does not know this cluster's secret"):
            greet(left, identity_of(), within())
        left.close()
        peer_channel._greeting(right, within())
        assert right.recv(100) == b""


def test_a_silent_caller_or_listener_ends_at_the_limit() -> None:
    for side in (lambda sock: answer_greeting(sock, identity_of(), within(0.05)), lambda sock: greet(sock, identity_of(), within(0.05))):
        left, right = tcp_pair()
        with left, right, pytest.raises(TieredKVError) as caught:
            side(right)
        assert caught.value.context["reason"] == "timeout"
