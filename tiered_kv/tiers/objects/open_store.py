"""Which object store a URL means."""

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
    """The store of `s3://bucket/prefix`, `gs://…`, `az://…`, `file:///folder`, a plain folder path, or `memory://` (a new one).

    `below`: a further part of the prefix, such as a node's own. `setting`: what errors name, and whose place this is
    (`objectstore.role_of`); memory is no place for checkpoints. `create`: whether a folder that is not there is made, and must be
    writable. `environ`: credentials of somebody else (`credentials.credentials`), instead of this process's. The deadlines hold for
    what is reached over the network.

    Raises (kind `config`) for other URLs, and without the library that a remote one needs; (kind `storage`) for a folder that
    cannot be used.
    """
    named = _SCHEME.match(url)
    scheme = named["scheme"].lower() if named else ""
    parts = urlsplit(url)
    if scheme in _REMOTE:
        if not url[len(scheme) :].startswith("://") or not parts.netloc:
            raise _unknown(url, setting)
        if "@" in parts.netloc and not scheme.startswith("abfs"):
            message = f"{role_of(setting)}: no credentials in a URL, please: everybody would see them; they belong into the environment"
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
    message = f"{role_of(setting)}: {url!r} is no place for objects; possible are {places}{meant or ''}"
    return TieredKVError(Kind.CONFIG, message, setting=setting)
