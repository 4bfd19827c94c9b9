"""A proxy for one TCP address that adds latency, limits the rate, or stops forwarding: it simulates a network on one machine.

Unlike `tc netem`, it works on every kernel and without root.
"""

import socket
import threading
import time
from collections import deque
from contextlib import suppress

from tiered_kv.protocol.peer_address import address_text, parse_address

PIECE_BYTES = 64 << 10
QUEUED_BYTES = 1 << 20
"""The most bytes that wait in one direction, in addition to those in flight because of the latency."""


class SlowLink:
    """Forwards connections to `target` ("HOST:PORT").

    `latency_s`: latency added to each direction. `bytes_per_s`: the highest rate of each direction. `stall_after`: after this
    many bytes from the target in total, nothing more from it is forwarded. None for no such limit.
    """

    def __init__(self, target: str, latency_s: float = 0.0, bytes_per_s: float = float("inf"), stall_after: int | None = None) -> None:
        self._target = parse_address(target)
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._stall_after = stall_after
        self._returned = 0
        self._closing = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = address_text(*self._listener.getsockname())
        """The address to which callers connect instead of the target's."""
        self._start(self._accept)

    def _start(self, run, *arguments: object) -> None:
        thread = threading.Thread(target=run, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                caller, _ = self._listener.accept()
                target = socket.create_connection(self._target)
                for each in (caller, target):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets += [caller, target]
                self._start(self._forward, caller, target, False)
                self._start(self._forward, target, caller, True)

    def _forward(self, source: socket.socket, sink: socket.socket, returns: bool) -> None:
        on_the_way: deque[tuple[float, bytes]] = deque()
        changed, limit = threading.Condition(), QUEUED_BYTES + int(min(self._bytes_per_s, 1e9) * self._latency_s)
        self._start(self._deliver, on_the_way, changed, sink)
        free_s = time.monotonic()
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                if returns and self._is_stalled(len(piece)):
                    self._closing.wait()
                    break
                free_s = max(free_s, time.monotonic()) + len(piece) / self._bytes_per_s
                with changed:
                    on_the_way.append((free_s + self._latency_s, piece))
                    changed.notify_all()
                    changed.wait_for(lambda: self._closing.is_set() or sum(len(each) for _, each in on_the_way) < limit, 60.0)
        with changed:
            on_the_way.append((0.0, b""))
            changed.notify_all()

    def _is_stalled(self, nbytes: int) -> bool:
        self._returned += nbytes
        return self._stall_after is not None and self._returned > self._stall_after

    def _deliver(self, on_the_way: "deque[tuple[float, bytes]]", changed: threading.Condition, sink: socket.socket) -> None:
        with suppress(OSError):
            while True:
                with changed:
                    changed.wait_for(lambda: on_the_way or self._closing.is_set())
                    if not on_the_way:
                        return
                    due_s, piece = on_the_way[0]
                if not piece:
                    sink.shutdown(socket.SHUT_WR)
                    return
                time.sleep(max(due_s - time.monotonic(), 0.0))
                sink.sendall(piece)
                with changed:
                    on_the_way.popleft()
                    changed.notify_all()

    def close(self) -> None:
        """Close the listener and all connections."""
        self._closing.set()
        for each in [self._listener, *self._sockets]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(5.0)

    def __enter__(self) -> "SlowLink":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
