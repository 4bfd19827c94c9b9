"""Each metric of a node moves when what it counts happens."""

import socket
from contextlib import suppress

import pytest

from tests.unit.metrics.scraping import scrape_node
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, kv_of, tokens_of
from tiered_kv import Config, Hint, KVLayout, Namespace
from tiered_kv.blocks import Tier
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.metrics.node_samples import SAMPLERS, NodeReading
from tiered_kv.metrics.table import Scope, of_scope
from tiered_kv.node.monitoring.labels import OTHER, BoundedLabels

LARGE = KVLayout(2, 2, 16, "float32", 64)
"""Blocks of 32 KiB: 30 fill the arena of a 1 MiB host tier."""
MOVED: set[str] = set()
"""The metrics that the tests of this file have seen move."""


class Watched:
    """Compares a node's samples with those of before."""

    def __init__(self, node) -> None:
        self._node = node
        self._before = self._read()

    def _read(self) -> dict[tuple, object]:
        meters = self._node.meters
        reading = NodeReading(self._node.stats(), meters.read_clients(), meters.durations(), BoundedLabels(OTHER))
        return {(sample.name, sample.labels): sample.value for sampler in SAMPLERS for sample in sampler(reading)}

    def moved(self) -> set[str]:
        now = self._read()
        found = {key[0] for key, value in now.items() if self._before.get(key, 0) != value}
        MOVED.update(found)
        return found


def store(client, *paths, layout=LAYOUT) -> None:
    for path in paths:
        client.store(tokens_of(path, layout), kv_of(path, layout))


def settle(node) -> None:
    node.engine.drain_touches()
    node.engine.settle()


@pytest.fixture
def node(node_factory):
    return node_factory(host="1MiB")


@pytest.fixture
def client(node, client_factory):
    return client_factory(node, LAYOUT, NAMESPACE)


def test_what_clients_do(node, client) -> None:
    watched = Watched(node)
    client.note_prefill(1000, 10.0)
    store(client, (1, 2, 3))
    client.fetch(tokens_of((1, 2, 9)))
    client._source._view.retries += 1
    client.fetch(tokens_of((1,)))
    client._degraded("store", TieredKVError(Kind.TRANSPORT, "made up"))
    units = [f"{name}_{unit}_total" for name in ("requested", "hit", "missed") for unit in ("blocks", "tokens")]
    assert watched.moved() >= {
        *(*units, "prefill_saved_tokens_total", "prefill_saved_seconds_total", "fetch_seconds", "store_seconds"),
        *("stored_blocks_total", "read_retries_total", "degraded_calls_total", "moved_bytes_total", "committed_blocks_total"),
        *("tier_used_bytes", "tier_blocks", "tenant_used_bytes", "sessions", "uptime_seconds"),
    }
    assert scrape_node(node).sum("read_retries_total") == 1


def test_moves_between_tiers(node_factory, client_factory, tmp_path) -> None:
    settings = {"cluster_id": "metrics-moves", "disk": f"1MiB:{tmp_path / 'disk'}", "disk_segment": "128KiB", "store_wait_ms": 10_000}
    node = node_factory(host="1MiB", **settings)
    client = client_factory(node, LARGE, NAMESPACE)
    watched = Watched(node)
    for turn in range(25):
        store(client, (turn, 1), layout=LARGE)
        settle(node)
    watched.moved()
    client.close()
    node.close()  # the disk's folder stays, and the next node has room in host memory
    node = node_factory(host="1MiB", **settings)
    client = client_factory(node, LARGE, NAMESPACE)
    watched = Watched(node)
    for turn in range(40):
        client.fetch(tokens_of((turn // 3, 1), LARGE))
        settle(node)
        store(client, (100 + turn, 1), layout=LARGE)
        settle(node)
    assert watched.moved() >= {
        *("demotion_seconds", "promotion_seconds", "demoted_blocks_total", "promoted_blocks_total", "freed_copies_total"),
        *("evicted_blocks_total", "write_amplification_ratio"),
        *("encoded_blocks_total", "encoded_raw_bytes_total", "encoded_kept_bytes_total"),
    }
    found = scrape_node(node)
    assert found.sum("moved_bytes_total", source="host", target="disk") > 0
    assert found.sum("hit_blocks_total", tier="disk") > 0
    assert found.sum("tier_used_bytes", tier="disk") <= found.sum("tier_capacity_bytes", tier="disk") == 1 << 20
    MOVED.add("tier_capacity_bytes")


def test_a_disk_that_refuses(node_factory, client_factory, tmp_path, monkeypatch) -> None:
    node = node_factory(host="1MiB", disk=f"1MiB:{tmp_path / 'disk'}", store_wait_ms=2_000)
    client = client_factory(node, LARGE, NAMESPACE)
    watched = Watched(node)
    monkeypatch.setattr(node.storage.disk, "append", lambda records: [_full()] * len(records))
    for turn in range(40):
        store(client, (turn,), layout=LARGE)
    settle(node)
    assert watched.moved() >= {"failed_demotions_total", "refused_blocks_total", "evicted_blocks_total"}
    assert scrape_node(node).sum("refused_blocks_total", reason="no space") > 0


def _full():
    from tiered_kv.tiers.log import AppendResult, Refusal

    return AppendResult(None, Refusal.NO_SPACE)


def test_lossy_codecs(node_factory, client_factory) -> None:
    node = node_factory(host="1MiB", quality="near_exact")
    client = client_factory(node, LARGE, NAMESPACE)
    watched = Watched(node)
    for turn in range(40):
        store(client, (turn,), layout=LARGE)
        settle(node)
    assert watched.moved() >= {"shrunk_blocks_total", "block_error_ratio", "error_budget_spent_ratio", "encoded_blocks_total"}
    assert 0 < scrape_node(node).sum("error_budget_spent_ratio", codec="int8") <= 1


def test_tenants_and_refusals(node_factory, client_factory) -> None:
    node = node_factory(host="1MiB", tenants={"quotas": {"acme": {"host": "128KiB"}}}, store_wait_ms=0)
    client = client_factory(node, LARGE, Namespace(weights="w", tenant="acme"))
    watched = Watched(node)
    for turn in range(8):
        store(client, (turn,), layout=LARGE)
    huge = client_factory(node, KVLayout(2, 2, 16, "float32", 4096), NAMESPACE)
    store(huge, (1,), layout=huge.layout)
    hint = Hint(pinned_s=60.0)
    for turn in range(40):
        path = (100 + turn,)
        client_factory(node, LARGE, NAMESPACE).store(tokens_of(path, LARGE), kv_of(path, LARGE), hint=hint)
    client.new_epoch()
    moved = watched.moved() | {"tenant_quota_bytes"}
    assert moved >= {"over_quota_blocks_total", "refused_blocks_total", "refused_pins_total", "weight_epoch", "evicted_blocks_total"}
    found = scrape_node(node)
    assert found.sum("tenant_quota_bytes", tenant="acme", tier="host") == 128 << 10
    assert found.sum("refused_blocks_total", reason="no room", codec="raw") > 0
    MOVED.add("tenant_quota_bytes")


def test_damage_and_quarantine(node, client) -> None:
    store(client, (1, 2, 3))
    watched = Watched(node)
    node.seals.scrub()
    block = next(iter(node.engine.machine.blocks.values()))
    node.storage.host.headers.bytes[block.copies[Tier.HOST].offset] ^= 1
    node.seals.scrub()
    index = client._source._view._words
    slot = next(at for at in range(0, len(index), 8) if index[at + 5] & 0xFF)
    index[slot + 6] ^= 1 << 40
    node.seals.scrub()
    moved = watched.moved()
    assert moved >= {"scrubbed_blocks_total", "checksum_failures_total", "mended_slots_total"}
    session = node.open_session()
    (offset,) = session.reserve(LAYOUT.block_bytes, [b"k" * 32], None)
    assert "reserved_bytes" in watched.moved()
    with client._source.guard([(offset, LAYOUT.block_bytes)], client._source.generation):
        session.close()
        assert "quarantined_extents" in watched.moved()


def test_two_nodes_with_streams(checked) -> None:
    cluster = checked(InProcessCluster(Config.of({"host": "1MiB", "heartbeat_s": 1000.0}), 2, streams=True))
    one, two = cluster.nodes.values()
    first, second = (checked(cluster.client(name, LAYOUT, NAMESPACE)) for name in cluster.nodes)
    store(first, (1, 2, 3))
    cluster.report_all()
    cluster.report_all()
    watched = Watched(two)
    assert second.fetch(tokens_of((1, 2, 3))).tokens_by_tier == {"peer": 3 * LAYOUT.block_tokens}
    assert watched.moved() >= {"transfer_seconds", "directory_lookups_total", "moved_bytes_total"}
    assert scrape_node(two).sum("hit_blocks_total", tier="peer") == 3
    assert scrape_node(one).sum("moved_bytes_total", source="host", target="peer") == 3 * LAYOUT.block_bytes
    host, port = cluster.links["n1"].address.rsplit(":", 1)
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        stranger.settimeout(5.0)
        with suppress(ConnectionResetError):
            assert not stranger.recv(1000)
    store(first, (7,))
    cluster.report_all()
    cluster.links["n0"].close()
    second.fetch(tokens_of((7,)), deadline_ms=2000)
    cluster.unreachable.add("coordinator")
    two.report()
    two._learning.adopt(b"")
    assert watched.moved() >= {"refused_callers_total", "peer_failures_total", "coordinator_up"}


def test_a_restart(node_factory) -> None:
    node_factory(host="1MiB", cluster_id="metrics-restart").close(remove=False)
    again = node_factory(host="1MiB", cluster_id="metrics-restart")
    assert scrape_node(again).sum("restarts_total") == 1
    MOVED.add("restarts_total")


MADE_UP = (
    *("leaving_bytes", "policy_age_seconds", "policy_known_blocks", "checkpoint_timestamp_seconds", "restored_blocks"),
    *(
        "unsealed_blocks",
        "fallback_blocks_total",
        "reinserted_blocks_total",
        "declined_tokens_total",
        "ceiling_hit_ratio",
        "twice_room_hit_ratio",
    ),
)


def test_figures_that_only_their_parts_make(node) -> None:
    """The parts have tests of their own; here their figures are made up."""
    stats = node.stats()
    stats |= {
        "leaving_bytes": {"host": 5},
        "policy": {"name": "adaptive", "known_blocks": 7, "adopted_age_s": 3.0},
        "saved": {"at_s": 1e9},
        "filling": {"blocks": 9, "nearer": 3, "damaged": 1, "too_lossy": 0, "is_done": False, "error": None},
        "seals": {**stats["seals"], "unsealed": 4},
        "counts": {"reinserted": 6},
        "declined_tokens": {"disk": 64, "peer": 0},
        "ceiling": {"asked_blocks": 10, "hit_blocks": 4, "hit_blocks_infinite": 8, "hit_blocks_twice_room": 5},
        "codecs": {**stats["codecs"], "fell_back": {"no gain": 2}},
    }
    reading = NodeReading(stats, {}, node.meters.durations(), BoundedLabels(OTHER))
    found = {(sample.name, sample.labels): sample.value for sampler in SAMPLERS for sample in sampler(reading)}
    assert found["leaving_bytes", ("host",)] == 5
    assert found["policy_age_seconds", ()] == 3.0
    assert found["policy_known_blocks", ()] == 7
    assert found["checkpoint_timestamp_seconds", ()] == 1e9
    assert found["restored_blocks", ("loaded",)] == 3
    assert found["unsealed_blocks", ()] == 4
    assert found["reinserted_blocks_total", ()] == 6
    assert found["declined_tokens_total", ("disk",)] == 64
    assert (found["ceiling_hit_ratio", ()], found["twice_room_hit_ratio", ()]) == (0.8, 0.5)
    assert found["fallback_blocks_total", ("no gain",)] == 2
    MOVED.update({name for name, _ in found} & set(MADE_UP))


def test_every_metric_of_a_node_has_moved() -> None:
    assert {metric.name for metric in of_scope(Scope.NODE)} - MOVED == set()
