"""A raw TCP stream between two processes: the baseline of `bench transfer`.

The source process sends bytes from memory that is larger than the processor's caches. The receiving process reads them into a
buffer, without any look-up, check or copy.
"""

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

SOURCE_BYTES = 512 << 20
_REQUEST = struct.Struct("<Q")


class RawStream:
    """The receiving end of a stream from another process."""

    def __init__(self, host: str, port: int) -> None:
        self._connection = socket.create_connection((host, port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self, target: memoryview) -> None:
        """Ask for as many bytes as `target` has, and receive them."""
        self._connection.sendall(_REQUEST.pack(target.nbytes))
        got = 0
        while got < target.nbytes:
            count = self._connection.recv_into(target[got:])
            if not count:
                raise ConnectionError("the source has ended")
            got += count

    def close(self) -> None:
        """Close the connection. The source then accepts the next one."""
        self._connection.close()


@contextmanager
def source_process() -> Iterator[tuple[str, int]]:
    """Run a source in another process until the end of the with block. Yields its host and port."""
    with subprocess.Popen(
        [sys.executable, "-m", "tiered_kv.tools.bench.raw_stream"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        port = int(process.stdout.readline())
        try:
            yield "127.0.0.1", port
        finally:
            process.kill()


def main() -> None:
    """Print the port, then serve one connection after the other until killed."""
    source = memoryview(np.random.default_rng(1).integers(0, 256, SOURCE_BYTES, np.uint8))
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _serve(connection, source)


def _serve(connection: socket.socket, source: memoryview) -> None:
    at = 0
    while len(request := connection.recv(_REQUEST.size)) == _REQUEST.size:
        left: int = _REQUEST.unpack(request)[0]
        while left:
            part = source[at : at + min(left, SOURCE_BYTES - at)]
            connection.sendall(part)
            left -= len(part)
            at = (at + len(part)) % SOURCE_BYTES


if __name__ == "__main__":
    main()
