"""The folder of a disk tier: who owns it, and that nobody else does."""

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.segments import Files, remove_segment, segments_in

FORMAT = 1
"""Version of what lies in a folder; another one's segments are as good as another owner's."""

_ATTEMPTS = 16


class OwnedFolder:
    """A folder for segments, locked while this object is open. Its file `lock` is locked, its file `owner` says for whom.

    The lock (flock) ends with the process and those forked from it. Segments of the same owner are kept: `inherited` has the bytes of
    each. Those of another owner, whose lock is free and who is therefore dead, are removed. Files with other names are
    left alone. Raises `TieredKVError` (kind `storage`) that names `disk_path` when the folder is in use by others or
    cannot be used.
    """

    def __init__(self, path: str | os.PathLike, owner: str, files: Files) -> None:
        self.path = Path(path)
        self._lock_fd = self._locked()
        try:
            self._take_over(owner, files)
            self.inherited = segments_in(self.path)
        except OSError as error:
            self.close(remove=False)
            raise _unusable(self.path, error) from error

    def close(self, remove: bool) -> None:
        """Unlock the folder; with `remove`, delete it unless other files are in it. A second time does nothing."""
        if self._lock_fd < 0:
            return
        if remove:
            with suppress(OSError):
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
            owner = _owner_of(self.path)[1]
            message = f"disk_path: {self.path} is in use by a live cluster ({owner}); name a folder of its own"
            raise TieredKVError(Kind.STORAGE, message, setting="disk_path", path=str(self.path)) from error
        except FileNotFoundError:
            pass
        finally:
            if not is_ours:
                os.close(fd)
        return is_ours

    def _take_over(self, owner: str, files: Files) -> None:
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise PermissionError(0, "it is not writable")
        if _owner_of(self.path) == (FORMAT, owner):
            return
        for segment in segments_in(self.path):
            remove_segment(self.path, segment, files)
        fresh = self.path / "owner.new"
        fresh.write_text(json.dumps({"format": FORMAT, "owner": owner}))
        fresh.replace(self.path / "owner")


def _owner_of(path: Path) -> tuple[object, object]:
    """Format and owner as the folder says; nobody's where it says nothing sensible."""
    try:
        facts = json.loads((path / "owner").read_text())
        return facts["format"], facts["owner"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, "owner unknown"


def _unusable(path: Path, error: OSError) -> TieredKVError:
    hint = f"its parent {path.parent} does not exist" if isinstance(error, FileNotFoundError) else error.strerror
    return TieredKVError(Kind.STORAGE, f"disk_path: {path} cannot be used: {hint}", setting="disk_path", path=str(path))
