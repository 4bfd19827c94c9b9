"""Attaching without Ray: the node record that a worker chooses, and its work after the cluster stops and starts again."""

import json
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiered_kv
from tests.unit.serving.opaque_blocks import OPAQUE, fetch, store
from tests.unit.serving.processes import NodeProcess, until
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv.cluster import attach
from tiered_kv.cluster.localnodes import LocalNodes
from tiered_kv.cluster.state import ClusterState, remove
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.node_record import FILE_NAME, NodeRecord, read_record, write_record

pytestmark = pytest.mark.usefixtures("nursery")

PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A unique name for a cluster, of which this machine has no state file yet."""
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def node(name: str) -> Iterator[NodeProcess]:
    with NodeProcess(name) as node:
        yield node


def attached(name: str, **options: object):
    return tiered_kv.attach(**{"namespace": NAMESPACE, "layout": LAYOUT, "cluster": name, **options})


def save_state(node: NodeProcess, name: str) -> None:
    ClusterState(node.cluster_id, "127.0.0.2:6379", 0.0, name, config={"host": "4MiB"}).save()


def test_a_worker_attaches_without_ray(name: str, node: NodeProcess) -> None:
    script = f"""
import sys, torch, tiered_kv
layout = tiered_kv.KVLayout(layers=2, kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
with tiered_kv.attach(namespace=tiered_kv.Namespace(weights="x"), layout=layout, cluster="{name}") as client:
    print(client.store(range(8), torch.zeros(layout.kv_shape(8))).new, client.fetch(range(8)).tokens, "ray" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.split() == ["2", "8", "False"], ran.stderr


def test_an_engine_attaches_with_an_opaque_layout(name: str) -> None:
    with NodeProcess(name, quality="compact") as node:
        with tiered_kv.attach(namespace=NAMESPACE, layout=OPAQUE, cluster=name, block_tokens=OPAQUE.block_tokens) as client:
            store(client, PATH)
            assert fetch(client, PATH) == {"host": 4}
            plan = client.stats()["node"]["codecs"]["plans"][NAMESPACE.root(OPAQUE).hex()[:12]]
            assert plan["host"] == {
                "codec": "lossless",
                "why": "quality compact, but only lossless codecs apply to an opaque layout, so not xlayer:1e-4",
            }
        with pytest.raises(TieredKVError, match="needs a calibration"):
            attached(name)
        with pytest.raises(TieredKVError, match="block_tokens"):
            attached(name, layout=OPAQUE, block_tokens=64)
        assert node.info["block_tokens"] == 64


@pytest.mark.parametrize("has_state", [True, False], ids=["with a state file", "by name alone"])
@pytest.mark.parametrize("ended", ["in order", "killed", "killed, and its files removed"])
def test_a_worker_switches_to_the_next_cluster_of_the_same_name(name: str, node: NodeProcess, has_state: bool, ended: str) -> None:
    if has_state:
        save_state(node, name)
    with attached(name) as client:
        client.store(TOKENS, KV)
        if ended == "in order":
            node.close()
        else:
            node.kill()
        if ended == "killed, and its files removed":
            shutil.rmtree(node.info["directory"])
        if has_state:
            remove(name)
        hits = assert_is_prefix(client.fetch(TOKENS), PATH)
        assert hits == (0 if ended == "in order" else 4)
        begun_s = time.monotonic()
        with NodeProcess(name, host="8MiB", fetch_deadline_ms=700) as following:
            if has_state:
                save_state(following, name)
            until(lambda: client.store(tokens_of((5, 6)), kv_of((5, 6))).refused == 0, "it stores again", 15.0)
            until(lambda: client._source._view.directory == Path(following.info["directory"]), "it is with the next one", 15.0)
            client.store(tokens_of((5, 6)), kv_of((5, 6)))
            assert assert_is_prefix(client.fetch(tokens_of((5, 6))), (5, 6)) == 2
            assert time.monotonic() - begun_s < 15
            assert client._holder.present.deadline_s == 0.7, "the settings must be those of the new node"
            assert client.stats()["node"]["node"] == "bench"
    if ended != "in order":
        shutil.rmtree(node.info["directory"], ignore_errors=True)


def test_a_worker_ignores_another_cluster_of_the_same_name(name: str, node: NodeProcess) -> None:
    save_state(node, name)
    nodes = LocalNodes(name)
    assert nodes.find() == node.info
    with NodeProcess(name):
        node.close()
        assert nodes.find() is None
        remove(name)
        assert nodes.find() is None, "the known cluster was stopped"
        assert LocalNodes(name).find() is not None, "a worker without a state file uses any cluster of this name"


def test_a_worker_uses_the_first_of_several_nodes_and_keeps_it(name: str) -> None:
    with NodeProcess(name) as one, NodeProcess(name) as other:
        for node, node_id in ((one, "b"), (other, "a")):
            record = read_record(node.info["directory"])
            write_record(NodeRecord(name, node.cluster_id, node_id, record.info, pid=record.pid))
        nodes = LocalNodes(name)
        assert nodes.find()["directory"] == other.info["directory"]
        record = read_record(other.info["directory"])
        write_record(NodeRecord(name, other.cluster_id, "c", record.info, pid=record.pid))
        assert nodes.find()["directory"] == other.info["directory"]
        assert LocalNodes(name).find()["directory"] == one.info["directory"]
        other.kill()
        until(lambda: nodes.find() is None, "its own node is silent, and expected back")
        until(lambda: nodes.find() is not None, "then it takes another one", 10.0)
        shutil.rmtree(other.info["directory"])


def test_only_nodes_of_the_ray_at_the_address_match(name: str, node: NodeProcess) -> None:
    record = read_record(node.info["directory"])
    write_record(NodeRecord(name, node.cluster_id, "bench", record.info, ray_address="10.0.0.5:6379", pid=record.pid))
    assert LocalNodes(name, "10.0.0.5:6379").find() == node.info
    assert LocalNodes(name, "10.0.0.6:6379").find() is None
    with pytest.raises(TieredKVError, match="--address: must be host:port"):
        LocalNodes(name, "nonsense").find()


def test_attaching_to_a_hanging_node_raises_an_error_that_names_it(name: str, node: NodeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "ATTACH_WITHIN_S", 3.0)
    node.stop()
    begun_s = time.monotonic()
    with pytest.raises(
        TieredKVError, match=rf"no node .* has answered for .*bench \(process {node.process.pid}, last heartbeat"
    ) as refusal:
        attached(name)
    assert refusal.value.kind is Kind.CLUSTER
    assert time.monotonic() - begun_s < 3 + 5 + 2
    node.go_on()
    with attached(name) as client:
        client.store(TOKENS, KV)


def test_without_a_node_the_error_names_the_command_to_start_one(name: str) -> None:
    with pytest.raises(TieredKVError, match="tiered-kv up"):
        attached(name)


def test_a_node_of_another_version_raises_an_error_that_names_it(name: str, node: NodeProcess) -> None:
    path = Path(node.info["directory"]) / FILE_NAME
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"protocol": 99, "package": "9.9"}))
    with pytest.raises(TieredKVError, match=r"runs tiered_kv 9\.9"):
        attached(name)
