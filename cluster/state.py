"""The state files of this machine's clusters: one directory per cluster with its state file, Ray's token and logs.

They are in `$TIERED_KV_STATE`, else `$XDG_STATE_HOME/tiered_kv`, else `~/.local/state/tiered_kv`. Only the owner can
read them (directories 0700, files 0600).
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tiered_kv.cluster.processes import Process
from tiered_kv.errors import Kind, TieredKVError

VERSION = 1
DEFAULT_NAME = "default"
_FILE = "cluster.json"
_TYPES = {
    "cluster_id": str,
    "address": str,
    "created_s": int | float,
    "name": str,
    "node_ips": list,
    "token_path": str | None,
    "owns_ray": bool,
    "processes": list,
    "temp_dir": str | None,
    "config": dict,
    "secret": str,
}
_LATER_FIELDS = {"secret": ""}
"""Fields that state files of older versions lack, each with the value to use instead."""
SECRET_BYTES = 32


@dataclass(frozen=True)
class ClusterState:
    """The state file of one cluster.

    address: "host:port" of Ray. node_ips: the addresses of the Ray nodes on this machine, the head node's first; empty if Ray
    was started by others. owns_ray: whether `tiered-kv up` started Ray. processes: the first process of each Ray node that was
    started (its session's leader); empty unless `owns_ray`. temp_dir: the folder with Ray's files. created_s: seconds since
    1970. config: the settings as the user gave them. secret: 32 random bytes in hexadecimal. With it the cluster's processes
    prove to each other that they are of this cluster. It is "" if an older version started the cluster.
    """

    cluster_id: str
    address: str
    created_s: float
    name: str = DEFAULT_NAME
    node_ips: tuple[str, ...] = ()
    token_path: str | None = None
    owns_ray: bool = False
    processes: tuple[Process, ...] = ()
    temp_dir: str | None = None
    config: dict = field(default_factory=dict)
    secret: str = field(default="", repr=False)

    @property
    def node_ip(self) -> str | None:
        """The address of the Ray node that drivers on this machine join. If it is None, `join_ray` chooses a node."""
        return self.node_ips[0] if self.node_ips else None

    def gone(self) -> list[int]:
        """Returns the pids of the Ray processes that `tiered-kv up` started and that no longer run."""
        return [process.pid for process in self.processes if not process.alive()]

    def has_head(self) -> bool:
        """Returns whether the head node of the Ray that `tiered-kv up` started is running. True if others started Ray."""
        return not self.processes or self.processes[0].alive()

    def alive(self) -> bool:
        """Returns whether all Ray processes started by `tiered-kv up` are running. True if others started Ray."""
        return not self.gone()

    def save(self) -> Path:
        """Write the state file atomically. Returns its path."""
        directory = cluster_dir(self.name)
        handle, temporary = tempfile.mkstemp(prefix=".cluster-", dir=directory)  # mkstemp: 0600
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"version": VERSION} | asdict(self), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, directory / _FILE)
        finally:
            Path(temporary).unlink(missing_ok=True)  # exists only if something failed
        return directory / _FILE


def new_cluster_id() -> str:
    """Returns an id for a new cluster: eight random hexadecimal digits."""
    return secrets.token_hex(4)


def new_secret() -> str:
    """Returns a secret for a new cluster, in hexadecimal."""
    return secrets.token_hex(SECRET_BYTES)


def state_dir(*, create: bool = True) -> Path:
    """Returns the directory with the state of all clusters. With `create`, it is created (mode 0700) if it is missing."""
    own = os.environ.get("TIERED_KV_STATE")
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(own).expanduser() if own else Path(base) / "tiered_kv"
    return _private_dir(path.absolute(), "TIERED_KV_STATE", create)


def cluster_dir(name: str = DEFAULT_NAME) -> Path:
    """Returns the directory of one cluster with its state file, token and logs.

    Creates it (mode 0700) if it is missing.
    """
    state_dir()
    return _private_dir(_cluster_path(name), "TIERED_KV_STATE", create=True)


def _cluster_path(name: str) -> Path:
    """Returns the path of a cluster's directory. Does not create it, so that a mistyped name leaves no folder behind."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name):
        raise TieredKVError(Kind.CONFIG, f"name: a cluster name must be 1 to 40 letters, digits, - and _, got {name!r}", setting="name")
    return state_dir(create=False) / name


def _private_dir(path: Path, setting: str, create: bool) -> Path:
    try:
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise TieredKVError(Kind.CONFIG, f"{setting}: cannot create {path} ({error.strerror})", setting=setting) from error
    if (create or path.exists()) and path.stat().st_uid != os.getuid():
        raise TieredKVError(Kind.CONFIG, f"{setting}: {path} belongs to another user", setting=setting)
    return path


def names() -> list[str]:
    """Returns the names of all clusters that have a state file, sorted."""
    return sorted(path.parent.name for path in state_dir(create=False).glob(f"*/{_FILE}"))


def find(name: str = DEFAULT_NAME) -> ClusterState | None:
    """Returns the state of a cluster, or None if it has no state file.

    Raises `TieredKVError` (kind `cluster`) if the state file is damaged.
    """
    path = _cluster_path(name) / _FILE
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        message = f"TIERED_KV_STATE: must be a folder, but {path.parent.parent} is below a file"
        raise TieredKVError(Kind.CONFIG, message, setting="TIERED_KV_STATE") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, str(error)) from error
    try:
        record = json.loads(text)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    return _of_record(record, path)


def load(name: str = DEFAULT_NAME) -> ClusterState:
    """Returns the state of a cluster.

    Raises `TieredKVError` (kind `cluster`) if its state file is missing or damaged.
    """
    state = find(name)
    if state is None:
        others = f"; there are: {', '.join(names())}" if names() else ""
        raise TieredKVError(Kind.CLUSTER, f"no cluster {name!r} on this machine{others}. Start one with: tiered-kv up", name=name)
    return state


def remove(name: str = DEFAULT_NAME) -> None:
    """Delete the state file, token and logs of a cluster, if there are any."""
    with suppress(FileNotFoundError):
        shutil.rmtree(_cluster_path(name))


@contextmanager
def starting(name: str = DEFAULT_NAME) -> Iterator[None]:
    """Lock the cluster until the end of the with block, in which it is started or stopped.

    The kernel releases the lock if this process dies. Raises `TieredKVError` (kind `cluster`) at once if another process holds it.
    """
    path = _cluster_path(name).with_suffix(".lock")  # next to the directory, which `remove` deletes
    state_dir()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(handle, 32).decode() or "unknown"
            message = f"cluster {name!r} is being started or stopped by another process (pid {holder})"
            raise TieredKVError(Kind.CLUSTER, message, name=name) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _of_record(record: object, path: Path) -> ClusterState:
    if not isinstance(record, dict):
        raise _damaged(path, "not a JSON object")
    version = record.pop("version", None)
    if version != VERSION:
        raise _damaged(path, f"version must be {VERSION}, got {version!r}")
    record = _LATER_FIELDS | record
    if set(record) != set(_TYPES):
        raise _damaged(path, f"missing or unknown fields: {sorted(set(record) ^ set(_TYPES))}")
    for name, expected in _TYPES.items():
        if not isinstance(record[name], expected):
            raise _damaged(path, f"{name} has the wrong type: {record[name]!r}")
    if not re.fullmatch(rf"([0-9a-f]{{{2 * SECRET_BYTES}}})?", record["secret"]):
        raise _damaged(path, f"secret must be {SECRET_BYTES} bytes in hexadecimal")  # its text is not for logs
    if not all(isinstance(ip, str) for ip in record["node_ips"]):
        raise _damaged(path, f"node_ips must be strings, got {record['node_ips']!r}")
    processes = tuple(_process(value, path) for value in record["processes"])
    return ClusterState(**record | {"node_ips": tuple(record["node_ips"]), "processes": processes})


def _process(value: object, path: Path) -> Process:
    whole = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
    if not whole or value[0] < 2 or value[1] < 0:  # a signal to a pid below 2 would reach init or whole process groups
        raise _damaged(path, f"processes must be pairs of pid and start time, got {value!r}")
    return Process(*value)


def _damaged(path: Path, why: str) -> TieredKVError:
    message = f"the cluster's state file {path} cannot be used: {why}. Delete it if the cluster no longer runs"
    return TieredKVError(Kind.CLUSTER, message, path=str(path))
