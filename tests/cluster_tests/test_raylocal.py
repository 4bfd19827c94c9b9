"""Ray processes: starting them, joining with and without the token, and stopping exactly those that were started."""

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tiered_kv.cluster import raylocal
from tiered_kv.cluster.processes import Process, session_members, spawn, stop_sessions
from tiered_kv.cluster.raylocal import OBJECT_STORE_BYTES_MIN, RayProcesses, join_ray, leave_ray, node_resource, probe, start_ray, stop_ray
from tiered_kv.errors import Kind, TieredKVError

SHELL = "/bin/sh"
AUTH = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture
def no_auth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes all authentication settings. Those that the test makes are undone at its end."""
    for key in AUTH:
        monkeypatch.setenv(key, "")  # so that monkeypatch restores the previous value
        monkeypatch.delenv(key)


@pytest.fixture
def spawned(tmp_path: Path) -> Iterator[list[Process]]:
    """Processes that are stopped at the end, also if the test fails."""
    started: list[Process] = []
    yield started
    stop_sessions(started, tmp_path, 0.0)


def shell(script: str, tmp_path: Path, spawned: list[Process]) -> Process:
    """Start a shell script as a session and wait until it writes the line "ready"."""
    ready = tmp_path / f"ready-{len(spawned)}"
    os.mkfifo(ready)
    spawned.append(spawn([SHELL, "-c", script], {"READY": str(ready)}, tmp_path / f"log-{len(spawned)}"))
    assert ready.read_text() == "ready\n"
    return spawned[-1]


def error_of(call, *arguments: object) -> str:
    with pytest.raises(TieredKVError) as caught:
        call(*arguments)
    assert caught.value.kind is Kind.CLUSTER
    return str(caught.value)


# --- processes ---


def test_a_process_is_identified_by_its_start_time() -> None:
    me = Process.of(os.getpid())
    assert me.alive()
    assert not me._replace(start_time=me.start_time - 1).alive()
    with pytest.raises(ProcessLookupError):
        Process.of(2**22 + 1)


def test_a_start_time_is_the_kernels_own_and_stays_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()
    assert Process.of(os.getpid()).start_time == int(fields[19])  # state files of earlier versions hold this number
    boot_s, create_s = psutil.boot_time() + 3600, psutil.Process().create_time() + 3600
    monkeypatch.setattr(psutil, "boot_time", lambda: boot_s)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: create_s)
    assert Process.of(os.getpid()).start_time == int(fields[19])


def test_a_reused_pid_is_never_signalled(tmp_path: Path, spawned: list[Process]) -> None:
    running = shell("echo ready > $READY; exec sleep 1000", tmp_path, spawned)
    earlier = running._replace(start_time=running.start_time - 1)
    earlier.signal(signal.SIGKILL)
    assert session_members(earlier, tmp_path) == []
    assert stop_sessions([earlier], tmp_path, 0.0) == []
    assert running.alive()


def test_a_session_that_ends_by_itself_is_not_killed(tmp_path: Path, spawned: list[Process]) -> None:
    # the child reports ready only as its own program: before that it still has its parent's signal handler
    child = "/bin/sh -c 'echo ready > $READY; exec sleep 1000'"
    leader = shell(f"trap 'kill $!; exit 0' TERM; {child} & wait", tmp_path, spawned)
    assert len(session_members(leader, tmp_path)) == 2
    assert stop_sessions([leader], tmp_path, 10.0) == []
    assert session_members(leader, tmp_path) == []


@pytest.mark.parametrize("wait_s", [0.1, 0.0])
def test_a_process_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path, spawned: list[Process], wait_s: float) -> None:
    leader = shell("trap '' TERM; sleep 1000 & echo ready > $READY; wait", tmp_path, spawned)
    members = session_members(leader, tmp_path)
    assert stop_sessions([leader], tmp_path, wait_s) == sorted(process.pid for process in members)
    assert not any(process.alive() for process in members)


def test_children_of_a_dead_leader_are_found_by_their_open_files_only(tmp_path: Path, spawned: list[Process]) -> None:
    leader = shell("sleep 1000 & echo ready > $READY; wait", tmp_path, spawned)
    leader.signal(signal.SIGKILL)
    os.waitid(os.P_PID, leader.pid, os.WEXITED | os.WNOWAIT)
    assert not leader.alive()
    assert session_members(leader, tmp_path / "elsewhere") == []
    (orphan,) = session_members(leader, tmp_path)  # its output goes to a log below tmp_path
    (tmp_path / "log-0").unlink()
    assert session_members(leader, tmp_path) == [orphan], "also when the log has been deleted"
    assert stop_sessions([leader], tmp_path, 10.0) == []
    assert not orphan.alive()


# --- starting ---


def test_two_nodes_with_private_token_and_logs(ray_cluster) -> None:
    ray = ray_cluster.ray
    assert ray.node_ips == ("127.0.0.2", "127.0.0.3")
    assert all(process.alive() for process in ray.processes)
    for path in (Path(ray.token_path), *ray_cluster.state_dir.glob("*.log")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(ray.temp_dir).stat().st_mode) == 0o700
    probe(ray.address)


@pytest.mark.parametrize(("nodes", "store", "setting"), [(0, OBJECT_STORE_BYTES_MIN, "nodes"), (1, 1 << 20, "object_store_bytes")])
def test_invalid_settings_are_refused_by_name(nodes: int, store: int, setting: str, tmp_path: Path) -> None:
    with pytest.raises(TieredKVError, match=setting):
        start_ray(nodes, store, directory=tmp_path)


def test_a_start_that_fails_stops_what_it_started_and_shows_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temp_dirs: list[Path] = []
    stopped: list[list[Process]] = []
    command = [SHELL, "-c", "echo no room for Ray; exit 3"]
    monkeypatch.setattr(raylocal, "_node_command", lambda *args: temp_dirs.append(args[2]) or command)
    monkeypatch.setattr(raylocal, "stop_ray", lambda started, temp: stopped.append(list(started)) or stop_ray(started, temp))
    message = error_of(lambda: start_ray(1, OBJECT_STORE_BYTES_MIN, directory=tmp_path))
    assert "ended during its start" in message and "no room for Ray" in message
    assert len(stopped[0]) == 1 and not stopped[0][0].alive()
    assert not temp_dirs[0].exists()


def test_an_interrupted_start_stops_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Process] = []
    monkeypatch.setattr(raylocal, "_node_command", lambda *_: [SHELL, "-c", "exec sleep 1000"])

    def interrupt(_index: int, process: Process, *_: object) -> str:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(raylocal, "_wait_ready", interrupt)
    with pytest.raises(KeyboardInterrupt):
        start_ray(1, OBJECT_STORE_BYTES_MIN, directory=tmp_path)
    assert not started[0].alive()


def test_temp_dir_is_short_even_if_tmpdir_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(raylocal.tempfile, "gettempdir", lambda: "/tmp/" + "long" * 20)
    made = raylocal._make_temp_dir()
    made.rmdir()
    assert made.parent == Path("/tmp")


# --- joining ---


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:99999", "ray://host:10001", "auto", "a b:1", None])
def test_malformed_addresses(address: object) -> None:
    assert "--address" in error_of(join_ray, address)


def test_an_address_where_nothing_listens() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "--address" in error_of(join_ray, f"127.0.0.1:{unused.getsockname()[1]}")


def test_an_address_that_listens_but_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "nothing answers" in error_of(probe, f"127.0.0.1:{silent.getsockname()[1]}", 0.05)


def greet_once(server: socket.socket) -> None:
    with server.accept()[0] as connection:
        connection.sendall(b"220 hello")


def test_an_address_of_another_kind_of_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        greeter = threading.Thread(target=greet_once, args=[other])
        greeter.start()
        assert "not Ray" in error_of(probe, address)
        greeter.join()


def test_a_driver_without_the_token_is_refused(ray_cluster, no_auth) -> None:
    message = error_of(join_ray, ray_cluster.ray.address)
    assert "token was refused" in message and "RAY_AUTH_TOKEN_PATH" in message


def test_a_driver_with_a_wrong_token_is_refused_and_may_try_again(ray_cluster, no_auth, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    assert "token was refused" in error_of(join_ray, ray_cluster.ray.address, None, str(wrong))
    assert not any(key in os.environ for key in AUTH)
    assert join_ray(ray_cluster.ray.address, None, ray_cluster.ray.token_path) == "127.0.0.2"
    leave_ray()


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_token_file_that_is_missing_or_empty_is_an_error_and_not_an_abort(ray_cluster, no_auth, tmp_path: Path, content) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    assert str(path) in error_of(join_ray, ray_cluster.ray.address, None, str(path))


def test_a_missing_node(ray_cluster, no_auth) -> None:
    assert "127.0.0.9" in error_of(join_ray, ray_cluster.ray.address, "127.0.0.9", ray_cluster.ray.token_path)


def test_a_driver_reaches_actors_on_both_nodes(joined) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Where:
        def look(self) -> tuple[str, str | None]:
            return ray.util.get_node_ip_address(), os.environ.get("RAY_AUTH_TOKEN_PATH")

    actors = [Where.options(resources={node_resource(index): 0.01}).remote() for index in range(2)]
    assert ray.get([actor.look.remote() for actor in actors], timeout=60) == [(ip, joined.ray.token_path) for ip in joined.ray.node_ips]
    assert ray.get_runtime_context().namespace == "tiered_kv"


def test_joining_twice_is_harmless_and_another_cluster_is_refused(joined) -> None:
    assert join_ray(joined.ray.address, None, joined.ray.token_path) == "127.0.0.2"
    assert "part of another" in error_of(join_ray, "127.0.0.2:1")


def test_a_separate_script_joins_with_only_the_environment(ray_cluster) -> None:
    code = "import ray; ray.init(log_to_driver=False); print(ray.get_runtime_context().gcs_address)"
    environment = os.environ | raylocal.driver_environment(ray_cluster.ray.address, ray_cluster.ray.token_path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ray_cluster.ray.address


# --- two clusters, and stopping ---


def test_stopping_a_second_cluster_leaves_the_first_running(ray_cluster, no_auth, tmp_path: Path) -> None:
    second = start_ray(1, OBJECT_STORE_BYTES_MIN, cpus_per_node=1, directory=tmp_path)
    try:
        assert second.address != ray_cluster.ray.address
        assert "token was refused" in error_of(join_ray, second.address, None, ray_cluster.ray.token_path)
        check_join_and_stop(second)
    finally:
        leave_ray()
        stop_ray(second.processes, second.temp_dir)
    assert all(process.alive() for process in ray_cluster.ray.processes)
    probe(ray_cluster.ray.address)


def check_join_and_stop(second: RayProcesses) -> None:
    """Join, run a detached actor, kill the leader so that orphans are left, and check that `stop_ray` stops them."""
    import ray

    @ray.remote(num_cpus=0)
    class Stays:
        def pid(self) -> int:
            return os.getpid()

    join_ray(second.address, second.node_ips[0], second.token_path)
    actor = Process.of(ray.get(Stays.options(name="stays", lifetime="detached").remote().pid.remote(), timeout=60))
    leave_ray()
    (leader,) = second.processes
    members = session_members(leader, Path(second.temp_dir))
    assert actor in members
    leader.signal(signal.SIGKILL)
    stop_ray(second.processes, second.temp_dir)
    assert not any(process.alive() for process in members)
    assert not Path(second.temp_dir).exists()
    assert stop_ray(second.processes, second.temp_dir) == []


def test_joining_a_ray_without_token_authentication_says_what_it_means(ray_cluster, no_auth, monkeypatch, caplog) -> None:
    with pytest.raises(TieredKVError):  # it has one, which is asked for after the warning
        join_ray(ray_cluster.ray.address)
    assert "has no token authentication: whoever reaches its ports can run code" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert raylocal.text_for_open_ray("10.0.0.1:6379") == ""
    assert not caplog.text


def test_rays_tls_settings_are_passed_to_the_nodes_that_are_started(monkeypatch, tmp_path: Path) -> None:
    tls = {"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": "/c", "RAY_TLS_SERVER_KEY": "/k", "RAY_TLS_CA_CERT": "/a"}
    for name, value in tls.items():
        monkeypatch.setenv(name, value)
    environment = raylocal._ray_environment(tmp_path / "token")
    assert {name: environment[name] for name in tls} == tls
    assert environment["RAY_AUTH_MODE"] == "token"
