"""Opens the object store of a URL."""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.remote_store import RemoteStore
from tiered_kv.tiers.objects.store import CHECKPOINT, OBJECTS, MemoryStore, ObjectStore, role_of

READ_DEADLINE_S = 10.0
WRITE_DEADLINE_S = 120.0
_REMOTE = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):")


def open_store(
    url: str,
    below: str = "",
    *,
    setting: str = OBJECTS,
    create: bool = True,
    environ: Mapping[str, str] | None = None,
    read_deadline_s: float = READ_DEADLINE_S,
    write_deadline_s: float = WRITE_DEADLINE_S,
) -> ObjectStore:
    """Open the object store of `s3://bucket/prefix`, `gs://…`, `az://…`, `file:///folder`, a folder path, or `memory://` (a new store).

    `below`: appended to the prefix, for example a node's name. `setting`: the setting that error texts name. It also tells
    whether the store is for the objects tier or for checkpoints (`store.role_of`); checkpoints cannot be in memory. `create`:
    whether to create a missing folder, which must be writable. `environ`: credentials of another process
    (`credentials.credentials`), used instead of this process's own. The deadlines apply to remote stores.

    Raises (kind `config`) for other URLs, or if a remote URL needs a library that is not installed; (kind `storage`) for a
    folder that cannot be used.
    """
    named = _SCHEME.match(url)
    scheme = named["scheme"].lower() if named else ""
    parts = urlsplit(url)
    if scheme in _REMOTE:
        if not url[len(scheme) :].startswith("://") or not parts.netloc:
            raise _unknown(url, setting)
        if "@" in parts.netloc and not scheme.startswith("abfs"):
            message = f"{role_of(setting)}: the URL must contain no credentials, because logs show URLs; set them in the environment"
            raise TieredKVError(Kind.CONFIG, message, setting=setting)
        whole = scheme + url[len(scheme) :].rstrip("/") + (f"/{below}" if below else "")
        deadlines = {"read_deadline_s": read_deadline_s, "write_deadline_s": write_deadline_s}
        return RemoteStore(whole, setting=setting, environ=environ, **deadlines)
    if scheme == "memory" and role_of(setting) != CHECKPOINT:
        return MemoryStore(url)
    if named and (scheme != "file" or parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment):
        raise _unknown(url, setting)
    folder = unquote(parts.path) if named else url
    if not folder.strip():
        raise _unknown(url, setting)
    return FolderStore(Path(folder).expanduser() / below, setting=setting, create=create)


def _unknown(url: str, setting: str) -> TieredKVError:
    places = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder, or a folder's path"
    meant = _SCHEME.match(url) and f" (a folder of that name: ./{url})"
    message = f"{role_of(setting)}: {url!r} is not the URL of an object store; expected {places}{meant or ''}"
    return TieredKVError(Kind.CONFIG, message, setting=setting)
