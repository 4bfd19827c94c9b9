"""A folder as object storage: one file an object, synced and renamed into place, so that a crash leaves no partial object."""

import fcntl
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from tiered_kv.codecs.base import Buffer, byte_view
from tiered_kv.errors import TieredKVError
from tiered_kv.tiers.objects.store import OBJECTS, ObjectStore

_PART = ".part"
_QUOTED = {ord(char): f"%{ord(char):02X}" for char in "%?#\t\n\r"}  # these would end the path of a URL, or be lost in it
_BUFFERS_PER_CALL = os.sysconf("SC_IOV_MAX")


class FolderStore(ObjectStore):
    """Objects as files of `folder`, which is created if missing, unless `create` is False. Needs Python's standard library only.

    An object is first written under a temporary name. Temporary files of a killed writer are removed when the folder is next
    opened; those of a live writer are locked and stay. Subfolders are ignored. With `create=False`, opening changes nothing,
    so a read-only folder can be opened.
    """

    def __init__(self, folder: str | os.PathLike[str], *, setting: str = OBJECTS, create: bool = True) -> None:
        self.folder = Path(folder).absolute()
        self.url = f"file://{str(self.folder).translate(_QUOTED)}"
        self.setting = setting
        try:
            if create:
                self._make()
            elif not self.folder.is_dir():
                reason = "it is not a folder" if self.folder.exists() else "there is no such folder on this machine"
                raise self.failed("cannot be used", reason, missing=True)
        except OSError as error:
            raise self.failed("cannot be used", error.strerror) from error

    def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        fresh = self.folder / f"{name}.{uuid.uuid4().hex}{_PART}"
        try:
            self._write(fresh, [byte_view(buffer) for buffer in buffers])
            fresh.replace(self.folder / name)
            self._sync_folder()
        except OSError as error:
            raise self.failed(f"put {name}", error.strerror, errno=error.errno) from error
        finally:
            with suppress(OSError):
                fresh.unlink(missing_ok=True)

    def get(self, name: str) -> memoryview:
        try:
            with (self.folder / name).open("rb") as file:
                self.check_size(name, os.fstat(file.fileno()).st_size)
                return memoryview(file.read())
        except OSError as error:
            raise self._unreadable(name, error) from error

    def get_range(self, name: str, offset: int, nbytes: int) -> memoryview:
        try:
            fd = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = _read(fd, offset, nbytes)
            finally:
                os.close(fd)
        except OSError as error:
            raise self._unreadable(name, error) from error
        if len(found) != nbytes:
            raise self.short(name, offset, nbytes, len(found))
        return found

    def sizes(self) -> dict[str, int]:
        try:
            with os.scandir(self.folder) as entries:
                files = [entry for entry in entries if entry.is_file() and not entry.name.endswith(_PART)]
            return {entry.name: entry.stat().st_size for entry in sorted(files, key=lambda entry: entry.name)}
        except OSError as error:
            raise self.failed("cannot be listed", error.strerror) from error

    def delete(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise self.failed(f"delete {error.filename}", error.strerror) from error

    def close(self) -> None:
        """Does nothing: no file stays open between calls."""

    def _make(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise PermissionError(0, "it is not writable")
        self._remove_leftovers()

    def _write(self, path: Path, views: list[memoryview]) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            while views := [view for view in views if len(view)]:
                count = os.writev(fd, views[:_BUFFERS_PER_CALL])
                while count:  # a nearly full disk writes fewer bytes than requested
                    step = min(count, len(views[0]))
                    count -= step
                    views[0] = views[0][step:]
                    views = views if len(views[0]) else views[1:]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _sync_folder(self) -> None:
        fd = os.open(self.folder, os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _remove_leftovers(self) -> None:
        for part in self.folder.glob(f"*{_PART}"):
            with suppress(FileNotFoundError, BlockingIOError), part.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()

    def _unreadable(self, name: str, error: OSError) -> TieredKVError:
        return self.failed(f"get {name}", error.strerror, missing=isinstance(error, FileNotFoundError), object=name)


def _read(fd: int, offset: int, nbytes: int) -> memoryview:
    """Returns `nbytes` of the file from `offset` on, or fewer if the file ends before."""
    buffer = memoryview(np.empty(nbytes, np.uint8))
    done = 0
    while done < nbytes:
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return buffer[:done]
