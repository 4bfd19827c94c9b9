"""Makes sure that a disk tier's folder has one owner at a time, and only segments of one format and secret."""

import fcntl
import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.recover import foreign
from tiered_kv.tiers.disk.segments import segments_in

FORMAT = 2
"""Version of a folder's contents. Segments of another version are neither read nor removed."""

_ATTEMPTS = 16
_NAME = re.compile(r"node-(\d+)")
Claimed = TypeVar("Claimed")


class _OwnerFile(NamedTuple):
    """Content of the owner file; None for each missing value."""

    format: object = None
    owner: object = None
    store: object = None


class OwnedFolder:
    """A folder for segments, locked while this object is open. The folder's file `lock` is locked; its file `owner` names the owner.

    The lock (flock) ends when the process and its forked children end. Segments of the same format and `tag` (see
    `footer.store_tag`) are kept, whoever wrote them; `inherited` maps the number of each to its size in bytes. No segment is
    removed here.

    Raises `TieredKVError` (kind `storage`) that names `disk_path` if the folder is in use by another process (context
    `in_use`), holds segments of another format or secret, or cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str], owner: str, tag: bytes) -> None:
        self.path = Path(path)
        self._lock_fd = self._locked()
        try:
            self.inherited = segments_in(self.path)
            self._take_over(_OwnerFile(FORMAT, owner, tag.hex()))
        except OSError as error:
            self.close(remove=False)
            raise _unusable(self.path, error) from error
        except BaseException:
            self.close(remove=False)
            raise

    def close(self, remove: bool) -> None:
        """Unlock the folder. With `remove`, also delete it, unless it has other files. A second call does nothing."""
        if self._lock_fd < 0:
            return
        with suppress(OSError):
            if remove and not segments_in(self.path):
                (self.path / "owner").unlink(missing_ok=True)
                (self.path / "lock").unlink(missing_ok=True)
                self.path.rmdir()
        os.close(self._lock_fd)
        self._lock_fd = -1

    def _locked(self) -> int:
        """Lock the lock file, and return its descriptor. Creates the file again if a closing owner has just removed it."""
        try:
            for _ in range(_ATTEMPTS):
                self.path.mkdir(mode=0o700, exist_ok=True)
                fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                if self._is_ours(fd):
                    return fd
        except OSError as error:
            raise _unusable(self.path, error) from error
        raise TieredKVError(
            Kind.STORAGE,
            f"disk_path: {self.path} was removed by other processes {_ATTEMPTS} times while this process tried to lock it",
            setting="disk_path",
        )

    def _is_ours(self, fd: int) -> bool:
        """Lock an open lock file. Returns whether it is still the file at the folder's path. If not, closes it."""
        is_ours = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(fd), os.stat(self.path / "lock"))
        except BlockingIOError as error:
            owner = _facts_of(self.path).owner or "owner unknown"
            message = f"disk_path: {self.path} is in use by a live cluster ({owner}); name another folder"
            raise TieredKVError(Kind.STORAGE, message, setting="disk_path", path=str(self.path), in_use=True) from error
        except FileNotFoundError:
            pass
        finally:
            if not is_ours:
                os.close(fd)
        return is_ours

    def _take_over(self, new: _OwnerFile) -> None:
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(0, "it is not writable")
        old = _facts_of(self.path)
        if old == new:
            return
        is_same_store = (old.format, old.store) == (new.format, new.store)
        if not is_same_store and any(self.inherited.values()):
            what = "unknown origin" if old.format is None else "another version" if old.format != FORMAT else "another secret"
            raise foreign(self.path, what)
        with suppress(OSError) if is_same_store else nullcontext():  # a full disk must not keep the next owner out
            self._sign(new)

    def _sign(self, facts: _OwnerFile) -> None:
        """Write the owner file and sync it, so that it is on disk before any segment is."""
        fresh = self.path / "owner.new"
        with open(fresh, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(json.dumps(facts._asdict()))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path / "owner")


def claim_folder(root: str | os.PathLike[str], owner: str, make: Callable[[Path], Claimed]) -> Claimed:
    """Choose a folder below `root` for the node `owner`, and call `make` on it. Returns the result of `make`.

    Tries the former folder of `owner` first, then free folders, then a new one. `make` must lock the folder, as `DiskTier`
    does. Blocks of the folder's former owner are found again by any new owner with the same secret. Folders are named
    `node-0`, `node-1` and so on; folders in use by other owners are skipped. Raises what `make` raises if the owner's own
    folder is still in use, or if a free folder has segments of another secret or version, or cannot be used. Raises OSError
    if `root` cannot be listed.
    """
    found = {int(name[1]): _facts_of(path).owner for path in Path(root).iterdir() if (name := _NAME.fullmatch(path.name))}
    old = sorted(found, key=lambda number: (found[number] != owner, number))
    new = [number for number in range(len(found) + _ATTEMPTS) if number not in found]  # several, because other nodes may be starting too
    for number in [*old, *new]:
        try:
            return make(Path(root) / f"node-{number}")
        except TieredKVError as error:
            if not error.context.get("in_use") or found.get(number) == owner:
                raise
    raise TieredKVError(Kind.STORAGE, f"disk_path: all folders in {root} are in use by other nodes", setting="disk_path", path=str(root))


def unused_below(root: str | os.PathLike[str]) -> dict[str, int]:
    """Returns the node folders below `root` that no process uses, with the bytes in each. Includes folders of older formats (`tkv-…`).

    These bytes count against no node's cap. The check takes no lock: a starting node could mistake it for the lock of an owner.
    Raises OSError if the folders cannot be read.
    """
    folders = [path for path in Path(root).iterdir() if _NAME.fullmatch(path.name) or path.name.startswith("tkv-")]
    lines = map(str.split, Path("/proc/locks").read_text().splitlines())
    locked = {int(line[5].rpartition(":")[2]) for line in lines if line[1] == "FLOCK"}
    unused = [path for path in sorted(folders) if not locked & {file.inode() for file in os.scandir(path) if file.name == "lock"}]
    return {path.name: sum(file.stat().st_size for file in os.scandir(path) if file.is_file()) for path in unused}


def _facts_of(path: Path) -> _OwnerFile:
    """Read the owner file of a folder. Returns empty facts if it is missing or invalid."""
    try:
        facts = json.loads((path / "owner").read_text())
        return _OwnerFile(facts["format"], facts["owner"], facts.get("store"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _OwnerFile()


def _unusable(path: Path, error: OSError) -> TieredKVError:
    hint = f"its parent {path.parent} does not exist" if isinstance(error, FileNotFoundError) else error.strerror
    return TieredKVError(Kind.STORAGE, f"disk_path: {path} cannot be used: {hint}", setting="disk_path", path=str(path))
