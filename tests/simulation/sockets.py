"""Simulated unix sockets: streams that arrive late and in pieces, and that break when a process crashes or the simulation says so."""

import errno
import os
import socket
from types import ModuleType
from typing import Any

from tests.simulation.primitives import world_here
from tests.simulation.scheduler import Process, Task, World

DELAY_S_MAX = 0.0001


class Wires:
    """The sockets of one simulation: listeners by path, and how slow and how safe connections are."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.listeners: dict[str, Socket] = {}
        self.delay_s_max = DELAY_S_MAX
        self.break_share = 0.0
        """The share of messages at which the connection breaks before they arrive."""
        self.piece_share = 0.0
        """The share of receptions that return only a part of what has arrived."""


class Socket:
    """One end of a stream, or a listener."""

    def __init__(self, wires: Wires, process: Process) -> None:
        self._wires = wires
        self._world = wires.world
        self._process = process
        self._timeout_s: float | None = None
        self._path: str | None = None
        self._pending: list[Socket] = []
        self._backlog = 0
        self._peer: Socket | None = None
        self._received = bytearray()
        self._arrives_at_s = 0.0  # when the last bytes sent so far arrive at the peer
        self._at_end = False
        self._is_closed = False
        self._is_shut = False
        self._waiting: list[Task] = []
        self._number = wires.world.number()
        process.on_crash.append(self._end)

    def __hash__(self) -> int:
        return self._number

    # The listener

    def bind(self, path: str) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        self._path = path

    def listen(self, backlog: int) -> None:
        assert self._path is not None
        self._backlog = backlog
        self._wires.listeners[self._path] = self

    def accept(self) -> tuple["Socket", str]:
        self._world.pause()
        while not self._pending and not self._is_shut and not self._is_closed:
            self._world.wait(self._waiting)
        if self._is_shut or self._is_closed:
            raise OSError(errno.EINVAL, "the listener was shut down")
        return self._pending.pop(0), ""

    # The stream

    def connect(self, path: str) -> None:
        self._world.pause()
        listener = self._wires.listeners.get(path)
        if not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        if listener is None or listener._is_closed or listener._is_shut:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        if len(listener._pending) >= listener._backlog:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        other = Socket(self._wires, listener._process)
        self._peer, other._peer = other, self
        listener._pending.append(other)
        self._world.wake(listener._waiting, 1)

    def settimeout(self, seconds: float | None) -> None:
        if self._is_closed:
            raise OSError(errno.EBADF, "Bad file descriptor")
        if seconds is not None and seconds < 0:
            raise ValueError("Timeout value out of range")
        self._timeout_s = seconds

    def gettimeout(self) -> float | None:
        return self._timeout_s

    def sendall(self, data: bytes) -> None:
        world, wires = self._world, self._wires
        world.pause()
        peer = self._peer
        if self._is_closed:
            raise OSError(errno.EBADF, "Bad file descriptor")
        if peer is None or peer._is_closed or self._is_shut:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        if wires.break_share and world.random.random() < wires.break_share:
            world.note(f"a connection of {self._process.name} breaks")
            self._break()
            return
        delay_s = world.random.random() * wires.delay_s_max
        self._arrives_at_s = max(self._arrives_at_s, world.now_s + delay_s)
        world.after(self._arrives_at_s - world.now_s, lambda: peer._arrive(bytes(data)))

    def _arrive(self, data: bytes) -> None:
        if not self._is_closed:
            self._received += data
            self._world.wake(self._waiting)

    def recv(self, nbytes: int) -> bytes:
        world = self._world
        world.pause()
        until_s = None if self._timeout_s is None else world.now_s + self._timeout_s
        while not self._received and not self._at_end:
            if self._is_closed:
                raise OSError(errno.EBADF, "Bad file descriptor")
            left_s = None if until_s is None else until_s - world.now_s
            if left_s is not None and left_s <= 0:
                raise TimeoutError("timed out")
            world.wait(self._waiting, left_s)
        nbytes = min(nbytes, len(self._received))
        if nbytes > 1 and self._wires.piece_share and world.random.random() < self._wires.piece_share:
            nbytes = world.random.randint(1, nbytes)
        data = bytes(self._received[:nbytes])
        del self._received[:nbytes]
        return data

    # The end

    def _break(self) -> None:
        """End both ends at once, as a lost connection does."""
        for each in (self, self._peer):
            if each is not None:
                each._at_end = each._is_shut = True
                self._world.wake(each._waiting)

    def shutdown(self, how: int) -> None:
        if self._is_closed:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self._is_shut = True
        if not self._world.over:
            self._world.wake(self._waiting)
            if self._path is not None:
                raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
            self._break()

    def close(self) -> None:
        if self._end in self._process.on_crash:
            self._process.on_crash.remove(self._end)
        self._end()

    def _end(self) -> None:
        """What the kernel does at the close: the peer reads what was sent, and then the end of the stream."""
        if self._is_closed:
            return
        self._is_closed = True
        for each in self._pending:
            each._end()
        world = self._world
        if world.over:
            return
        world.wake(self._waiting)
        peer = self._peer
        if peer is not None:
            world.after(self._arrives_at_s - world.now_s, peer._see_end)

    def _see_end(self) -> None:
        self._at_end = True
        self._world.wake(self._waiting)


class SocketModule(ModuleType):
    """Stands in for the module `socket`: in the simulation of `wires`, `socket` makes simulated ones."""

    AF_UNIX, SOCK_STREAM, SHUT_RDWR = socket.AF_UNIX, socket.SOCK_STREAM, socket.SHUT_RDWR

    def __init__(self, wires: Wires) -> None:
        super().__init__("simulated_socket")
        self._wires = wires

    def socket(self, *arguments: Any) -> Any:
        world = world_here()
        if world is None:
            return socket.socket(*arguments)
        assert world.current is not None
        return Socket(self._wires, world.current.process)
