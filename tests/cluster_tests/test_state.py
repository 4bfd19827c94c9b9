"""The cluster's state file: private, written atomically, refused if damaged, locked while a cluster starts."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tiered_kv.cluster import state
from tiered_kv.cluster.processes import Process
from tiered_kv.cluster.state import ClusterState
from tiered_kv.errors import Kind, TieredKVError


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def a_state(**changes: object) -> ClusterState:
    given = ClusterState(
        cluster_id=state.new_cluster_id(),
        address="127.0.0.2:6379",
        created_s=1.5,
        node_ips=("127.0.0.2", "127.0.0.3"),
        token_path="/somewhere/token",
        owns_ray=True,
        processes=(Process.of(os.getpid()),),
        temp_dir="/tmp/tkv-ray-x",
        config={"host": 1 << 20},
        secret=state.new_secret(),
    )
    return replace(given, **changes)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_saved_state_is_loaded_unchanged_and_private() -> None:
    saved = a_state()
    path = saved.save()
    assert state.load() == saved
    assert (mode(path), mode(path.parent), mode(path.parent.parent)) == (0o600, 0o700, 0o700)
    assert [entry.name for entry in path.parent.iterdir()] == ["cluster.json"]


def test_the_secret_is_new_for_each_cluster_and_not_shown() -> None:
    first, second = a_state(), a_state()
    assert len(bytes.fromhex(first.secret)) == 32 and first.secret != second.secret
    assert first.secret not in repr(first)


def test_a_state_file_of_an_older_version_has_no_secret() -> None:
    path = a_state().save()
    record = json.loads(path.read_text())
    del record["secret"]
    path.write_text(json.dumps(record))
    assert state.load().secret == ""


@pytest.mark.parametrize("secret", ["ab", "x" * 64, "0" * 63])
def test_a_damaged_secret_is_refused_and_not_repeated(secret: str) -> None:
    a_state(secret=secret).save()
    with pytest.raises(TieredKVError, match="secret must be 32 bytes") as caught:
        state.load()
    assert caught.value.kind is Kind.CLUSTER and f"got {secret}" not in str(caught.value)


def test_a_cluster_on_a_ray_of_others_has_no_processes() -> None:
    saved = a_state(owns_ray=False, processes=(), node_ips=(), token_path=None, temp_dir=None)
    saved.save()
    assert state.load() == saved
    assert saved.node_ip is None and saved.alive()


def test_several_clusters_have_separate_states() -> None:
    a_state().save()
    other = a_state(name="other")
    other.save()
    assert state.names() == ["default", "other"]
    state.remove("default")
    assert state.names() == ["other"]
    assert state.load("other") == other
    state.remove("default")


def test_alive_compares_pids_and_start_times() -> None:
    me = Process.of(os.getpid())
    assert a_state().alive()
    gone = a_state(processes=(me, me._replace(start_time=me.start_time + 1)))
    assert gone.gone() == [me.pid] and not gone.alive()


def test_the_error_for_a_missing_cluster_names_the_command_and_other_clusters() -> None:
    assert state.find() is None
    a_state(name="other").save()
    with pytest.raises(TieredKVError, match=r"there are: other.*tiered-kv up") as caught:
        state.load()
    assert caught.value.kind is Kind.CLUSTER


@pytest.mark.parametrize("name", ["", "../up", "a/b", "a.b", "-x", "x" * 41])
def test_names_that_are_no_directory_names_are_refused(name: str) -> None:
    with pytest.raises(TieredKVError, match="name: a cluster name must be"):
        state.find(name)


DAMAGES = {
    "version": 99,
    "address": 5,
    "created_s": "today",
    "owns_ray": "yes",
    "config": [],
    "node_ips": [1],
    "processes": [[1, 5]],
    "token_path": 7,
    "unknown": 1,
}


@pytest.mark.parametrize(("field", "value"), DAMAGES.items())
def test_a_damaged_field_is_refused_by_name(field: str, value: object) -> None:
    path = a_state().save()
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(TieredKVError, match=field) as caught:
        state.load()
    assert caught.value.kind is Kind.CLUSTER and str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"version": 1}', b'{"version": 1, "processes": [[-1, 0]]}'])
def test_a_damaged_file_is_refused(content: bytes) -> None:
    path = a_state().save()
    path.write_bytes(content)
    with pytest.raises(TieredKVError, match="cannot be used"):
        state.find()


@pytest.mark.parametrize("processes", [[[-1, 0]], [[0, 0]], [[5]], [5], [["5", 1]], [[True, 1]]])
def test_a_pid_of_unrelated_processes_is_refused(processes: list) -> None:
    path = a_state().save()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": processes}))
    with pytest.raises(TieredKVError, match="processes"):
        state.load()


def test_a_failed_save_keeps_the_previous_file(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = a_state()
    path = saved.save()
    with pytest.raises(TypeError):
        a_state(config={"what": object()}).save()
    assert state.load() == saved
    assert [entry.name for entry in path.parent.iterdir()] == ["cluster.json"]


def test_only_one_process_starts_a_cluster_at_a_time() -> None:
    code = "from tiered_kv.cluster import state\nwith state.starting(): pass"
    with state.starting(), state.starting("other"):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"being started or stopped by another process (pid {os.getpid()})" in second.stderr
    with state.starting():
        state.remove()


def test_state_dir_falls_back_to_xdg_and_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TIERED_KV_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state.state_dir() == tmp_path / "xdg" / "tiered_kv"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state.state_dir() == tmp_path / "home" / ".local" / "state" / "tiered_kv"


def test_a_state_dir_that_cannot_be_created_names_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "file" / "state"))
    with pytest.raises(TieredKVError, match="TIERED_KV_STATE"):
        state.find()


def test_the_package_refuses_to_be_imported_under_another_name() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import cluster"
    top = str(Path(state.__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", code, top], capture_output=True, text=True, check=False)
    assert "import this package as tiered_kv.cluster" in done.stderr


def test_importing_loads_neither_torch_nor_ray() -> None:
    code = "import sys, tiered_kv.cluster.raylocal, tiered_kv.cluster.state; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


LATER = ["actors.coordinator", "checkpoint.restore", "checkpoint.take", "cluster.survey", "node.codec_plan", "protocol.unix_socket"]
"""What commands import when they run, and the coordinator's process."""


def test_commands_and_the_coordinator_run_without_torch() -> None:
    """Importing torch takes two seconds, by which every `tiered-kv status` and every restart of the coordinator would be longer."""
    modules = ", ".join(f"tiered_kv.{name}" for name in LATER)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
