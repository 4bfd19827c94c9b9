"""The parts of `bench transfer`: a slow link, a raw stream, and the records of a run."""

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tiered_kv.tools.bench.fetch import LAYOUTS, Case
from tiered_kv.tools.bench.raw_stream import RawStream, source_process
from tiered_kv.tools.bench.slow_link import SlowLink
from tiered_kv.tools.bench.transfer import records_of, spread


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(10.0)


def called(address: str) -> socket.socket:
    host, _, port = address.partition(":")
    return socket.create_connection((host, int(port)), 10.0)


def sent_back(caller: socket.socket, data: bytes) -> tuple[bytes, float]:
    """Returns the echo of `data`, and the seconds that it took."""
    begun_s = time.monotonic()
    thread = threading.Thread(target=caller.sendall, args=(data,))
    thread.start()
    got = b""
    while len(got) < len(data):
        got += caller.recv(1 << 16)
    thread.join()
    return got, time.monotonic() - begun_s


def test_a_link_without_limits_changes_nothing(echo) -> None:
    data = os.urandom(300_000)
    with SlowLink(echo) as link, called(link.address) as caller:
        assert sent_back(caller, data)[0] == data


def test_latency_is_added_in_each_direction(echo) -> None:
    with SlowLink(echo, latency_s=0.05) as link, called(link.address) as caller:
        assert sent_back(caller, b"hello")[1] >= 0.1


def test_the_rate_is_limited(echo) -> None:
    data = os.urandom(200_000)
    with SlowLink(echo, bytes_per_s=1e6) as link, called(link.address) as caller:
        got, took_s = sent_back(caller, data)
    assert got == data
    assert took_s >= 0.15


def test_a_link_stands_still_after_some_bytes(echo) -> None:
    with SlowLink(echo, stall_after=10) as link, called(link.address) as caller:
        caller.settimeout(0.1)
        caller.sendall(b"x" * 8)
        assert caller.recv(100) == b"x" * 8
        caller.sendall(b"x" * 8)
        with pytest.raises(TimeoutError):
            caller.recv(100)


def test_a_raw_stream_fills_a_buffer() -> None:
    target = bytearray(100_000)
    with source_process() as address:
        stream = RawStream(*address)
        stream.receive(memoryview(target))
        stream.close()
    assert len(set(target)) > 200


def test_records_compare_with_tcp() -> None:
    case = Case(LAYOUTS[3 << 20], 8)
    records = records_of(case, {"ours": [0.2, 0.1, 0.4], "tcp": [0.1, 0.1, 0.1]}, "loopback")
    assert [(each["transport"], each["chain"], each["vs_tcp"], each["us_per_block"]) for each in records] == [
        ("ours", 8, 0.5, 25000.0),
        ("tcp", 8, 1.0, 12500.0),
    ]
    assert records[0]["vs_tcp_by_min"] == 1.0
    assert spread([0.001] * 99 + [1.0])["us"] == 1000.0
