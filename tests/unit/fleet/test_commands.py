"""`drain`, a second `up`, `down` and mistyped names on the command line, with a stand-in for Ray."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.fleet.ground import Clock, Ground
from tiered_kv.cluster import attach, draining, resume, start, state, stop
from tiered_kv.cluster.commands import cli
from tiered_kv.cluster.commands.fleet import given_settings
from tiered_kv.cluster.state import ClusterState
from tiered_kv.config import Config
from tiered_kv.coordinator.keeper import Keeper
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.handover import EndReport, Inventory
from tiered_kv.protocol.messages import BlockRun


class Fleet:
    """A cluster of nodes whose keeper is real. `calls` lists the calls to nodes; `config` are its settings."""

    def __init__(self, ground: Ground, keeper: Keeper) -> None:
        self.ground, self.keeper = ground, keeper
        self.config = Config()
        self.calls: list[tuple[str, str]] = []
        self.interrupt: BaseException | None = None
        self.room_bytes = 100

    def describe(self, *_: Any) -> dict:
        self.keeper.step()
        tiers = {"host": {"used_bytes": 0, "capacity_bytes": self.room_bytes}}
        nodes = [{"node": node, "stats": {"tiers": tiers}} for node in sorted(self.ground.reporting())]
        return {"cluster_id": "c1", "config": self.config, "nodes": nodes, "lost": {}, "fleet": self.keeper.status()}

    def call_coordinator(self, name: str, method: str, *arguments: Any) -> Any:
        defaults = {"drain": (True,)}.get(method, ()) if len(arguments) == 1 else ()
        answer = getattr(self.keeper, method)(*arguments, *defaults)
        self.keeper.step()
        return answer

    def calls_to(self, name: str, within_s: float) -> Any:
        def ask(nodes: Any, method: str, *arguments: Any) -> dict[str, Any]:
            self.calls += [(node, method) for node in nodes]
            if self.interrupt:
                raise self.interrupt
            run = BlockRun(b"r" * 32, 10, None, [bytes([number]) * 32 for number in range(4)], 0)
            answers = {"inventory": Inventory([run], {}), "take_over": 4, "close": EndReport("x", lost=2, lost_bytes=20)}
            return {node: answers[method] for node in nodes}

        return ask


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fleet:
    """Two nodes that serve."""
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ground = Ground()
    ground.join("10.0.0.1", is_head=True)
    ground.join("10.0.0.2")
    made = Fleet(ground, ground.keeper(Clock()))
    made.describe()
    monkeypatch.setattr(attach, "join", lambda *_: None)
    monkeypatch.setattr(start, "describe", made.describe)
    monkeypatch.setattr(start, "call_coordinator", made.call_coordinator)
    monkeypatch.setattr(draining, "calls_to", made.calls_to)
    monkeypatch.setattr(start, "RETRY_S", 0.0)
    return made


def states(fleet: Fleet) -> dict[str, str]:
    return {member["node"]: member["state"] for member in fleet.describe()["fleet"]["members"]}


def run(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str]:
    code = cli.main([*arguments])
    return code, capsys.readouterr().out


def test_a_drained_node_hands_over_closes_and_is_gone(fleet: Fleet, capsys) -> None:
    code, out = run(capsys, "drain", "node-1")
    assert code == 0, out
    assert "other nodes have 4 blocks of node-1 (node-0 4)" in out
    assert "node-1: 2 blocks (20 B) that nothing outlasting the cluster had are lost" in out
    assert states(fleet) == {"node-0": "serving", "node-1": "drained"}
    assert fleet.calls == [("node-1", "inventory"), ("node-0", "take_over"), ("node-1", "inventory"), ("node-1", "close")]
    code, out = run(capsys, "drain", "node-1")
    assert (code, fleet.calls[4:]) == (0, []), "a second time it does nothing"
    code, out = run(capsys, "drain", "node-1", "--undo")
    assert code == 0
    assert "node-1 serves again" in out
    assert states(fleet) == {"node-0": "serving", "node-1": "serving"}


def test_a_node_is_also_named_by_its_address(fleet: Fleet, capsys) -> None:
    assert run(capsys, "drain", "10.0.0.2", "--json")[0] == 0
    assert states(fleet)["node-1"] == "drained"


def test_a_handover_that_is_interrupted_leaves_the_node_as_it_was(fleet: Fleet, capsys) -> None:
    fleet.interrupt = KeyboardInterrupt()
    assert run(capsys, "drain", "node-1")[0] == 130
    assert states(fleet) == {"node-0": "serving", "node-1": "serving"}


def test_the_last_node_is_drained_only_if_its_blocks_are_kept(fleet: Fleet, capsys) -> None:
    run(capsys, "drain", "node-1")
    code, out = run(capsys, "drain", "node-0")
    assert code == 1
    assert "node-0 is the last node of cluster 'default', and no disk folder keeps its blocks" in out.replace("\n", " ")
    assert states(fleet)["node-0"] == "serving"
    fleet.config = Config(disk=1 << 30, disk_path="/somewhere")
    code, out = run(capsys, "drain", "node-0")
    assert code == 0
    assert "its blocks stay in its disk folder" in out
    assert states(fleet)["node-0"] == "drained"


def test_the_last_node_is_drained_by_force(fleet: Fleet, capsys) -> None:
    run(capsys, "drain", "node-1")
    assert run(capsys, "drain", "node-0", "--force")[0] == 0
    assert states(fleet)["node-0"] == "drained"


def test_draining_a_lost_node_stops_expecting_it(fleet: Fleet, capsys) -> None:
    fleet.ground.leave(fleet.ground.actors["node-1"])
    fleet.describe()
    code, out = run(capsys, "drain", "node-1")
    assert code == 0
    assert "node-1 is lost already, and no longer expected" in out
    assert states(fleet) == {"node-0": "serving"}


def test_a_node_that_cannot_start_is_drained_without_a_call_to_it(fleet: Fleet, capsys) -> None:
    fleet.ground.join("10.0.0.3")
    fleet.ground.refusals["10.0.0.3"] = TieredKVError(Kind.MEMORY, "host: too much")
    assert "refused" in [states(fleet)["node-2"], states(fleet)["node-2"]]
    assert run(capsys, "drain", "node-2")[0] == 0
    assert (states(fleet)["node-2"], fleet.calls) == ("drained", [])


def test_peers_without_room_get_nothing_and_the_words_say_so(fleet: Fleet, capsys) -> None:
    fleet.room_bytes = 0
    code, out = run(capsys, "drain", "node-1")
    assert code == 0
    assert "4 blocks (40 B) were not handed over: no other node has room for them" in out


@pytest.mark.parametrize("arguments", ["drain node-1 --within -1", "drain node-1 --within nan", "down --flush=-1"])
def test_a_wrong_time_names_the_option(fleet: Fleet, capsys, arguments: str) -> None:
    code, out = run(capsys, *arguments.split())
    assert code == 2
    assert "must be a number of seconds, 0 or more" in out


def test_an_unknown_node_is_an_error_that_names_the_known_ones(fleet: Fleet, capsys) -> None:
    code, out = run(capsys, "drain", "node-9")
    assert code == 1
    assert "there are: node-0, node-1" in out


def test_a_coordinator_of_an_older_version_is_an_error_in_words(fleet: Fleet, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "describe", lambda *_: {"cluster_id": "c1", "config": Config(), "nodes": [], "lost": {}})
    code, out = run(capsys, "drain", "node-1")
    assert code == 1
    assert "was started by an older version of tiered_kv" in out.replace("\n", " ")


# A second `up`


def test_settings_that_differ_are_named_and_those_not_given_stay() -> None:
    running = Config(host=1 << 30, policy="lru", disk="1GiB:/a")
    asked = resume.Asked(Config(host=2 << 30, policy="lru", disk="1GiB:/b"), given={"host", "policy", "disk", "disk_path"})
    assert resume.differences(asked, running, None) == [
        "host: the cluster has 1073741824, got 2147483648",
        "disk_path: the cluster has '/a', got '/b'",
    ]
    assert resume.differences(asked._replace(given=set()), running, None) == []
    assert len(resume.differences(resume.Asked(Config()), running, None)) == 3, "without `given` all settings count: host is the default"
    assert resume.differences(resume.Asked(running, nodes_with="GPU"), running, "cache=yes") == [
        "nodes-with: the cluster has cache=yes, got GPU"
    ]


def test_given_settings_are_those_of_the_command_line_and_its_file(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    path.write_text('io_threads = 3\nhost = "2GiB"\n')
    options = cli.parser().parse_args(["up", "--config", str(path), "--disk", "1GiB:/a", "--verify-host"])
    assert given_settings(options, cli.SETTINGS) == {"io_threads", "host", "disk", "disk_path", "verify_host"}
    assert given_settings(cli.parser().parse_args(["up"]), cli.SETTINGS) == set()


def test_another_address_or_fewer_nodes_than_the_running_cluster_are_errors() -> None:
    from tiered_kv.cluster.processes import Process

    cluster = ClusterState("c1", "10.0.0.5:6379", 0.0, processes=(Process(2, 0), Process(3, 0)), owns_ray=True)
    with pytest.raises(TieredKVError, match=r"--address: cluster 'default' is on the Ray at 10\.0\.0\.5:6379, got 10\.0\.0\.6:6379"):
        resume.resume(cluster, resume.Asked(Config(), address="10.0.0.6:6379"), print)
    with pytest.raises(
        TieredKVError, match=r"--nodes: cluster 'default' already has 2 Ray nodes here, got 1; use `tiered-kv drain` to remove nodes"
    ):
        resume.resume(cluster, resume.Asked(Config(), nodes=1, given=()), print)


# Names and the state folder


@pytest.mark.parametrize("name", ["defualt", "-x", "a/b", "..", "", "x" * 41, "ä"])
@pytest.mark.parametrize("command", [["status"], ["down"], ["drain", "node-0"], ["record", "--out", "x-b64.jsonl"]])
def test_a_mistyped_name_creates_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, command: list[str], name: str) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("TIERED_KV_STATE", str(home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, f"--name={name}"]) in (1, 2)
    assert not home.exists()
    assert "no cluster" in (out := capsys.readouterr().out) or "name" in out
    assert list(tmp_path.iterdir()) == []


def test_a_name_beside_a_known_one_is_told_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path))
    ClusterState("c1", "10.0.0.5:6379", 0.0, "main").save()
    assert cli.main(["down", "--name", "mian"]) == 1
    assert "no cluster 'mian' on this machine; there are: main" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"main"}


# The flush at `down`


@pytest.mark.parametrize(
    ("settings", "given", "flush_s"),
    [
        ({}, None, 0.0),
        ({}, 60.0, 0.0),
        ({"disk": 1 << 30}, None, 0.0),
        ({"disk": 1 << 30, "disk_path": "/x"}, None, stop.FLUSH_S),
        ({"disk": 1 << 30, "disk_path": "/x"}, 0.0, 0.0),
        ({"disk": 1 << 30, "disk_path": "/x"}, 60.0, 60.0),
        ({"disk_path": "/x"}, None, 0.0),
    ],
)
def test_only_a_disk_folder_that_stays_is_flushed_to(settings: dict, given: float | None, flush_s: float) -> None:
    assert stop.flush_seconds(Config(**settings), given) == flush_s


def test_the_flush_option_is_seconds_or_the_default() -> None:
    for arguments, expected in {("down",): None, ("down", "--flush"): None, ("down", "--flush=7"): 7.0, ("down", "--flush=0"): 0.0}.items():
        assert cli.parser().parse_args(arguments).flush == expected


def test_down_says_what_is_lost_when_ray_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path))
    ClusterState("c1", "127.0.0.1:1", 0.0, "gone", config={"shm_path": str(tmp_path / "shm")}).save()
    lines: list[str] = []
    assert stop.down("gone", log=lines.append) == []
    assert "the cluster does not answer" in lines[0]
    assert "Blocks that only memory had are lost" in lines[0]
    assert state.find("gone") is None
