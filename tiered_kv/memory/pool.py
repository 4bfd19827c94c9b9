"""The device pool: one tensor on a device that a node process owns and that the workers of its machine map.

The node writes a descriptor, which says how to map the pool, to the file `device` of its directory, in msgpack. On CUDA it contains
the handles of torch's own IPC; on the CPU the pool is a file in the same directory. A process that maps the pool copies without
asking the node, on a stream of its own. Copied bytes are valid only after a wait for the copy's ticket.

The code for CUDA has not been run on a GPU yet; its tests carry the marker `gpu`.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict, cast

import msgpack
import torch

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.room import available_bytes
from tiered_kv.memory.shared import Mapping
from tiered_kv.unpacking import unpacked

VERSION = 1
_DESCRIPTOR, _FILE = "device", "device-pool"
_PAGE_BYTES = 4096
_CUDA_STEP_BYTES = 2 << 20  # torch's allocator gives large tensors multiples of this
_CUDA_MIN_BYTES = 10 << 20  # smaller tensors get part of a larger allocation, which would exceed the cap


class _Descriptor(TypedDict):
    """Content of the descriptor file. `uuid` and `storage` (torch's IPC handles) exist on CUDA only."""

    version: int
    device: str
    nbytes: int
    generation: int
    uuid: NotRequired[str]
    storage: NotRequired[list[Any]]


class Ticket:
    """A copy that may still be under way. Keeps its source and destination tensors alive."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._held: tuple[torch.Tensor, ...] = ()

    def done(self) -> bool:
        """Whether the copy is complete."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait until the copy is complete. On the CPU it is complete at once."""
        if self._event is not None:
            self._event.synchronize()
        self._held = ()


class DevicePool:
    """A pool of device memory: `tensor` is 1-D uint8 on `device`, shared by the node that created it and all that opened it.

    `generation` is the identity of the node's files when the node created the pool (see `NodeView.identity`). A worker that maps an
    index of another identity must open the pool again, and discard what it read from this pool. A count of restarts would not
    do, because it starts again after the node's files were removed. Thread-safe except `close`.
    """

    def __init__(self, directory: Path, tensor: torch.Tensor, generation: int, mapping: Mapping | None, *, owner: bool) -> None:
        """Wrap existing memory; use `create` or `open` instead."""
        self._directory = directory
        self._tensor: torch.Tensor | None = tensor
        self._mapping = mapping
        self._owner = owner
        self.generation = generation
        self.device = tensor.device
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @classmethod
    def create(cls, device: str, nbytes: int, directory: Path, generation: int = 0) -> Self:
        """Create a pool of at most `nbytes`, with its descriptor in `directory`. Replaces the pool of an earlier run of the node.

        All memory is allocated now; the size is rounded down, so that it never exceeds `nbytes`. Raises `TieredKVError` that
        names the setting `device`: kind `config` if the device does not exist or `nbytes` is too small for a pool, kind
        `memory` if there is too little memory.
        """
        where = _device(device)
        size = _pool_bytes(where, nbytes)
        remove_pool(directory)
        with ExitStack() as undo:
            undo.callback(remove_pool, directory)
            if where.type == "cuda":
                mapping, tensor = None, _cuda_memory(where, size)
                handles = {"uuid": _uuid(tensor.device.index), "storage": list(tensor.untyped_storage()._share_cuda_()[1:])}
            else:
                mapping = _new_mapping(directory, size)
                tensor, handles = mapping.tensor(), {}
            described = {"version": VERSION, "device": where.type, "nbytes": size, "generation": generation, **handles}
            _write_whole(directory / _DESCRIPTOR, msgpack.packb(described))
            undo.pop_all()
        return cls(directory, tensor, generation, mapping, owner=True)

    @classmethod
    def open(cls, directory: Path) -> Self | None:
        """Map the pool of the node in `directory`. Returns None if the node has none.

        Raises (kind `memory`) if this process cannot map it: the device is invisible here (`CUDA_VISIBLE_DEVICES`), the node
        has ended, or the descriptor is damaged or has another version.
        """
        try:
            described = (directory / _DESCRIPTOR).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(directory, error.strerror) from error
        descriptor = _read_descriptor(directory, described)
        mapping = _mapping(directory, descriptor["nbytes"]) if descriptor["device"] == "cpu" else None
        tensor = mapping.tensor() if mapping else _mapped_cuda(directory, descriptor)
        return cls(directory, tensor, descriptor["generation"], mapping, owner=False)

    @property
    def tensor(self) -> torch.Tensor:
        """The pool's memory. Raises (kind `closed`) after `close`."""
        if self._tensor is None:
            raise TieredKVError(Kind.CLOSED, "the device pool is closed")
        return self._tensor

    @property
    def nbytes(self) -> int:
        """The pool's size in bytes: the requested size, rounded down."""
        return self.tensor.nbytes

    @contextmanager
    def copies(self, *others: torch.Tensor) -> Iterator[Ticket]:
        """Run the copies made in a `with` block on the pool's CUDA stream, after all work queued so far on the caller's stream.

        `others` are the tensors copied from or to. Yields the ticket that shows when the copies are complete. The CPU has no
        streams: the copies are complete when the block ends.
        """
        ticket = Ticket()
        if self._stream is None:
            yield ticket
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield ticket
        for other in others:
            if other.is_cuda:  # torch does not reuse its memory before this stream has finished with it
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
        """Copy from byte `offset` of the pool to a 1-D uint8 tensor of `nbytes` on any device. Wait for the ticket before you use it."""
        if destination.numel() != nbytes:
            raise TieredKVError(Kind.MEMORY, f"copy_out: destination must have {nbytes} bytes, got {destination.numel()}")
        extent = self.extent(offset, nbytes)
        with self.copies(destination) as ticket:
            _bytes_of(destination).copy_(extent, non_blocking=True)
        return ticket

    def extent(self, offset: int, nbytes: int) -> torch.Tensor:
        """Returns `nbytes` of the pool as a (nbytes,) uint8 tensor that shares its memory. Raises (kind `memory`) out of bounds."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise TieredKVError(Kind.MEMORY, f"device pool: offset {offset} plus nbytes {nbytes} must be within its {self.nbytes} bytes")
        return self.tensor[offset : offset + nbytes]

    def check(self) -> None:
        """Assert that the pool matches its descriptor, unless the descriptor is of a newer pool."""
        if self._tensor is not None and (self._directory / _DESCRIPTOR).exists():
            descriptor = _read_descriptor(self._directory, (self._directory / _DESCRIPTOR).read_bytes())
            if descriptor["generation"] == self.generation:
                assert (descriptor["device"], descriptor["nbytes"]) == (self.device.type, self.nbytes), descriptor

    def close(self, remove: bool = False) -> None:
        """Wait for copies and release the memory. With `remove` the owner also deletes the files. May be called twice."""
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
    """Delete the files of a pool in a node's directory. Processes that map the pool keep their mapping."""
    for name in (_DESCRIPTOR, _FILE):
        (directory / name).unlink(missing_ok=True)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TieredKVError(Kind.CONFIG, f"device: must be a device such as 'cpu' or 'cuda:0', got {name!r}", setting="device") from error
    if device.type not in ("cpu", "cuda"):
        raise TieredKVError(Kind.CONFIG, f"device: a pool must be on 'cpu' or 'cuda', got {name!r}", setting="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        message = f"device: {name} does not exist; this process sees {torch.cuda.device_count()} CUDA devices"
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
    """Create, allocate and map a file of `nbytes`."""
    if nbytes > available_bytes(directory):  # else the allocation fills the file system for all its users before it fails
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
            raise _unusable(directory, f"its file must have {nbytes} bytes, got {os.fstat(fd).st_size}")
        return Mapping(fd, nbytes)
    finally:
        os.close(fd)


def _mapped_cuda(directory: Path, descriptor: _Descriptor) -> torch.Tensor:
    """Map the memory that the IPC handles of a descriptor refer to. Finds the device by its UUID, as device numbers differ by process."""
    device = next((index for index in range(torch.cuda.device_count()) if _uuid(index) == descriptor["uuid"]), None)
    if device is None:
        raise _unusable(directory, f"its device {descriptor['uuid']} is not visible to this process; see CUDA_VISIBLE_DEVICES")
    try:
        storage = torch.UntypedStorage._new_shared_cuda(device, *descriptor["storage"])
    except RuntimeError as error:
        raise _unusable(directory, str(error)) from error
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[: descriptor["nbytes"]]


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _read_descriptor(directory: Path, described: bytes) -> _Descriptor:
    """Unpack a descriptor and check that it is complete. Raises (kind `memory`) if it is not."""
    try:
        content: dict[str, Any] = unpacked(described)
        version, device = content["version"], content["device"]
        needed = {"nbytes": int, "generation": int} | ({"uuid": str, "storage": list} if device == "cuda" else {})
        is_whole = device in ("cpu", "cuda") and all(isinstance(content[name], kind) for name, kind in needed.items())
    except (ValueError, TypeError, KeyError) as error:
        raise _unusable(directory, "its descriptor is damaged") from error
    if version != VERSION:
        raise _unusable(directory, f"its descriptor has version {version}, this package reads version {VERSION}")
    if not is_whole:
        raise _unusable(directory, "its descriptor is damaged")
    return cast("_Descriptor", content)


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that readers see all of its content or no file."""
    fresh = path.with_name(f"{path.name}.new")
    with suppress(FileNotFoundError):
        fresh.unlink()
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
    fresh.replace(path)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is not torch.uint8 or tensor.dim() != 1:
        raise TieredKVError(Kind.MEMORY, f"device pool: tensors must be 1-D uint8, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor


def _too_small(where: str, nbytes: int) -> TieredKVError:
    message = f"device: {nbytes / 2**20:.1f} MiB are needed, but {where} has less available; lower the setting device"
    return TieredKVError(Kind.MEMORY, message, setting="device", needed_bytes=nbytes)


def _unusable(directory: Path, reason: str | None) -> TieredKVError:
    return TieredKVError(Kind.MEMORY, f"the device pool of {directory} cannot be mapped: {reason}", setting="device", path=str(directory))
