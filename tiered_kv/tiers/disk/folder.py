"""The folder of a disk tier: who owns it, that nobody else does, and which store its segments belong to."""

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
"""Version of what lies in a folder. Segments of another one are not read, and not removed either."""

_ATTEMPTS = 16
_NAME = re.compile(r"node-(\d+)")
Claimed = TypeVar("Claimed")


class _Facts(NamedTuple):
    """What the owner file says; None for what it does not say."""

    format: object = None
    owner: object = None
    store: object = None


class OwnedFolder:
    """A folder for segments, locked while this object is open. Its file `lock` is locked, its file `owner` says for whom.

    The lock (flock) ends with the process and those forked from it. Segments of the same format and `tag` (see
    `footer.store_tag`) are kept, whoever has written them: `inherited` has the bytes of each. Nothing is ever removed here.

    Raises `TieredKVError` (kind `storage`) that names `disk_path` when the folder is in use by others (context `in_use`),
    holds segments of another format or secret, or cannot be used.
    """

    def __init__(self, path: str | os.PathLike, owner: str, tag: bytes) -> None:
        self.path = Path(path)
        self._lock_fd = self._locked()
        try:
            self.inherited = segments_in(self.path)
            self._take_over(_Facts(FORMAT, owner, tag.hex()))
        except OSError as error:
            self.close(remove=False)
            raise _unusable(self.path, error) from error
        except BaseException:
            self.close(remove=False)
            raise

    def close(self, remove: bool) -> None:
        """Unlock the folder; with `remove`, delete it unless other files are in it. A second time does nothing."""
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
        """The locked lock file; made anew if an owner who just left has removed it meanwhile."""
        try:
            for _ in range(_ATTEMPTS):
                self.path.mkdir(mode=0o700, exist_ok=True)
                fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                if self._is_ours(fd):
                    return fd
        except OSError as error:
            raise _unusable(self.path, error) from error
        raise TieredKVError(Kind.STORAGE, f"disk_path: {self.path} is being removed again and again", setting="disk_path")

    def _is_ours(self, fd: int) -> bool:
        """Lock an open lock file that is still the folder's; otherwise close it."""
        is_ours = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(fd), os.stat(self.path / "lock"))
        except BlockingIOError as error:
            owner = _facts_of(self.path).owner or "owner unknown"
            message = f"disk_path: {self.path} is in use by a live cluster ({owner}); name a folder of its own"
            raise TieredKVError(Kind.STORAGE, message, setting="disk_path", path=str(self.path), in_use=True) from error
        except FileNotFoundError:
            pass
        finally:
            if not is_ours:
                os.close(fd)
        return is_ours

    def _take_over(self, new: _Facts) -> None:
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(0, "it is not writable")
        old = _facts_of(self.path)
        if old == new:
            return
        is_same_store = (old.format, old.store) == (new.format, new.store)
        if not is_same_store and any(self.inherited.values()):
            what = "unknown origin" if old.format is None else "another version" if old.format != FORMAT else "another secret"
            raise foreign(self.path, what)
        with suppress(OSError) if is_same_store else nullcontext():  # a full disk must not keep its owner's heir out
            self._sign(new)

    def _sign(self, facts: _Facts) -> None:
        """Write the owner file, so that it is on the disk before any segment is."""
        fresh = self.path / "owner.new"
        with open(fresh, "w", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            file.write(json.dumps(facts._asdict()))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path / "owner")


def claim_folder(root: str | os.PathLike, owner: str, make: Callable[[Path], Claimed]) -> Claimed:
    """What `make` makes of a node's folder below `root`: the one that `owner` had, else the first that is free, else a new one.

    `make` is to lock the folder, as `DiskTier` does; what its former owner left is found again under any new owner of the
    same secret. Folders are called `node-0`, `node-1` and so on; those in use by others are passed over. Raises what `make`
    raises: it is an error if the owner's own folder is in use still, and if a free one holds segments of another secret or
    version, or cannot be used. Raises OSError where `root` cannot be listed.
    """
    found = {int(name[1]): _facts_of(path).owner for path in Path(root).iterdir() if (name := _NAME.fullmatch(path.name))}
    old = sorted(found, key=lambda number: (found[number] != owner, number))
    new = [number for number in range(len(found) + _ATTEMPTS) if number not in found]  # several, for others may start now too
    for number in [*old, *new]:
        try:
            return make(Path(root) / f"node-{number}")
        except TieredKVError as error:
            if not error.context.get("in_use") or found.get(number) == owner:
                raise
    raise TieredKVError(Kind.STORAGE, f"disk_path: all folders in {root} are in use", setting="disk_path", path=str(root))


def unused_below(root: str | os.PathLike) -> dict[str, int]:
    """Node folders below `root`, of this format or older ones (`tkv-…`), that nobody uses now, and the bytes in each.

    They count against no cap. Nothing is locked to find out: a node that starts now could take that for an owner.
    Raises OSError where they cannot be read.
    """
    folders = [path for path in Path(root).iterdir() if _NAME.fullmatch(path.name) or path.name.startswith("tkv-")]
    lines = map(str.split, Path("/proc/locks").read_text().splitlines())
    locked = {int(line[5].rpartition(":")[2]) for line in lines if line[1] == "FLOCK"}
    unused = [path for path in sorted(folders) if not locked & {file.inode() for file in os.scandir(path) if file.name == "lock"}]
    return {path.name: sum(file.stat().st_size for file in os.scandir(path) if file.is_file()) for path in unused}


def _facts_of(path: Path) -> _Facts:
    """What the folder says of itself; nothing where it says nothing sensible."""
    try:
        facts = json.loads((path / "owner").read_text())
        return _Facts(facts["format"], facts["owner"], facts.get("store"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _Facts()


def _unusable(path: Path, error: OSError) -> TieredKVError:
    hint = f"its parent {path.parent} does not exist" if isinstance(error, FileNotFoundError) else error.strerror
    return TieredKVError(Kind.STORAGE, f"disk_path: {path} cannot be used: {hint}", setting="disk_path", path=str(path))
