"""Simulated access to files: the real files in shared memory and on disk, opened by simulated processes, with faults.

When a process crashes, its descriptors are closed, as the kernel would do, so that its locks on files are released. Each number
then refers to /dev/null, because objects of the dead process still use it.
"""

import errno
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tests.simulation.primitives import world_here
from tests.simulation.scheduler import Process, World
from tests.simulation.sockets import Wires
from tiered_kv.tiers.disk.footer import ENTRY_BYTES
from tiered_kv.tiers.disk.segments import Files


class Descriptors:
    """The open file descriptors of the simulation, by process."""

    def __init__(self) -> None:
        self._by_process: dict[Process, set[int]] = {}

    def add(self, fd: int, process: Process) -> None:
        if process not in self._by_process:
            self._by_process[process] = set()
            process.on_crash.append(lambda: self.lose(process))
        for fds in self._by_process.values():
            fds.discard(fd)  # a file object has closed it, if it was there
        self._by_process[process].add(fd)

    def drop(self, fd: int, process: Process) -> bool:
        """Forget a descriptor. Returns whether it was that of the process."""
        if fd in self._by_process.get(process, ()):
            self._by_process[process].remove(fd)
            return True
        return False

    def lose(self, process: Process) -> None:
        """Release the files of a crashed process. Its descriptor numbers are not used again."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in self._by_process.get(process, ()):
            os.dup2(null, fd, inheritable=False)
        os.close(null)

    def close(self) -> None:
        """Close all descriptors that are still open, at the end of a simulation."""
        for fds in self._by_process.values():
            for fd in fds:
                os.close(fd)
        self._by_process.clear()


class OsModule(ModuleType):
    """Stands in for the module `os`: opens and closes files for the simulated process, with a switch point before each call."""

    def __init__(self, descriptors: Descriptors, wires: Wires) -> None:
        super().__init__("simulated_os")
        self._descriptors = descriptors
        self._wires = wires

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, *arguments: Any, **options: Any) -> int:
        world = world_here()
        if world is None:
            return os.open(*arguments, **options)
        world.pause()
        return self._kept(os.open(*arguments, **options), world)

    def dup(self, fd: int) -> int:
        world = world_here()
        return os.dup(fd) if world is None else self._kept(os.dup(fd), world)

    def _kept(self, fd: int, world: World) -> int:
        assert world.current is not None
        self._descriptors.add(fd, world.current.process)
        return fd

    def close(self, fd: int) -> None:
        world = world_here()
        if world is None:
            os.close(fd)
            return
        assert world.current is not None
        if not world.over:
            world.pause()
        if self._descriptors.drop(fd, world.current.process):
            os.close(fd)
        elif not world.over:
            world.fail(OSError(errno.EBADF, f"{world.current.name} closes the descriptor {fd}, which its process has not opened"))

    def fdopen(self, fd: int, *arguments: Any, **options: Any) -> Any:
        world = world_here()
        if world is not None and world.current is not None:
            self._descriptors.drop(fd, world.current.process)
        return os.fdopen(fd, *arguments, **options)

    def sendfile(self, to: int, fd: int, offset: int, count: int) -> int:
        connection = self._wires.by_fileno.get(to)
        if connection is None:
            return os.sendfile(to, fd, offset, count)
        data = os.pread(fd, count, offset)
        if data:
            connection.sendall(data)
        return len(data)

    def cpu_count(self) -> int:
        return 2

    def urandom(self, nbytes: int) -> bytes:
        world = world_here()
        return os.urandom(nbytes) if world is None else world.random.randbytes(nbytes)

    def getpid(self) -> int:
        return os.getpid() if world_here() is None else 1


class DiskFaults:
    """The present faults of one machine's disk."""

    def __init__(self) -> None:
        self.full = False
        self.error_share = 0.0
        self.flip_share = 0.0
        self.misdirected_share = 0.0
        """The share of reads that return the bytes of the next frame of the same size, if there is one."""
        self.slow_s_max = 0.0
        self.hangs = False
        self.torn_crash = False
        """The next write is torn: a part of it arrives, and the node crashes."""


class DiskFiles(Files):
    """The system calls of the disk tier, with the faults of the machine that the calling process runs on."""

    faults_by_process: dict[str, DiskFaults] = {}

    def __init__(self, os_module: OsModule) -> None:
        self.open = self._guarded(os_module.open)
        self.preadv = self._guarded(self._preadv)
        self.pwritev = self._guarded(self._pwritev)
        self.truncate = self._guarded(os.truncate)
        self.unlink = self._guarded(os.unlink)
        self.fdatasync = self._guarded(lambda fd: None)
        self.fadvise = lambda *arguments: None

    def _faults(self, world: World) -> DiskFaults:
        assert world.current is not None
        return self.faults_by_process.get(world.current.process.name, NO_FAULTS)

    def _guarded(self, call: Any) -> Any:
        def guarded(*arguments: Any, **options: Any) -> Any:
            world = world_here()
            if world is None or world.over:
                return call(*arguments, **options)
            world.pause()
            faults = self._faults(world)
            while faults.hangs:
                world.sleep(0.5)
            if faults.slow_s_max:
                world.sleep(world.random.random() * faults.slow_s_max)
            if faults.error_share and world.random.random() < faults.error_share:
                raise OSError(errno.EIO, "Input/output error (simulated)")
            return call(*arguments, **options)

        return guarded

    def _pwritev(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        world = world_here()
        if world is None or world.over:
            return os.pwritev(fd, buffers, offset)
        faults = self._faults(world)
        if faults.full:
            raise OSError(errno.ENOSPC, "No space left on device (simulated)")
        if faults.torn_crash:
            faults.torn_crash = False
            data = b"".join(buffers)
            os.pwrite(fd, data[: world.random.randrange(len(data) + 1)], offset)
            assert world.current is not None
            world.current.process.crash()
        return os.pwritev(fd, buffers, offset)

    def _preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        world = world_here()
        if world is None or world.over:
            return os.preadv(fd, buffers, offset)
        faults = self._faults(world)
        if faults.misdirected_share and world.random.random() < faults.misdirected_share:
            offset += len(buffers[0]) + ENTRY_BYTES
        count = os.preadv(fd, buffers, offset)
        if count:
            share = faults.flip_share
            if share and world.random.random() < share:
                buffers[0].cast("B")[world.random.randrange(min(count, len(buffers[0])))] ^= 1 << world.random.randrange(8)
        return count


NO_FAULTS = DiskFaults()
FAULTS_OF_STORES: dict[str, DiskFaults] = {}
"""By node: what is wrong with its object store now."""
REQUEST_S_MAX = 0.002


def request(call: Any) -> Any:
    """Returns a method of an object store that takes time, and fails as the node's faults say."""

    def requested(store: Any, name: str, *arguments: Any) -> Any:
        world = world_here()
        if world is None or world.over:
            return call(store, name, *arguments)
        assert world.current is not None
        faults = FAULTS_OF_STORES.get(world.current.process.name, NO_FAULTS)
        world.sleep(world.random.random() * max(faults.slow_s_max, REQUEST_S_MAX))
        if faults.error_share and world.random.random() < faults.error_share:
            raise store.failed(f"{call.__name__} {name}", "the request failed (simulated)")
        return call(store, name, *arguments)

    return requested
