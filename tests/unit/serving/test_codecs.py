"""Compressed blocks in the tiers: they are fetched within the codec's error bound, and move between tiers and nodes unchanged.

Every block that cannot be read is a miss.
"""

from dataclasses import replace

import pytest
import torch

import tiered_kv
from tests.unit.serving.prompts import NAMESPACE, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import BlockInfo, Stored, Tier
from tiered_kv.client.connect import client_of
from tiered_kv.clock import ManualClock
from tiered_kv.codecs import Int4Codec, Int8Codec
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.codecs.rotation import rope_of_theta
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.store import events as ev

LAYOUT = KVLayout(2, 2, 32, "bfloat16", 64)
"""Blocks of 32 KiB."""
T = LAYOUT.block_tokens
ROPE = rope_of_theta(1e4, LAYOUT.head_dim)
BOUND = {"int8": Int8Codec.max_error_default, "int4": Int4Codec.max_error_default}
Path = tuple[int, ...]


def kv_of(path: Path) -> torch.Tensor:
    """Returns KV (L, 2, H, N, D) as a model could compute it for a path. Paths with the same prefix get the same KV for it."""
    blocks = []
    for end in range(1, len(path) + 1):
        generator = torch.Generator().manual_seed(hash(path[:end]) % (1 << 31))
        blocks.append(torch.randn(LAYOUT.block_shape, generator=generator))
    return torch.cat(blocks, dim=-2).bfloat16()


def store(client, *paths: Path) -> list[Stored]:
    return [client.store(tokens_of(path, LAYOUT), kv_of(path)) for path in paths]


def fetch(client, path: Path, bound: float = 0.0) -> dict[str, int]:
    """Returns the fetched blocks by tier. Asserts that each is within the error bound of the stored block."""
    fetched = client.fetch(tokens_of(path, LAYOUT))
    for block in range(fetched.tokens // T):
        part = slice(block * T, (block + 1) * T)
        assert relative_error(kv_of(path)[..., part, :], fetched.kv[..., part, :]) <= bound
    return {tier: tokens // T for tier, tokens in fetched.tokens_by_tier.items()}


def settle(node) -> None:
    node.engine.drain_touches()
    node.engine.settle()
    node.check()


@pytest.fixture
def attached(node_factory, checked):
    """`attached(**settings)` returns a node, and a client whose model's rotation is known."""

    def make(**settings):
        node = node_factory(**{"host": "2MiB", "store_wait_ms": 20_000, **settings})
        return node, checked(client_of(node.info(), LAYOUT, NAMESPACE, connect=node.open_session, rope=ROPE))

    return make


def codecs_of(client, path: Path) -> list[tuple[str | None, str | None]]:
    return [(each.tier, each.codec) for each in client.explain(tokens_of(path, LAYOUT))]


@pytest.mark.parametrize("codec", ["int8", "int4", "lossless"])
def test_host_memory_has_room_for_more_compressed_blocks(attached, codec: str) -> None:
    node, client = attached(codec=f"host={codec}")
    raw_node, raw = attached()
    paths = [(turn, 1, 2) for turn in range(40)]
    for path in paths:
        assert store(client, path) == store(raw, path) == [Stored(3, 0, 0)]
        settle(node)
    more = node.stats()["blocks"] / raw_node.stats()["blocks"]
    assert more > {"int8": 1.4, "int4": 1.8, "lossless": 1.15}[codec], "blocks of 32 KiB pay for their header"
    assert node.stats()["tiers"]["host"]["used_bytes"] <= node.stats()["tiers"]["host"]["capacity_bytes"]
    held = [fetch(client, path, BOUND.get(codec, 0.0)) for path in paths]
    assert sum(sum(each.values()) for each in held) >= node.stats()["blocks"] - 3
    names = [name for path in paths for tier, name in codecs_of(client, path) if tier]
    assert set(names) <= {codec, "raw"}
    assert names.count(codec) > names.count("raw"), "those used last may stay as they were"


def test_blocks_stay_uncompressed_while_there_is_room(attached) -> None:
    node, client = attached(quality="near_exact")
    store(client, (1, 2, 3))
    settle(node)
    assert codecs_of(client, (1, 2, 3)) == [("host", "raw")] * 3
    assert fetch(client, (1, 2, 3)) == {"host": 3}


def test_a_block_is_compressed_once_for_all_tiers(attached, tmp_path) -> None:
    """Host memory, disk and objects use one codec, and all store the same frame."""
    node, client = attached(quality="near_exact", disk=f"1MiB:{tmp_path / 'disk'}", objects="memory://")
    paths = [(turn, 1, 2) for turn in range(60)]
    for path in paths:
        store(client, path)
        settle(node)
    seen = {pair for path in paths for pair in codecs_of(client, path)}
    assert {("disk", "int8"), ("objects", "int8")} <= seen
    assert all(name in ("int8", "raw") for tier, name in seen if tier == "host")
    stored = sum(sum(each["blocks"] for each in tier.values()) for tier in node.stats()["codecs"]["coded"].values())
    assert stored <= 180, "no block was coded twice"
    hits = sum(sum(fetch(client, path, BOUND["int8"]).values()) for path in paths)
    assert hits >= 150


def test_blocks_promoted_from_disk_stay_compressed_in_memory(attached, tmp_path) -> None:
    node, client = attached(codec="host=int8,disk=int4", host="1MiB", disk=f"8MiB:{tmp_path / 'disk'}")
    paths = [(turn, 1, 2) for turn in range(60)]
    for path in paths:
        store(client, path)
        settle(node)
    path = next(path for path in paths if codecs_of(client, path) == [("disk", "int4")] * 3)
    assert fetch(client, path, 2 * BOUND["int4"]) == {"disk": 3}
    for _ in range(10):  # room for them is made by others that go down first
        settle(node)
        fetch(client, path, 2 * BOUND["int4"])
    assert codecs_of(client, path) == [("host", "int4")] * 3, "coding them anew as int8 would only cost bytes"
    assert fetch(client, path, 2 * BOUND["int4"]) == {"host": 3}


def test_decoded_lossy_blocks_keep_their_recorded_error(attached, tmp_path) -> None:
    node, client = attached(codec="host=raw,disk=int4,objects=int8", disk=f"8MiB:{tmp_path / 'disk'}", objects="memory://")
    for turn in range(60):
        store(client, (turn, 1, 2))
        settle(node)
    path = next((turn, 1, 2) for turn in range(60) if codecs_of(client, (turn, 1, 2)) == [("disk", "int4")] * 3)
    for _ in range(10):  # room for them is made by others that go down first
        fetch(client, path, BOUND["int4"])
        settle(node)
    assert codecs_of(client, path) == [("host", "raw")] * 3
    key = next(key for key in node.engine.machine.blocks if key.hex() == client.explain(tokens_of(path, LAYOUT))[1].key)
    location = node.engine.machine.blocks[key].copies[Tier.HOST]
    assert 0 < node.storage.host.header(location.offset).error <= BOUND["int4"]
    copy = ev.Copy(BlockInfo(key, None, client.namespace.root(client.layout), 1), location, Tier.OBJECTS)
    assert node.storage.coded(copy).codec != Int8Codec.id, "int8 after int4 is beyond int8's bound: it is kept exactly"


def test_peers_exchange_compressed_blocks_unchanged(checked) -> None:
    config = Config.of({"host": "2MiB", "quality": "near_exact", "heartbeat_s": 1000.0, "store_wait_ms": 20_000})
    cluster = checked(InProcessCluster(config, 2, ManualClock()))
    here, there = (checked(cluster.client(node, LAYOUT, NAMESPACE, rope=ROPE)) for node in cluster.nodes)
    paths = [(turn, 1, 2) for turn in range(30)]
    for path in paths:
        store(here, path)
        settle(cluster.nodes["n0"])
    path = next(path for path in paths if codecs_of(here, path) == [("host", "int8")] * 3)
    cluster.report_all()
    assert fetch(there, path, BOUND["int8"]) == {"peer": 3}
    for node in cluster.nodes.values():
        settle(node)
    assert codecs_of(there, path) == [("host", "int8")] * 3
    assert torch.equal(here.fetch(tokens_of(path, LAYOUT)).kv, there.fetch(tokens_of(path, LAYOUT)).kv)
    assert not cluster.nodes["n1"].stats()["codecs"]["coded"], "nothing was coded there"


def test_compressed_blocks_survive_a_restart_of_the_node(node_factory, checked) -> None:
    settings = {"host": "2MiB", "quality": "near_exact", "store_wait_ms": 20_000, "cluster_id": "outlived"}
    node = node_factory(**settings)
    client = checked(client_of(node.info(), LAYOUT, NAMESPACE, connect=lambda: node.open_session(), rope=ROPE))
    paths = [(turn, 1, 2) for turn in range(30)]
    for path in paths:
        store(client, path)
        settle(node)
    before = {path: client.fetch(tokens_of(path, LAYOUT)).kv for path in paths}
    settle(node)
    node.close(remove=False)
    node = node_factory(**settings)
    settle(node)
    with client_of(node.info(), LAYOUT, NAMESPACE, connect=node.open_session, rope=ROPE) as again:
        for path in paths:
            assert torch.equal(again.fetch(tokens_of(path, LAYOUT)).kv, before[path])
        assert store(again, (99, 1, 2)) == [Stored(3, 0, 0)]
        settle(node)


def test_a_damaged_compressed_block_is_a_miss_and_is_dropped(attached) -> None:
    node, client = attached(quality="near_exact")
    paths = [(turn, 1, 2) for turn in range(30)]
    for path in paths:
        store(client, path)
        settle(node)
    path = next(path for path in paths if codecs_of(client, path) == [("host", "int8")] * 3)
    key = bytes.fromhex(client.explain(tokens_of(path, LAYOUT))[1].key)
    location = node.engine.machine.blocks[key].copies[Tier.HOST]
    node.storage.host.payload(location.offset, location.stored_bytes)[900] ^= 1
    assert fetch(client, path, BOUND["int8"]) == {"host": 1}, "the block before the damaged one"
    settle(node)
    assert key not in node.engine.machine.blocks
    assert store(client, path) == [Stored(1, 2, 0)], "and it can be stored again"


def test_blocks_that_fall_back_are_stored_exactly_and_counted(attached) -> None:
    node, client = attached(codec="host=int8", host="1MiB")
    kv = kv_of((1, 2))
    kv[0, 0, 0, 70, 3] = float("nan")
    kv[1, 1, 1, 80, 5] = float("inf")
    client.store(tokens_of((1, 2), LAYOUT), kv)
    for turn in range(20):
        store(client, (100 + turn, 1))
        fetched = client.fetch(tokens_of((1, 2), LAYOUT))
        settle(node)
    assert fetched.tokens == 2 * T
    assert torch.equal(fetched.kv[..., T:, :].view(torch.int16), kv[..., T:, :].view(torch.int16)), "NaN and infinity as they were"
    assert node.stats()["codecs"]["fell_back"] == {"error": 1}


def test_a_model_with_unknown_rotation_is_compressed_too(node_factory, client_factory) -> None:
    node = node_factory(host="1MiB", codec="host=int8", store_wait_ms=20_000)
    client = client_factory(node, LAYOUT, NAMESPACE)
    for turn in range(20):
        store(client, (turn, 1))
        settle(node)
    assert ("host", "int8") in {pair for turn in range(20) for pair in codecs_of(client, (turn, 1))}
    assert all(fetch(client, (turn, 1), BOUND["int8"]) for turn in range(15, 20))


def test_blocks_are_rotated_back_by_their_depth_in_the_chain(attached) -> None:
    """Two blocks with the same content, the first of a chain and one far down, are fetched with equal error."""
    node, client = attached(codec="host=int4", host="2MiB")
    long = tuple(range(12))
    client.store(tokens_of(long, LAYOUT)[: 10 * T], kv_of(long)[..., : 10 * T, :])
    client.store(tokens_of(long, LAYOUT), kv_of(long)[..., 10 * T :, :], start=10 * T)
    for turn in range(60):
        store(client, (200 + turn, 1))
        settle(node)
        if turn % 10 == 0:
            client.fetch(tokens_of(long, LAYOUT))  # what is used all the time stays as it was
    blocks = node.engine.machine.blocks
    keys = [bytes.fromhex(each.key) for each in client.explain(tokens_of(long, LAYOUT))]
    assert [blocks[key].depth for key in keys] == list(range(12))
    frames = [node.storage._read(key, blocks[key].copies[Tier.HOST]).frame for key in keys]
    assert [frame.codec.start for frame in frames] == [at * T for at in range(12)]
    assert fetch(client, long, BOUND["int4"]) == {"host": 12}


# What settings ask for, and who cannot give it


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "host=int3"}, "codec: host=int3: unknown codec 'int3'"),
        ({"codec": "disk=int8"}, "there is no disk tier"),
        ({"codec": "gpu=int8"}, "TIER=CODEC"),
        ({"codec": "host=xlayer:none"}, "codec: host=xlayer:none"),
        ({"quality": "best"}, "quality: must be one of exact, near_exact, balanced, compact, archive, got 'best'"),
        ({"error_budget": "1e-3"}, "error_budget: must be kl=NUMBER, more than 0 nats a token, such as kl=1e-3, got '1e-3'"),
    ],
)
def test_invalid_settings_are_rejected_by_name(settings: dict, words: str) -> None:
    with pytest.raises(TieredKVError, match=words) as refusal:
        tiered_kv.open({"host": "1MiB", **settings}, layout=LAYOUT, namespace=NAMESPACE)
    assert refusal.value.kind is Kind.CONFIG


@pytest.mark.parametrize(
    "settings",
    [{"quality": "compact"}, {"quality": "archive"}, {"codec": "host=ecuq:1e-4"}, {"error_budget": "kl=1e-3"}],
    ids=lambda settings: next(iter(settings)) + "=" + next(iter(settings.values())),
)
def test_the_error_for_a_missing_calibration_names_the_command(settings: dict, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TIERED_KV_CACHE", str(tmp_path))
    with pytest.raises(TieredKVError, match="run: tiered-kv calibrate MODEL") as refusal:
        tiered_kv.open({"host": "1MiB", **settings}, layout=LAYOUT, namespace=NAMESPACE)
    assert refusal.value.kind is Kind.CONFIG
    assert refusal.value.context["setting"] == next(iter(settings))


def test_a_rejected_worker_does_not_affect_others(node_factory, client_factory, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TIERED_KV_CACHE", str(tmp_path))
    node = node_factory(host="1MiB", quality="compact")
    with pytest.raises(TieredKVError, match="tiered-kv calibrate"):
        client_factory(node, LAYOUT, NAMESPACE)
    assert node.stats()["sessions"] == 0


def test_two_models_of_one_node_have_separate_plans(node_factory, client_factory) -> None:
    node = node_factory(host="1MiB", quality="near_exact")
    for weights in ("the one", "the other"):
        client_factory(node, LAYOUT, replace(NAMESPACE, weights=weights))
    plans = node.stats()["codecs"]["plans"].values()
    assert sorted(plan["weights"] for plan in plans) == ["the one", "the other"]
    assert all(plan["host"] == {"codec": "int8", "why": "quality near_exact"} for plan in plans)
