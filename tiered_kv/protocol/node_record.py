"""The record that a node writes beside its socket. With it, a worker on the same machine attaches without a call to Ray.

The file is `node.json` (mode 0600) in the node's directory in shared memory. The header of the node's index shows whether the node is
alive.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.shared import peek
from tiered_kv.protocol.messages import NodeInfo
from tiered_kv.protocol.session import PROTOCOL

FORMAT = 1
FILE_NAME = "node.json"
BYTES_MAX = 1 << 20
_INFO = {
    "node": str,
    "directory": str,
    "disk_folder": str | None,
    "has_device": bool,
    "block_tokens": int,
    "fetch_deadline_ms": int | float,
    "store_wait_ms": int | float,
}


@dataclass(frozen=True)
class NodeRecord:
    """One node of a cluster. `ray_address`, `ray_node_id`: where Ray runs it, None without Ray."""

    cluster: str
    cluster_id: str
    node_id: str
    info: NodeInfo
    ray_address: str | None = None
    ray_node_id: str | None = None
    pid: int = field(default_factory=os.getpid)
    protocol: int = PROTOCOL
    package: str = field(default_factory=lambda: version("tiered_kv"))

    @property
    def directory(self) -> str:
        """The folder of the node's files."""
        return self.info["directory"]

    def age_s(self, now_ns: int) -> float:
        """Returns the seconds since the node's last heartbeat, at `now_ns` on the monotonic clock; infinity for a node that has ended."""
        header = peek(self.directory)
        return header.age_s(now_ns) if header else float("inf")


_TYPES = {
    "cluster": str,
    "cluster_id": str,
    "node_id": str,
    "info": dict,
    "ray_address": str | None,
    "ray_node_id": str | None,
    "pid": int,
    "protocol": int,
    "package": str,
}


def write_record(record: NodeRecord) -> None:
    """Write the record into the node's directory, atomically. Raises (kind `memory`) if the directory cannot be written to."""
    path = Path(record.directory) / FILE_NAME
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump({"format": FORMAT} | asdict(record), file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        raise TieredKVError(Kind.MEMORY, f"shm_path: cannot write {path} ({error.strerror})", setting="shm_path") from error


def read_record(directory: str | Path) -> NodeRecord | None:
    """Returns the record in a node's directory; None if it is missing, incomplete, of another format or of another user."""
    path = Path(directory) / FILE_NAME
    try:
        status = os.lstat(directory)
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return None
        with path.open("rb") as file:
            found: Any = json.loads(file.read(BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.pop("format", None) != FORMAT or set(found) != set(_TYPES):
        return None
    info = found["info"]
    are_valid = all(isinstance(found[name], kind) for name, kind in _TYPES.items())
    if not are_valid or not all(isinstance(info.get(name, ...), kind) for name, kind in _INFO.items()):
        return None
    return NodeRecord(**found | {"info": cast(NodeInfo, info | {"directory": str(directory)})})


def records_below(shm_path: str | Path) -> Iterator[NodeRecord]:
    """Yields the records of all nodes of this user whose files are below `shm_path`, including nodes that have ended."""
    for path in sorted(Path(shm_path).glob(f"tkv-*/{FILE_NAME}")):
        record = read_record(path.parent)
        if record is not None:
            yield record
