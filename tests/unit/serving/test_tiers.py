"""Four tiers under one client: blocks are demoted and promoted, and a hit from any tier is the stored block."""

from collections import Counter
from random import Random

import pytest
import torch

import tiered_kv
from tests.unit.serving.prompts import NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config, Hint, KVLayout
from tiered_kv.blocks import Stored, Tier
from tiered_kv.client.reader import DeviceReader
from tiered_kv.clock import ManualClock
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.pool import DevicePool
from tiered_kv.memory.view import NodeView
from tiered_kv.node.storage import NodeStorage
from tiered_kv.store import events as ev

LARGE = KVLayout(2, 2, 16, "float32", 64)
"""Blocks of 32 KiB: 30 fill the arena of a 1 MiB host tier."""
T = LARGE.block_tokens
OPTIONAL = {"device": "1MiB:cpu", "disk": "1MiB", "objects": "memory://"}
COMBINATIONS = [{name: OPTIONAL[name] for at, name in enumerate(OPTIONAL) if chosen >> at & 1} for chosen in range(1 << len(OPTIONAL))]


def settle(node) -> None:
    """Wait until the node has the last uses, and all moves between tiers have ended."""
    node.engine.drain_touches()
    node.engine.settle()
    node.check()


def cached(node_factory, client_factory, **settings):
    node = node_factory(**{"host": "1MiB", "store_wait_ms": 10_000, **settings})
    return node, client_factory(node, LARGE, NAMESPACE)


def store(client, *paths: tuple[int, ...], **more) -> list[Stored]:
    return [client.store(tokens_of(path, LARGE), kv_of(path, LARGE), **more) for path in paths]


def fetch(client, path: tuple[int, ...], **more) -> dict[str, int]:
    """Returns the fetched blocks by tier. Asserts that each is as it was stored."""
    fetched = client.fetch(tokens_of(path, LARGE), **more)
    assert_is_prefix(fetched, path, LARGE)
    return {tier: tokens // T for tier, tokens in fetched.tokens_by_tier.items()}


@pytest.mark.parametrize("tiers", COMBINATIONS, ids=lambda tiers: "+".join(["host", *tiers]))
def test_every_combination_of_tiers_keeps_as_many_blocks_as_fit(node_factory, client_factory, tmp_path, tiers: dict) -> None:
    if "disk" in tiers:
        tiers = {**tiers, "disk": f"{tiers['disk']}:{tmp_path / 'disk'}"}
    node, client = cached(node_factory, client_factory, **tiers)
    paths = [(turn, 1, 2) for turn in range(30)]
    for turn, path in enumerate(paths):
        assert store(client, path) == [Stored(3, 0, 0)]
        fetch(client, paths[turn // 2])
        settle(node)
    usage = node.stats()["tiers"]
    assert set(usage) == {"host", *tiers}
    assert all(tier["used_bytes"] <= tier["capacity_bytes"] for tier in usage.values())
    hits: Counter[str] = Counter()
    for path in paths:
        hits += Counter(fetch(client, path))
        settle(node)  # a block that moves to objects while it is looked for may be missed
    assert sum(hits.values()) >= min(20 + 20 * len(tiers), 70)
    assert set(hits) <= {"host", *tiers}
    if "objects" in tiers:
        assert sum(hits.values()) == 90, "the coldest tier has all that the others could not keep"


def test_a_chain_may_be_stored_in_several_tiers(node_factory, client_factory, tmp_path) -> None:
    node, client = cached(node_factory, client_factory, device="1MiB:cpu", disk=f"4MiB:{tmp_path / 'disk'}")
    path = tuple(range(12))
    store(client, path)
    fetch(client, path[:4])
    settle(node)
    store(client, *[(turn, 7) for turn in range(100, 112)])  # room for these is made by the end of the chain
    settle(node)
    hits = fetch(client, path)
    assert sum(hits.values()) == 12
    assert hits["device"] == 4
    assert hits["disk"] > 0


def test_a_second_use_promotes_blocks_to_the_device(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory, device="1MiB:cpu")
    store(client, (1, 2))
    assert fetch(client, (1, 2)) == {"host": 2}
    settle(node)
    assert fetch(client, (1, 2)) == {"device": 2}
    assert node.stats()["tiers"]["host"]["blocks"] == 2, "and stay in memory"


def test_a_block_evicted_from_the_device_during_its_copy_is_read_again(node_factory, client_factory, monkeypatch) -> None:
    node, client = cached(node_factory, client_factory, device="1MiB:cpu")
    store(client, (1, 2))
    fetch(client, (1, 2))
    settle(node)
    unpack = DeviceReader.unpack

    def interrupted(self, runs, kv):
        node.engine.handle([ev.Needed(Tier.DEVICE, 1 << 20)])
        node.storage.device.pool.tensor.fill_(77)
        return unpack(self, runs, kv)

    monkeypatch.setattr(DeviceReader, "unpack", interrupted)
    assert fetch(client, (1, 2)) == {"device": 2}, "where they were when it was asked"
    assert client.stats()["client"]["retries"] == 2


def test_blocks_on_the_device_are_brought_to_memory_for_other_workers(node_factory, client_factory, monkeypatch) -> None:
    node, client = cached(node_factory, client_factory, device="1MiB:cpu")
    store(client, (1, 2))
    fetch(client, (1, 2))
    settle(node)

    def cannot(directory):
        raise TieredKVError(Kind.MEMORY, "no such device here")

    monkeypatch.setattr(DevicePool, "open", cannot)
    assert client_factory(node, LARGE, NAMESPACE).match(tokens_of((1, 2), LARGE)).tokens_by_tier == {"device": 2 * T}
    assert fetch(client_factory(node, LARGE, NAMESPACE), (1, 2)) == {"device": 2}
    assert node.stats()["counts"]["off_device"] == 2


def test_blocks_in_objects_are_brought_by_the_node_within_the_deadline(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory, objects="memory://")
    store(client, *[(turn, 1, 2) for turn in range(12)])
    settle(node)
    path = (0, 1, 2)
    assert client.match(tokens_of(path, LARGE)).tokens_by_tier == {"objects": 3 * T}
    assert {each.tier for each in client.explain(tokens_of(path, LARGE))} == {"objects"}
    assert fetch(client, path, deadline_ms=0) == {}
    settle(node)  # what was looked for in vain comes up by itself
    assert fetch(client, path) == {"host": 1, "objects": 2}
    settle(node)
    assert fetch(client, path) == {"host": 3}
    assert node.stats()["tiers"]["objects"]["blocks"] >= 3, "and stay there: written once"


def test_a_failing_object_store_is_a_miss_and_drops_nothing(node_factory, client_factory, monkeypatch) -> None:
    node, client = cached(node_factory, client_factory, objects="memory://")
    store(client, *[(turn, 1, 2) for turn in range(12)])
    settle(node)
    read = type(node.storage.logs[Tier.OBJECTS]).read

    def away(*_):
        raise TieredKVError(Kind.STORAGE, "it does not answer")

    monkeypatch.setattr(type(node.storage.logs[Tier.OBJECTS]), "read", away)
    assert fetch(client, (0, 1, 2)) == {}
    monkeypatch.setattr(type(node.storage.logs[Tier.OBJECTS]), "read", read)
    assert fetch(client, (0, 1, 2)) == {"objects": 3}


def test_blocks_of_a_missing_pack_are_dropped(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory, objects="memory://")
    store(client, *[(turn, 1, 2) for turn in range(12)])
    settle(node)
    node.storage.logs[Tier.OBJECTS]._store.objects.clear()
    assert fetch(client, (0, 1, 2)) == {}
    node.engine.settle()
    assert client.match(tokens_of((0, 1, 2), LARGE)).tokens == 0
    node.storage.logs[Tier.OBJECTS].close(remove=True)  # its bookkeeping lists packs that do not exist


def test_peers_get_blocks_from_every_tier(checked, tmp_path) -> None:
    settings = {"host": "1MiB", "heartbeat_s": 1000.0, "device": "1MiB:cpu", "objects": str(tmp_path)}
    cluster = checked(InProcessCluster(Config.of(settings), 2, ManualClock()))
    here, there = (checked(cluster.client(node, LARGE, NAMESPACE)) for node in cluster.nodes)
    store(here, (1, 2, 3))
    fetch(here, (1, 2))
    settle(cluster.nodes["n0"])
    store(here, *[(turn, 7, 8) for turn in range(100, 110)])
    settle(cluster.nodes["n0"])
    assert set(here.match(tokens_of((1, 2, 3), LARGE)).tokens_by_tier) == {"device", "objects"}
    cluster.report_all()
    assert fetch(there, (1, 2, 3)) == {"peer": 3}
    for node in cluster.nodes.values():
        settle(node)
    assert {block.uses for block in cluster.nodes["n1"].engine.machine.blocks.values()} == {1}, "one request is one use"


# Restarts


def test_blocks_on_disk_are_hits_again_after_a_restart(tmp_path) -> None:
    config = {"host": "1MiB", "disk": f"8MiB:{tmp_path / 'disk'}"}
    paths = [(turn, 1, 2) for turn in range(30)]
    with tiered_kv.open(config, layout=LARGE, namespace=NAMESPACE) as client:
        store(client, *paths)
        on_disk = client.stats()["node"]["tiers"]["disk"]["blocks"]
        assert on_disk >= 50
    with tiered_kv.open(config, layout=LARGE, namespace=NAMESPACE) as client:
        assert client.stats()["node"]["tiers"]["disk"]["blocks"] >= on_disk
        hits = [sum(fetch(client, path).values()) for path in paths]
        assert hits[:15] == [3] * 15
        assert sum(hits) >= on_disk - 6, "but for chains whose beginning was in memory alone"


def test_two_nodes_below_one_folder_use_separate_folders(checked, tmp_path) -> None:
    config = Config.of({"host": "1MiB", "disk": f"1MiB:{tmp_path}", "heartbeat_s": 1000.0})
    cluster = checked(InProcessCluster(config, 2, ManualClock()))
    assert len({node.storage.disk.folder for node in cluster.nodes.values()}) == 2


@pytest.mark.parametrize("device", [0, "1MiB:cpu"])
def test_a_restarted_node_loses_at_most_blocks_that_only_the_device_had(checked, tmp_path, device) -> None:
    settings = {"host": "1MiB", "heartbeat_s": 1000.0, "device": device, "disk": f"2MiB:{tmp_path / 'disk'}"}
    cluster = checked(InProcessCluster(Config.of(settings, objects=str(tmp_path / "objects")), 1, ManualClock()))
    client = checked(cluster.client("n0", LARGE, NAMESPACE))
    paths = [(turn, 1, 2) for turn in range(40)]
    for path in paths:
        store(client, path)
        settle(cluster.nodes["n0"])
    for path in [*paths[-3:], *paths[-3:]]:
        fetch(client, path)
        settle(cluster.nodes["n0"])
    before = {key: set(block.copies) for key, block in cluster.nodes["n0"].engine.machine.blocks.items()}
    cluster.nodes["n0"].close(remove=False)
    node = cluster.start_node("n0")
    node.check()
    after = {key: set(block.copies) for key, block in node.engine.machine.blocks.items()}
    assert after == {key: tiers - {Tier.DEVICE} for key, tiers in before.items() if tiers != {Tier.DEVICE}}
    fresh = checked(cluster.client("n0", LARGE, NAMESPACE))
    client.stats()  # this session ended with the node's former life
    for path in paths:
        assert sum(fetch(fresh, path).values()) == 3
        settle(node)
        assert sum(fetch(client, path).values()) == 3, "the same worker goes on, with the pool of the new life"
        settle(node)


def test_a_restarted_nodes_new_device_pool_is_not_mistaken_for_the_old_one(checked, monkeypatch) -> None:
    cluster = checked(InProcessCluster(Config.of({"host": "1MiB", "heartbeat_s": 1000.0, "device": "1MiB:cpu"}), 1, ManualClock()))
    client = checked(cluster.client("n0", LARGE, NAMESPACE))
    store(client, (1, 2))
    fetch(client, (1, 2))
    settle(cluster.nodes["n0"])
    cluster.nodes["n0"].close(remove=False)
    restore = NodeStorage.restore

    def interrupted(storage: NodeStorage) -> list:
        assert storage.device is not None
        assert fetch(client, (1, 2)) == {}, "a miss rather than what the new pool holds there"
        return restore(storage)

    monkeypatch.setattr(NodeStorage, "restore", interrupted)
    cluster.start_node("n0")
    client.stats()
    assert fetch(client, (1, 2)) == {"host": 2}


def test_a_read_from_a_previous_device_pool_is_discarded(node_factory, client_factory, monkeypatch) -> None:
    node, client = cached(node_factory, client_factory, device="1MiB:cpu")
    store(client, (1, 2))
    fetch(client, (1, 2))
    settle(node)
    pool = node.storage.device.pool
    copies = DevicePool.copies

    def restarts(self, *others):
        monkeypatch.setattr(NodeView, "identity", pool.generation + 1)
        return copies(self, *others)

    monkeypatch.setattr(DevicePool, "copies", restarts)
    assert fetch(client, (1, 2)) == {}


def test_a_smaller_cap_or_index_keeps_as_many_blocks_as_fit(tmp_path) -> None:
    paths = [(turn, 1, 2) for turn in range(60)]
    with tiered_kv.open({"host": "1MiB", "disk": f"8MiB:{tmp_path}"}, layout=LARGE, namespace=NAMESPACE) as client:
        store(client, *paths)
    with tiered_kv.open({"host": "1MiB", "disk": f"2MiB:{tmp_path}"}, layout=LARGE, namespace=NAMESPACE) as client:
        disk = client.stats()["node"]["tiers"]["disk"]
        assert 0 < disk["used_bytes"] <= disk["capacity_bytes"] == 2 << 20
        assert disk["blocks"] > 20
        assert sum(fetch(client, paths[0]).values()) == 0, "the oldest went"


# Hints and figures


def test_a_hint_is_sent_even_if_there_is_nothing_to_store(node_factory, client_factory) -> None:
    clock = ManualClock()
    _, client = cached(node_factory, client_factory, clock=clock)
    store(client, (1, 2, 3))
    nothing = torch.zeros(LARGE.kv_shape(0))
    calls = client.node_calls
    assert client.store(tokens_of((1, 2, 3), LARGE), nothing, start=3 * T, hint=Hint(pinned_s=60)) == Stored(0, 0, 0)
    assert client.node_calls == calls + 1
    for turn in range(10, 40):
        store(client, (turn, 1, 2))
    assert fetch(client, (1, 2, 3)) == {"host": 3}
    clock.advance(60)
    for turn in range(50, 80):
        store(client, (turn, 1, 2))
    assert fetch(client, (1, 2, 3)) == {}


def test_an_invalid_hint_is_rejected_before_anything_is_stored(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory)
    with pytest.raises(TieredKVError, match=r"^hint: "):
        store(client, (1,), hint={"pinned_s": 1})
    assert node.stats()["blocks"] == 0


def test_statistics_count_moved_blocks(node_factory, client_factory, tmp_path) -> None:
    node, client = cached(node_factory, client_factory, disk=f"4MiB:{tmp_path / 'disk'}")
    store(client, *[(turn, 1, 2) for turn in range(20)])
    node.engine.settle()
    stats = client.stats()["node"]
    assert list(stats["tiers"]) == ["host", "disk"]
    assert stats["counts"]["demoted"] == stats["tiers"]["disk"]["blocks"] > 0
    assert stats["leaving_bytes"].get("host", 0) == 0


def test_disk_write_amplification_stays_low(node_factory, client_factory, tmp_path) -> None:
    node, client = cached(node_factory, client_factory, disk=f"4MiB:{tmp_path / 'disk'}")
    random = Random(5)
    for number in range(500):
        path = (min(int(random.paretovariate(0.6)), 2000), number % 2)
        if sum(fetch(client, path).values()) < len(path):
            store(client, path)
        if number % 10 == 0:
            settle(node)
    counts = node.stats()["counts"]
    assert counts["lost"] > 0, "segments had to go"
    assert counts["reinserted"] > 0, "and something of them was wanted"
    assert node.storage.disk.write_amplification <= 1.3


def test_closing_a_node_leaves_no_objects(tmp_path) -> None:
    with tiered_kv.open({"host": "1MiB", "objects": str(tmp_path / "objects")}, layout=LARGE, namespace=NAMESPACE) as client:
        store(client, *[(turn,) for turn in range(60)])
        assert list((tmp_path / "objects").iterdir())
    assert not list((tmp_path / "objects").iterdir())
