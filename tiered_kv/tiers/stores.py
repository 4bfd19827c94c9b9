"""Which object store a URL means."""

from urllib.parse import unquote, urlsplit

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.folderstore import FolderStore
from tiered_kv.tiers.objectstore import MemoryStore, ObjectStore
from tiered_kv.tiers.remotestore import RemoteStore

READ_DEADLINE_S = 10.0
WRITE_DEADLINE_S = 120.0
_REMOTE = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss")


def open_store(
    url: str, below: str = "", *, read_deadline_s: float = READ_DEADLINE_S, write_deadline_s: float = WRITE_DEADLINE_S
) -> ObjectStore:
    """The store of `s3://bucket/prefix`, `gs://…`, `az://…`, `file:///folder`, a plain folder path, or `memory://` (a new one).

    `below`: a further part of the prefix, such as a node's own. The deadlines hold for what is reached over the network.
    Raises (kind `config`, setting `objects`) for other URLs, and without the library that a remote one needs; (kind
    `storage`) for a folder that cannot be used.
    """
    scheme, rest = urlsplit(url).scheme, url.rstrip("/")
    if scheme in _REMOTE:
        if not urlsplit(url).netloc:
            raise _unknown(url)
        whole = f"{rest}/{below}" if below else rest
        return RemoteStore(whole, read_deadline_s=read_deadline_s, write_deadline_s=write_deadline_s)
    if scheme == "memory":
        return MemoryStore(url)
    folder = unquote(urlsplit(url).path) if scheme == "file" and not urlsplit(url).netloc else url
    if not folder or "://" in folder:
        raise _unknown(url)
    return FolderStore(f"{folder}/{below}")


def _unknown(url: str) -> TieredKVError:
    message = f"objects: {url!r} is no place for objects; s3://bucket/prefix, gs://…, az://…, file:///folder, or a folder's path"
    return TieredKVError(Kind.CONFIG, message, setting="objects")
