"""The record that a node leaves beside its socket: all that a worker on the same machine needs to attach, without asking Ray.

`node.json` (0600) in the node's directory in shared memory. Whether the node lives stands in the header of its index.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.shared import peek
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
    """One node of a cluster. `info`: as `Node.info`. `ray_address`, `ray_node_id`: where it runs, None without Ray."""

    cluster: str
    cluster_id: str
    node_id: str
    info: dict
    ray_address: str | None = None
    ray_node_id: str | None = None
    pid: int = field(default_factory=os.getpid)
    protocol: int = PROTOCOL
    package: str = field(default_factory=lambda: version("tiered_kv"))

    @property
    def directory(self) -> str:
        """Where the node's files are."""
        return self.info["directory"]

    def age_s(self, now_ns: int) -> float:
        """Seconds since the node last said that it lives, at `now_ns` on the monotonic clock; infinite for one that has ended."""
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
    """Leave the record in the node's directory, whole or not at all. Raises (kind `memory`) where that cannot be written."""
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
    """The record in a node's directory; None if there is none that this user's node has written, whole and in this format."""
    path = Path(directory) / FILE_NAME
    try:
        facts = os.lstat(directory)
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
            return None
        with path.open("rb") as file:
            told = json.loads(file.read(BYTES_MAX))
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or told.pop("format", None) != FORMAT or set(told) != set(_TYPES):
        return None
    info = told["info"]
    are_right = all(isinstance(told[name], kind) for name, kind in _TYPES.items())
    if not are_right or not all(isinstance(info.get(name, ...), kind) for name, kind in _INFO.items()):
        return None
    return NodeRecord(**told | {"info": info | {"directory": str(directory)}})


def records_below(shm_path: str | Path) -> Iterator[NodeRecord]:
    """The records of all nodes of this user whose files are below `shm_path`, also of those that have ended."""
    for path in sorted(Path(shm_path).glob(f"tkv-*/{FILE_NAME}")):
        record = read_record(path.parent)
        if record is not None:
            yield record
