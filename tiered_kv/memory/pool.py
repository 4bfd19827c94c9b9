"""The device pool: one tensor on a device that a node process owns and that the workers of its machine map.

The node writes how to map it to the file `device` of its directory, in msgpack: on CUDA the handles of torch's own IPC
mechanism, on the CPU the name of a file beside it. Who maps the pool copies without asking anyone, on a stream of its
own; what a copy read may be believed only after its ticket was waited for.

The paths for CUDA have not been run on a GPU yet; their tests carry the marker `gpu`.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import msgpack
import torch

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.shared import Mapping, available_bytes

VERSION = 1
_DESCRIPTOR, _FILE = "device", "device-pool"
_PAGE_BYTES = 4096
_CUDA_STEP_BYTES = 2 << 20  # torch's allocator gives large tensors multiples of this
_CUDA_MIN_BYTES = 10 << 20  # and smaller ones a share of a larger piece, which would pass the cap


class Ticket:
    """A copy that may still be under way. Keeps the tensors that take part in it alive."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._held: tuple[torch.Tensor, ...] = ()

    def done(self) -> bool:
        """Whether the copy has happened."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Return when the copy has happened; on the CPU it has."""
        if self._event is not None:
            self._event.synchronize()
        self._held = ()


class DevicePool:
    """`tensor`: 1-D uint8 on `device`, one memory for the node that created it and all who opened it.

    `generation` is that of the node's life in which it was made (see `NodeView.generation`): a worker that sees another
    one must open the pool again, and must not use what it read from this one. Thread-safe but for `close`.
    """

    def __init__(self, directory: Path, tensor: torch.Tensor, generation: int, mapping: Mapping | None, *, owner: bool) -> None:
        """Wrap memory that is there; use `create` or `open` instead."""
        self._directory = directory
        self._tensor: torch.Tensor | None = tensor
        self._mapping = mapping
        self._owner = owner
        self.generation = generation
        self.device = tensor.device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @classmethod
    def create(cls, device: str, nbytes: int, directory: Path, generation: int = 0) -> Self:
        """A new pool of at most `nbytes`, its descriptor in `directory` in place of that of a node's life before.

        All memory is allocated now, rounded down so that it never passes `nbytes`. Raises `TieredKVError` that names
        the setting `device`: kind `config` for a device that there is not, or a size too small for a pool; kind
        `memory` where memory does not suffice.
        """
        where = _device(device)
        size = _pool_bytes(where, nbytes)
        remove_pool(directory)
        with ExitStack() as undo:
            undo.callback(remove_pool, directory)
            if where.type == "cuda":
                tensor, mapping = _cuda_memory(where, size), None
                facts = {"uuid": _uuid(tensor.device.index), "storage": list(tensor.untyped_storage()._share_cuda_()[1:])}
            else:
                mapping = _new_mapping(directory, size)
                tensor, facts = mapping.tensor(), {}
            described = {"version": VERSION, "device": where.type, "nbytes": size, "generation": generation, **facts}
            _write_whole(directory / _DESCRIPTOR, msgpack.packb(described))
            undo.pop_all()
        return cls(directory, tensor, generation, mapping, owner=True)

    @classmethod
    def open(cls, directory: Path) -> Self | None:
        """The pool of the node in `directory`; None if it has none.

        Raises (kind `memory`) when this process cannot map it: the device is not visible here (`CUDA_VISIBLE_DEVICES`),
        or the node has ended, or the descriptor is damaged or of another version.
        """
        try:
            described = (directory / _DESCRIPTOR).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(directory, error.strerror) from error
        facts = _facts(directory, described)
        mapping = _mapping(directory, facts["nbytes"]) if facts["device"] == "cpu" else None
        tensor = mapping.tensor() if mapping else _mapped_cuda(directory, facts)
        return cls(directory, tensor, facts["generation"], mapping, owner=False)

    @property
    def tensor(self) -> torch.Tensor:
        """The pool's memory; raises (kind `closed`) after `close`."""
        if self._tensor is None:
            raise TieredKVError(Kind.CLOSED, "the device pool is closed")
        return self._tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the pool: what was asked for, rounded down."""
        return self.tensor.nbytes

    @contextmanager
    def copies(self, *others: torch.Tensor) -> Iterator[Ticket]:
        """What is copied inside runs on the pool's stream, behind what the caller's stream has been given so far.

        `others` are the tensors copied from or to. The ticket tells when it has happened. On the CPU there are no
        streams, and it has happened when the block ends.
        """
        ticket = Ticket()
        if self._stream is None:
            yield ticket
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield ticket
        for other in others:
            if other.is_cuda:  # its memory is not given to others before this stream is done with it
                other.record_stream(self._stream)
        ticket._held = others
        ticket._event = self._stream.record_event()

    def copy_in(self, offset: int, source: torch.Tensor) -> Ticket:
        """Copy a 1-D uint8 tensor on any device to byte `offset` of the pool. Raises (kind `memory`) out of bounds."""
        extent = self.extent(offset, source.numel())
        with self.copies(source) as ticket:
            extent.copy_(_bytes_of(source), non_blocking=True)
        return ticket

    def copy_out(self, offset: int, nbytes: int, destination: torch.Tensor) -> Ticket:
        """Copy from byte `offset` of the pool to a 1-D uint8 tensor of `nbytes` on any device; wait before you use it."""
        if destination.numel() != nbytes:
            raise TieredKVError(Kind.MEMORY, f"{nbytes} bytes of the device pool do not fit {destination.numel()}")
        extent = self.extent(offset, nbytes)
        with self.copies(destination) as ticket:
            _bytes_of(destination).copy_(extent, non_blocking=True)
        return ticket

    def extent(self, offset: int, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8: bytes of the pool, shared. Raises (kind `memory`) out of bounds."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise TieredKVError(Kind.MEMORY, f"bytes {offset} to {offset + nbytes} are not in a device pool of {self.nbytes}")
        return self.tensor[offset : offset + nbytes]

    def check(self) -> None:
        """Assert that the pool is what its descriptor says, as long as that is this pool's."""
        if self._tensor is not None and (self._directory / _DESCRIPTOR).exists():
            facts = _facts(self._directory, (self._directory / _DESCRIPTOR).read_bytes())
            if facts["generation"] == self.generation:
                assert (facts["device"], facts["nbytes"]) == (self.device.type, self.nbytes), facts

    def close(self, remove: bool = False) -> None:
        """Wait for copies, let go of the memory; with `remove` the owner also deletes the files. May be called twice."""
        if self._tensor is None:
            return
        if self._stream is not None:
            self._stream.synchronize()
        self._tensor = None
        if self._mapping is not None:
            self._mapping.close()
        if remove and self._owner:
            remove_pool(self._directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_pool(directory: Path) -> None:
    """Delete what a pool has left in a node's directory; those who map it keep what they have."""
    for name in (_DESCRIPTOR, _FILE):
        (directory / name).unlink(missing_ok=True)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TieredKVError(Kind.CONFIG, f"device: {name!r} names no device; 'cpu' or 'cuda:0'", setting="device") from error
    if device.type not in ("cpu", "cuda"):
        raise TieredKVError(Kind.CONFIG, f"device: a pool can be on 'cpu' or 'cuda', not on {name!r}", setting="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        message = f"device: {name} is not there; this process sees {torch.cuda.device_count()} CUDA devices"
        raise TieredKVError(Kind.CONFIG, message, setting="device")
    return device


def _pool_bytes(device: torch.device, nbytes: int) -> int:
    step, least = (_CUDA_STEP_BYTES, _CUDA_MIN_BYTES) if device.type == "cuda" else (_PAGE_BYTES, _PAGE_BYTES)
    if nbytes < least:
        raise TieredKVError(Kind.CONFIG, f"device: must be at least {least} bytes on {device.type}, got {nbytes}", setting="device")
    return nbytes // step * step


def _cuda_memory(device: torch.device, nbytes: int) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise _too_small(str(device), nbytes) from error


def _new_mapping(directory: Path, nbytes: int) -> Mapping:
    """A new file of `nbytes`, all of it allocated, mapped."""
    if nbytes > available_bytes(directory):  # a memory file system would first fill up, under everyone who uses it
        raise _too_small(str(directory), nbytes)
    fd = -1
    try:
        fd = os.open(directory / _FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(fd, 0, nbytes)
        return Mapping(fd, nbytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            raise _too_small(str(directory), nbytes) from error
        message = f"device: cannot create the pool in {directory}: {error.strerror}"
        raise TieredKVError(Kind.MEMORY, message, setting="device") from error
    finally:
        if fd >= 0:
            os.close(fd)


def _mapping(directory: Path, nbytes: int) -> Mapping:
    try:
        fd = os.open(directory / _FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable(directory, error.strerror) from error
    try:
        if os.fstat(fd).st_size != nbytes:
            raise _unusable(directory, f"its file has {os.fstat(fd).st_size} bytes, not {nbytes}")
        return Mapping(fd, nbytes)
    finally:
        os.close(fd)


def _mapped_cuda(directory: Path, facts: dict[str, Any]) -> torch.Tensor:
    """The memory behind the IPC handles of a descriptor, on the device with the same identity, whatever its number is here."""
    device = next((index for index in range(torch.cuda.device_count()) if _uuid(index) == facts["uuid"]), None)
    if device is None:
        raise _unusable(directory, f"its device {facts['uuid']} is not visible to this process; see CUDA_VISIBLE_DEVICES")
    try:
        storage = torch.UntypedStorage._new_shared_cuda(device, *facts["storage"])
    except RuntimeError as error:
        raise _unusable(directory, str(error)) from error
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[: facts["nbytes"]]


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _facts(directory: Path, described: bytes) -> dict[str, Any]:
    """What a descriptor says, checked to be complete."""
    try:
        facts = msgpack.unpackb(described)
        version, device = facts["version"], facts["device"]
        needed = {"nbytes": int, "generation": int} | ({"uuid": str, "storage": list} if device == "cuda" else {})
        whole = device in ("cpu", "cuda") and all(isinstance(facts[name], kind) for name, kind in needed.items())
    except (ValueError, TypeError, KeyError) as error:
        raise _unusable(directory, "its descriptor is damaged") from error
    if version != VERSION:
        raise _unusable(directory, f"its descriptor has version {version}, this package reads version {VERSION}")
    if not whole:
        raise _unusable(directory, "its descriptor is damaged")
    return facts


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file that is seen with all its content or not at all."""
    fresh = path.with_name(f"{path.name}.new")
    with suppress(FileNotFoundError):
        fresh.unlink()
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    fresh.replace(path)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is not torch.uint8 or tensor.dim() != 1:
        raise TieredKVError(Kind.MEMORY, f"the device pool takes 1-D uint8 tensors, not {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor


def _too_small(where: str, nbytes: int) -> TieredKVError:
    message = f"device: {nbytes / 2**20:.1f} MiB are needed, but {where} does not have them; lower device"
    return TieredKVError(Kind.MEMORY, message, setting="device", needed_bytes=nbytes)


def _unusable(directory: Path, reason: str | None) -> TieredKVError:
    return TieredKVError(Kind.MEMORY, f"the device pool of {directory} cannot be mapped: {reason}", setting="device", path=str(directory))
