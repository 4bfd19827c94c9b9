"""Ray on this machine: start and stop a local cluster on loopback addresses, and join a cluster as a driver.

Facts about Ray 2.60 that shape this module:

* A node at 127.0.0.1 hangs. Nodes at 127.0.0.2 and above work.
* Ray listens on all interfaces even then, so token authentication is always on.
* A driver with a wrong token, address or node retries for 20 to 60 s, so all three are checked before `ray.init`.
* A token file that cannot be read aborts the process.
"""

import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tiered_kv.cluster.processes import Process, spawn, stop_sessions
from tiered_kv.errors import Kind, TieredKVError

log = logging.getLogger(__name__)

NAMESPACE = "tiered_kv"
NODES_MAX = 200
OBJECT_STORE_BYTES_MIN = 75 << 20
START_TIMEOUT_S = 60.0
STOP_WAIT_S = 8.0
PROBE_TIMEOUT_S = 3.0

_TEMP_PREFIX = "tkv-ray-"
_TEMP_ROOT_CHARS_MAX = 34  # Ray appends up to 70 characters to its sockets' paths, and the kernel allows 107
_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_LEAN = {
    "RAY_enable_worker_prestart": "0",  # otherwise Ray starts one idle process of 80 MB per CPU and driver
    "RAY_prestart_worker_first_driver": "0",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # otherwise SIGTERM waits up to 30 s for actors to end
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # otherwise 15, and a cache node beside busy workers gets 3 % of a core
}


@dataclass(frozen=True)
class RayProcesses:
    """A local Ray cluster that this package has started.

    `processes`: the leaders of its nodes' sessions, one per node, the head node's first.
    """

    address: str
    node_ips: tuple[str, ...]
    token_path: str
    temp_dir: str
    processes: tuple[Process, ...]


def node_resource(index: int) -> str:
    """Returns the name of a custom resource that only node `index` of a local cluster has (quantity 1).

    Actors that require the resource are placed on that node.
    """
    return f"tiered_kv_node_{index}"


def start_ray(nodes: int, object_store_bytes: int, cpus_per_node: int | None = None, *, directory: Path) -> RayProcesses:
    """Start a local Ray cluster of `nodes` nodes at 127.0.0.2, 127.0.0.3, … The cluster outlives this process.

    The token (mode 0600) and one log per node are written to `directory`. `cpus_per_node`: None means all CPUs of the
    machine. Takes about 3 s for the head node, and 3 s more for all other nodes together. Any number of clusters may run side by
    side. If the start fails or is interrupted, every started process is stopped again. Raises `TieredKVError` (kind `config`
    or `cluster`).
    """
    if not 1 <= nodes <= NODES_MAX:
        raise TieredKVError(Kind.CONFIG, f"nodes: must be 1 to {NODES_MAX}, got {nodes}", setting="nodes")
    if object_store_bytes < OBJECT_STORE_BYTES_MIN:
        message = f"object_store_bytes: must be at least {OBJECT_STORE_BYTES_MIN} (75 MiB, Ray's minimum), got {object_store_bytes}"
        raise TieredKVError(Kind.CONFIG, message, setting="object_store_bytes")
    token_path = _write_token(directory)
    started: list[Process] = []
    with ExitStack() as undo:
        temp_dir = _make_temp_dir()
        undo.callback(lambda: stop_ray(started, str(temp_dir)))

        deadline_s = time.monotonic() + START_TIMEOUT_S
        command = _node_command(0, HEAD_ROLE, temp_dir, object_store_bytes, cpus_per_node)
        started.append(spawn(command, _ray_environment(token_path), directory / "ray-node-0.log"))
        address = _wait_ready(0, started[0], temp_dir, directory, deadline_s)
        joining = _Joining(address, str(token_path), str(temp_dir), directory, object_store_bytes, cpus_per_node)
        started += _join_nodes(range(1, nodes), joining, deadline_s)
        undo.pop_all()
    return RayProcesses(address, tuple(local_ip(i) for i in range(nodes)), str(token_path), str(temp_dir), tuple(started))


HEAD_ROLE = ["--head", "--port=0", "--include-dashboard=false", "--no-monitor"]


class _Joining(NamedTuple):
    """The arguments with which a Ray node is started that joins a local cluster."""

    address: str
    token_path: str
    temp_dir: str
    directory: Path
    object_store_bytes: int
    cpus_per_node: int | None = None


def add_nodes(indexes: Sequence[int], ray: RayProcesses, object_store_bytes: int, *, directory: Path) -> list[Process]:
    """Start new nodes of a local cluster, or restart nodes that have ended. Returns their processes.

    `indexes`: the numbers of these nodes, which determine their addresses (`local_ip`). If one node does not start, all of
    `indexes` are stopped again. Raises what `start_ray` raises.
    """
    if any(not 1 <= index < NODES_MAX for index in indexes):
        raise TieredKVError(Kind.CONFIG, f"nodes: must be 1 to {NODES_MAX}, got {max(indexes) + 1}", setting="nodes")
    for index in indexes:
        shutil.rmtree(_node_dir(Path(ray.temp_dir), index), ignore_errors=True)  # a former address file would look new to `_wait_ready`
    joining = _Joining(ray.address, ray.token_path, ray.temp_dir, directory, object_store_bytes)
    return _join_nodes(indexes, joining, time.monotonic() + START_TIMEOUT_S)


def _join_nodes(indexes: Iterable[int], joining: _Joining, deadline_s: float) -> list[Process]:
    """Start nodes that join a head node, all at once. Returns their processes. If one node does not start, stops all of them."""
    temp_dir, started = Path(joining.temp_dir), {}
    with ExitStack() as undo:
        undo.callback(lambda: stop_sessions(started.values(), temp_dir, STOP_WAIT_S))
        for index in indexes:
            role = [f"--address={joining.address}"]
            command = _node_command(index, role, temp_dir, joining.object_store_bytes, joining.cpus_per_node)
            environment = _ray_environment(Path(joining.token_path))
            started[index] = spawn(command, environment, joining.directory / f"ray-node-{index}.log")
        for index, process in started.items():
            _wait_ready(index, process, temp_dir, joining.directory, deadline_s)
        undo.pop_all()
    return list(started.values())


def stop_ray(processes: Iterable[Process], temp_dir: str | None, wait_s: float = STOP_WAIT_S) -> list[int]:
    """Stop exactly the sessions of these leaders (see `start_ray`) and delete their temporary directory. Safe to repeat.

    Takes about 2 s, at most twice `wait_s`. A process that has joined the cluster should leave it first. Returns the
    pids that did not end after SIGTERM and were killed. Ray's plasma files need no cleanup: they are already unlinked,
    and the kernel frees them when their process ends.
    """
    directory = Path(temp_dir or "/nonexistent")
    killed = stop_sessions(processes, directory, wait_s)
    if directory.name.startswith(_TEMP_PREFIX) and directory.is_dir() and directory.stat().st_uid == os.getuid():
        shutil.rmtree(directory, ignore_errors=True)
    return killed


def local_ip(index: int) -> str:
    """Returns the address of node `index` of a local cluster."""
    return f"127.0.0.{index + 2}"


def _node_command(index: int, role: list[str], temp_dir: Path, object_store_bytes: int, cpus: int | None) -> list[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *role, "--block", f"--node-ip-address={local_ip(index)}"]
    command += ["--disable-usage-stats", "--include-log-monitor=false", f"--object-store-memory={object_store_bytes}"]
    # one temporary directory per node keeps the nodes' sockets and their ready files apart
    command += [f"--temp-dir={_node_dir(temp_dir, index)}", f'--resources={{"{node_resource(index)}": 1}}']
    return command if cpus is None else [*command, f"--num-cpus={cpus}"]


def _node_dir(temp_dir: Path, index: int) -> Path:
    return temp_dir / str(index)


def _ray_environment(token_path: Path) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in {"RAY_ADDRESS", *_AUTH_VARIABLES}}
    return _LEAN | inherited | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)}


def _write_token(directory: Path) -> Path:
    path = directory / "token"
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


def _make_temp_dir() -> Path:
    """Create a directory (mode 0700) for Ray's files. Its path is short enough for Ray's sockets. Returns the path."""
    for base in (tempfile.gettempdir(), "/tmp"):
        if len(base) + len("/" + _TEMP_PREFIX) + 8 <= _TEMP_ROOT_CHARS_MAX and os.access(base, os.W_OK):
            return Path(tempfile.mkdtemp(prefix=_TEMP_PREFIX, dir=base))
    message = f"TMPDIR: Ray's sockets need a short path; set it to a writable folder of at most {_TEMP_ROOT_CHARS_MAX - 17} characters"
    raise TieredKVError(Kind.CONFIG, message, setting="TMPDIR")


def _wait_ready(index: int, process: Process, temp_dir: Path, directory: Path, deadline_s: float) -> str:
    """Wait until a node has written the address of its cluster. Returns the address."""
    address_file = _node_dir(temp_dir, index) / "ray_current_cluster"
    while True:
        running = process.alive()
        text = address_file.read_text() if address_file.exists() else ""
        if text.rpartition(":")[2].isdigit() and running:
            return text
        if not running or time.monotonic() > deadline_s:
            log = directory / f"ray-node-{index}.log"
            why = "ended during its start" if not running else f"was not up after {START_TIMEOUT_S:.0f} s"
            message = f"Ray node {index} {why}; the last lines of {log}:\n{_tail(log)}"
            raise TieredKVError(Kind.CLUSTER, message, log=str(log), node=index)
        time.sleep(0.02)


def _tail(path: Path) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-15:])


def join_ray(address: str, node_ip: str | None = None, token_path: str | None = None) -> str:
    """Join a Ray cluster as a driver in the namespace "tiered_kv". Returns the address of the joined node.

    node_ip: the Ray node on this machine to join; None searches for one. token_path: the file with the cluster's token;
    None uses the settings in the environment. The token's path stays in the environment, for later child processes.
    Takes 0.1 to 0.7 s. If this process has already joined the same cluster, nothing happens. Raises `TieredKVError`
    (kind `cluster`) within seconds if the address is malformed or does not answer, if the token is refused, or if no
    Ray node runs on this machine.
    """
    parse_address(address)
    joined = _joined()
    if joined is not None:
        return _stay(joined, address)
    probe(address)
    import ray

    with _authentication(token_path) as kept:
        if open_text := text_for_open_ray(address):
            log.warning("%s", open_text)
        node_ip = _node_to_join(_nodes_alive(address), node_ip, address)
        before = _set_environment({"RAY_gcs_server_port_wait_time_s": "5"})  # limits Ray's own retries, by default 20 s
        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="WARNING", _node_ip_address=node_ip)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise _cannot_join(address, str(error)) from error
        finally:
            _set_environment(before)
        kept.pop_all()
    return node_ip


def text_for_open_ray(address: str) -> str:
    """Returns a warning if the environment sets no token authentication for the Ray at `address`, else ""."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return ""
    return (
        f"the Ray at {address} has no token authentication: whoever reaches its ports can run code as the user of its nodes, so read and"
        " change all cached blocks of all tenants. Start Ray with RAY_AUTH_MODE=token, or let only trusted machines reach it"
    )


def driver_environment(address: str, token_path: str | None) -> dict[str, str]:
    """Returns the environment variables with which a plain `ray.init()` joins the cluster.

    Set them before Ray is imported.
    """
    token = {} if token_path is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path}
    return {"RAY_ADDRESS": address} | token


def is_joined() -> bool:
    """Returns whether this process has joined a Ray cluster."""
    return _joined() is not None


def leave_ray() -> None:
    """Leave the cluster that this process has joined. Does nothing if it has joined none."""
    if _joined() is not None:
        import ray

        ray.shutdown()


def parse_address(address: str) -> tuple[str, int]:
    """Returns the host and the port in the text "host:port".

    Raises `TieredKVError` (kind `cluster`) for any other form, such as ray://.
    """
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    host = host.removeprefix("[").removesuffix("]")
    if not host or "/" in host or any(letter.isspace() for letter in host) or not (port.isdecimal() and 0 < int(port) < 65536):
        raise TieredKVError(Kind.CLUSTER, f"--address: must be host:port, for example 10.0.0.5:6379, got {address!r}", address=address)
    return host, int(port)


def probe(address: str, timeout_s: float = PROBE_TIMEOUT_S) -> None:
    """Raise `TieredKVError` (kind `cluster`) unless a gRPC server, which Ray is, answers at `address` within `timeout_s`."""
    host, port = parse_address(address)
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            connection.settimeout(timeout_s)
            # a gRPC server sends first: an HTTP/2 SETTINGS frame, type 4 in its fourth byte (RFC 9113, 4.1)
            greeting = b"\0\0\0\4" if _uses_tls() else connection.recv(9)
    except OSError as error:
        raise _cannot_join(address, f"nothing answers at this address ({error.strerror or error})") from error
    if greeting[3:4] != b"\4":
        raise _cannot_join(address, "the server at this address is not Ray")


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _cannot_join(address: str, why: str) -> TieredKVError:
    return TieredKVError(Kind.CLUSTER, f"cannot join the Ray cluster at --address {address}: {why}", address=address)


def _joined() -> str | None:
    """Returns the address of the cluster that this process has joined, or None. Does not import ray."""
    ray = sys.modules.get("ray")
    return ray.get_runtime_context().gcs_address if ray is not None and ray.is_initialized() else None


def _stay(joined: str, address: str) -> str:
    if parse_address(joined) != parse_address(address):
        raise _cannot_join(address, f"this process is part of another cluster, {joined}; leave it first with ray.shutdown()")
    import ray

    return ray.util.get_node_ip_address()


def _nodes_alive(address: str) -> list:
    """Returns Ray's records of the live nodes. Does not retry, so that a refused token is reported at once."""
    import ray
    from ray._raylet import GcsClient

    try:
        nodes = GcsClient(address=address).get_all_node_info(timeout=PROBE_TIMEOUT_S).values()
    except ray.exceptions.AuthenticationError as error:
        message = "the token was refused or is missing. Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the cluster's token file"
        raise _cannot_join(address, message) from error
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        raise _cannot_join(address, str(error)) from error
    return [node for node in nodes if node.state == node.ALIVE]


def _node_to_join(nodes: list, node_ip: str | None, address: str) -> str:
    """Returns the address of a node on this machine: `node_ip` if given, else the head node if it is local, else any."""
    here = sorted((not node.is_head_node, node.node_manager_address) for node in nodes if os.path.exists(node.raylet_socket_name))
    found = [ip for _, ip in here if node_ip in (None, ip)]
    if not found:
        wanted = "no Ray node" if node_ip is None else f"no Ray node {node_ip}"
        raise _cannot_join(address, f"{wanted} runs on this machine; to start one: ray start --address={address}")
    return found[0]


@contextmanager
def _authentication(token_path: str | None) -> Iterator[ExitStack]:
    """Set Ray's authentication from a token file, and undo it at the end of the with block.

    Yields the stack of undo steps. If the caller empties it (`pop_all`), the authentication stays. None as `token_path` leaves the
    environment as it is.
    """
    with ExitStack() as undo:
        if token_path is not None:
            undo.callback(_reload_authentication)
            before = _set_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": token_path})
            undo.callback(_set_environment, before)
        _check_token()
        _reload_authentication()
        yield undo


def _check_token() -> None:
    """Raise (kind `cluster`) if Ray is set to use a token but has none: Ray itself would abort the process."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        empty = not path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TieredKVError(Kind.CLUSTER, f"Ray's token file {path} cannot be read: {error}", path=str(path)) from error
    if empty:
        raise TieredKVError(Kind.CLUSTER, f"Ray's token file {path} is empty", path=str(path))


def _reload_authentication() -> None:
    """Make Ray read its authentication settings again. By default it keeps the settings that it read when it was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _set_environment(changes: dict[str, str | None]) -> dict[str, str | None]:
    """Set environment variables; None unsets one. Returns the previous values in the same form."""
    before = {key: os.environ.get(key) for key in changes}
    for key, value in changes.items():
        os.environ.pop(key, None)
        if value is not None:
            os.environ[key] = value
    return before
