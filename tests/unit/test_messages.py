"""Framing on the socket of a session: messages arrive in pieces, together, too long, or never."""

import socket
import struct
import threading
import time

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.unix_socket import MESSAGE_BYTES_MAX, PACKER_BYTES_MAX, RECEIVE_BYTES, _Messages


def framed(message: object) -> bytes:
    body = msgpack.packb(message)
    return struct.pack("<I", len(body)) + body


@pytest.fixture
def ends():
    left, right = socket.socketpair()
    with left, right:
        yield left, right


@given(messages=st.lists(st.one_of(st.integers(0, 1 << 60), st.binary(max_size=300)), max_size=6), data=st.data())
def test_messages_arrive_whole_and_in_order_however_they_are_cut(messages, data):
    stream = b"".join(map(framed, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    left, right = socket.socketpair()
    with left, right:
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            left.sendall(stream[start:end])
        left.close()
        received = _Messages(right)
        assert [received.next() for _ in messages] == messages
        assert received.next() is None


def test_a_message_larger_than_one_receive_arrives_whole_and_the_next_after_it(ends):
    left, right = ends
    large = [1, True, b"x" * (5 * RECEIVE_BYTES + 7)]
    sender = threading.Thread(target=left.sendall, args=(framed(large) + framed("next"),))
    sender.start()
    received = _Messages(right)
    assert received.next(time.monotonic() + 10) == large
    assert received.next(time.monotonic() + 10) == "next"
    sender.join()


def test_sent_messages_are_framed_also_after_a_large_one_and_one_that_cannot_be_sent(ends):
    left, right = ends
    sending, received = _Messages(left), _Messages(right)
    large = [2, True, b"x" * (PACKER_BYTES_MAX + 1)]
    sender = threading.Thread(target=sending.send, args=(large,))
    sender.start()
    assert received.next(time.monotonic() + 10) == large
    sender.join()
    with pytest.raises(TypeError):
        sending.send([3, True, object()])
    sending.send([4, False, "kind", "text"])
    assert received.next(time.monotonic() + 10) == [4, False, "kind", "text"]


@pytest.mark.parametrize("kept", [1, 3, 4, 7])
def test_a_stream_that_ends_within_a_message_has_no_more_messages(ends, kept):
    left, right = ends
    left.sendall(framed("first") + framed("a second message")[:kept])
    left.close()
    received = _Messages(right)
    assert received.next() == "first"
    assert received.next() is None


def test_a_length_over_the_maximum_is_refused_before_any_of_it_is_awaited(ends):
    left, right = ends
    left.sendall(struct.pack("<I", MESSAGE_BYTES_MAX + 1))
    with pytest.raises(TieredKVError) as caught:
        _Messages(right).next(time.monotonic() + 10)
    assert caught.value.kind is Kind.TRANSPORT


def test_bytes_that_keep_dripping_do_not_move_the_deadline(ends):
    left, right = ends
    stop = threading.Event()

    def drip() -> None:
        for byte in framed(b"y" * 1000):
            if stop.wait(0.01):
                return
            left.sendall(bytes([byte]))

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        with pytest.raises(TimeoutError):
            _Messages(right).next(time.monotonic() + 0.2)
    finally:
        stop.set()
        dripping.join()
