"""Simulated sockets, of the unix and the internet kind: streams that arrive late and in pieces, and that break.

A stream breaks when one of its processes crashes, or when the simulation breaks it. While the network between two processes is
cut, nothing arrives, and the data is delivered after the cut, as with TCP.
"""

import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from tests.simulation.primitives import world_here
from tests.simulation.scheduler import Process, Task, World

DELAY_S_MAX = 0.0001
SEND_AGAIN_S = 0.05
"""How often bytes are sent again that a cut network has held back."""
FIRST_PORT = 20_000
FIRST_FILENO = 1_000_000
"""Numbers that no real file descriptor has."""
Address = str | tuple[str, int]


class Wires:
    """The sockets of one simulation: listeners by address, and how slow and how likely to break connections are."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.listeners: dict[Address, Socket] = {}
        self.by_fileno: dict[int, Socket] = {}
        self.is_cut: Callable[[str, str], bool] = lambda one, other: False
        """Whether the network between two processes, by name, is cut."""
        self.ports = 0
        self.delay_s_max = DELAY_S_MAX
        self.break_share = 0.0
        """The share of messages at which the connection breaks before they arrive."""
        self.piece_share = 0.0
        """The share of receptions that return only a part of what has arrived."""
        self.flip_share = 0.0
        """The share of transmissions between machines in which a bit flips."""


class Socket:
    """One end of a stream, or a listener."""

    def __init__(self, wires: Wires, process: Process) -> None:
        self._wires = wires
        self._world = wires.world
        self._process = process
        self._timeout_s: float | None = None
        self._receives_within_s: float | None = None
        self._address: Address | None = None
        self._pending: list[Socket] = []
        self._backlog = 0
        self._peer: Socket | None = None
        self._received = bytearray()
        self._outgoing: deque[tuple[float, bytes]] = deque()  # when bytes arrive at the peer; empty ones end the stream
        self._at_end = False
        self._is_closed = False
        self._is_shut = False
        self._waiting: list[Task] = []
        self._number = wires.world.number()
        self._is_local = True
        wires.by_fileno[FIRST_FILENO + self._number] = self
        process.on_crash.append(self._end)

    def fileno(self) -> int:
        return FIRST_FILENO + self._number

    def __hash__(self) -> int:
        return self._number

    # The listener

    def bind(self, address: Address) -> None:
        if isinstance(address, str):
            os.close(os.open(address, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        elif not address[1]:
            self._wires.ports += 1
            address = (address[0], FIRST_PORT + self._wires.ports)
        self._address = address

    def listen(self, backlog: int) -> None:
        assert self._address is not None
        self._backlog = backlog
        self._wires.listeners[self._address] = self

    def getsockname(self) -> Address | None:
        return self._address

    def accept(self) -> tuple["Socket", str]:
        self._world.pause()
        while not self._pending and not self._is_shut and not self._is_closed:
            self._world.wait(self._waiting)
        if self._is_shut or self._is_closed:
            raise OSError(errno.EINVAL, "the listener was shut down")
        return self._pending.pop(0), ""

    # The stream

    def connect(self, address: Address) -> None:
        self._world.pause()
        listener = self._wires.listeners.get(address)
        if isinstance(address, str):
            if not os.path.exists(address):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        elif listener is not None and self._wires.is_cut(self._process.name, listener._process.name):
            self._world.sleep(self._timeout_s or 1.0)
            raise TimeoutError("timed out")
        if listener is None or listener._is_closed or listener._is_shut:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
        if len(listener._pending) >= listener._backlog:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        other = Socket(self._wires, listener._process)
        self._peer, other._peer = other, self
        self._is_local = other._is_local = isinstance(address, str)
        listener._pending.append(other)
        self._world.wake(listener._waiting, 1)

    def setblocking(self, is_blocking: bool) -> None:
        assert is_blocking
        self._timeout_s = None

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        """Note how long a reception may wait. Other options change nothing here."""
        if (level, option) == (socket.SOL_SOCKET, socket.SO_RCVTIMEO):
            seconds, micros = struct.unpack("@ll", value)
            self._receives_within_s = seconds + micros / 1e6

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
        if wires.flip_share and not self._is_local and world.random.random() < wires.flip_share:
            flipped = bytearray(data)
            flipped[world.random.randrange(len(flipped))] ^= 1 << world.random.randrange(8)
            data = bytes(flipped)
        self._send(bytes(data))

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        """Send some of the bytes: as many as the kernel happens to take."""
        data = b"".join(buffers)
        if len(data) > 1 and self._world.random.random() < 0.3:
            data = data[: self._world.random.randint(1, len(data))]
        self.sendall(data)
        return len(data)

    def _send(self, data: bytes) -> None:
        at_s = self._world.now_s + self._world.random.random() * self._wires.delay_s_max
        if self._outgoing:
            at_s = max(at_s, self._outgoing[-1][0])
        self._outgoing.append((at_s, data))
        self._world.after(at_s - self._world.now_s, self._deliver)

    def _deliver(self) -> None:
        peer, world = self._peer, self._world
        assert peer is not None
        while self._outgoing and self._outgoing[0][0] <= world.now_s:
            if not self._is_local and self._wires.is_cut(self._process.name, peer._process.name):
                world.after(SEND_AGAIN_S, self._deliver)
                return
            data = self._outgoing.popleft()[1]
            peer._received += data
            peer._at_end = peer._at_end or not data
            world.wake(peer._waiting)

    def recv(self, nbytes: int, flags: int = 0) -> bytes:
        world = self._world
        world.pause()
        if flags:
            return self._peek(nbytes)
        within_s = self._receives_within_s if self._timeout_s is None else self._timeout_s
        until_s = None if within_s is None else world.now_s + within_s
        while not self._received and not self._at_end:
            if self._is_closed:
                raise OSError(errno.EBADF, "Bad file descriptor")
            left_s = None if until_s is None else until_s - world.now_s
            if left_s is not None and left_s <= 0:
                raise TimeoutError("timed out") if self._timeout_s is not None else BlockingIOError(errno.EAGAIN, "timed out")
            world.wait(self._waiting, left_s)
        nbytes = min(nbytes, len(self._received))
        if nbytes > 1 and self._wires.piece_share and world.random.random() < self._wires.piece_share:
            nbytes = world.random.randint(1, nbytes)
        data = bytes(self._received[:nbytes])
        del self._received[:nbytes]
        return data

    def recv_into(self, target: memoryview) -> int:
        data = self.recv(target.nbytes)
        target[: len(data)] = data
        return len(data)

    def _peek(self, nbytes: int) -> bytes:
        """Does the same as `recv` with the flags MSG_PEEK and MSG_DONTWAIT."""
        if self._is_closed:
            raise OSError(errno.EBADF, "Bad file descriptor")
        if not self._received and not self._at_end:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return bytes(self._received[:nbytes])

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
            if self._backlog:
                raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
            self._break()

    def close(self) -> None:
        if self._end in self._process.on_crash:
            self._process.on_crash.remove(self._end)
        self._end()

    def _end(self) -> None:
        """Close the stream as the kernel does: the peer still reads the bytes sent before, and then the end of the stream."""
        if self._is_closed:
            return
        self._is_closed = True
        for each in self._pending:
            each._end()
        world = self._world
        if world.over:
            return
        world.wake(self._waiting)
        if self._peer is not None:
            self._send(b"")


class SocketModule(ModuleType):
    """Stands in for the module `socket`: in the simulation of `wires`, `socket` makes simulated ones."""

    def __init__(self, wires: Wires) -> None:
        super().__init__("simulated_socket")
        self._wires = wires

    def __getattr__(self, name: str) -> Any:
        return getattr(socket, name)

    def create_connection(self, address: Address, timeout_s: float) -> Any:
        if world_here() is None:
            return socket.create_connection(address, timeout_s)
        made = self.socket()
        made.settimeout(timeout_s)
        try:
            made.connect(address)
        except OSError:
            made.close()
            raise
        return made

    def socket(self, *arguments: Any) -> Any:
        world = world_here()
        if world is None:
            return socket.socket(*arguments)
        assert world.current is not None
        return Socket(self._wires, world.current.process)
