"""Blocks of an opaque layout: stored, moved, encoded and pulled as other blocks are, and the same bits at every quality."""

import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch

import tiered_kv
from tests.unit.serving.opaque_blocks import OPAQUE, T, bytes_of, fetch, store
from tests.unit.serving.prompts import NAMESPACE, kv_of, tokens_of
from tiered_kv import Config, KVLayout, OpaqueLayout
from tiered_kv.blocks import Match, Tier
from tiered_kv.codecs import CODECS, LosslessCodec, codec_for
from tiered_kv.codecs.fidelity import relative_error
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.codec_plan import opaque_plan
from tiered_kv.node.compression import BlockEncoder
from tiered_kv.protocol.model_info import ModelInfo

QUALITIES = ["exact", "near_exact", "balanced", "compact", "archive"]
PATHS = [(turn, 1, 2) for turn in range(24)]
"""72 blocks: more than twice as many as fit in a host tier of 1 MiB."""
PATIENT = {"store_wait_ms": 10_000, "fetch_deadline_ms": 30_000}
ONLY_LOSSLESS = "only lossless codecs apply to an opaque layout"


@pytest.fixture
def opened(checked):
    """`opened(layout, **settings)` is a client of a cache of its own in this process."""

    def open_it(layout: OpaqueLayout = OPAQUE, **settings: object):
        config = {"host": "1MiB", **PATIENT, **settings}
        return checked(tiered_kv.open(config, layout=layout, namespace=NAMESPACE))

    return open_it


@pytest.fixture
def clusters(checked):
    def make(nodes: int = 1, **settings: object) -> InProcessCluster:
        config = Config.of({"host": "1MiB", "heartbeat_s": 1000.0, **PATIENT, **settings})
        return checked(InProcessCluster(config, nodes))

    return make


def tiers_had(client, paths=PATHS) -> Counter[str]:
    """Fetch all paths. Returns the number of blocks by tier."""
    return sum((Counter(fetch(client, path)) for path in paths), Counter())


def test_blocks_are_fetched_as_they_were_stored(opened) -> None:
    client, path = opened(host="4MiB"), (1, 2, 3, 4)
    assert client.match(tokens_of(path, OPAQUE)).tokens == 0
    store(client, path)
    assert client.match(tokens_of(path, OPAQUE)) == Match(4 * T, {"host": 4 * T})
    assert fetch(client, path) == {"host": 4}
    assert fetch(client, (1, 2, 9)) == {"host": 2}
    room = torch.zeros((1, 1, 1, 9 * T, OPAQUE.token_bytes), dtype=torch.uint8)
    assert client.fetch(tokens_of(path, OPAQUE), room[..., T : 4 * T, :]).tokens == 3 * T
    assert torch.equal(room[..., T : 4 * T, :], bytes_of(path)[..., : 3 * T, :])
    assert client.stats()["client"]["hit_blocks"] == 4 + 2 + 3
    assert client.stats()["client"]["prefill_tokens_saved"] == 9 * T


def test_a_store_may_begin_within_the_prompt(opened) -> None:
    client, path = opened(), (1, 2, 3)
    store(client, path[:1])
    assert client.store(tokens_of(path, OPAQUE), bytes_of(path)[..., T:, :], start=T).new == 2
    assert fetch(client, path) == {"host": 3}


def test_other_tensors_are_rejected(opened) -> None:
    client, ids, kv = opened(), tokens_of((1,), OPAQUE), bytes_of((1,))
    for wrong in (kv[..., :-1], kv.view(torch.int8), kv.view(2, 1, 1, T, -1), kv.view(-1), [(kv[0, 0], kv[0, 0])]):
        with pytest.raises(TieredKVError, match="kv") as caught:
            client.store(ids, wrong)
        assert caught.value.kind is Kind.LAYOUT
    assert client.match(ids).tokens == 0


@pytest.mark.parametrize("quality", QUALITIES)
def test_every_quality_keeps_every_bit(opened, quality: str) -> None:
    client = opened(quality=quality, disk="8MiB")
    store(client, *PATHS)
    had = tiers_had(client)
    assert had.total() == 3 * len(PATHS)
    assert had["disk"] > 0
    codecs = client.stats()["node"]["codecs"]
    assert {codec for by_codec in codecs["coded"].values() for codec in by_codec} == {"lossless"}
    assert codecs["fell_back"] == {}
    for by_codec in codecs["coded"].values():
        assert by_codec["lossless"]["kept_bytes"] < 0.75 * by_codec["lossless"]["raw_bytes"], "the width of the numbers helps the codec"


def test_memory_that_fills_up_is_encoded_losslessly(clusters, checked) -> None:
    """30 raw blocks fit into memory; 33 do once some are encoded."""
    cluster = clusters(quality="compact")
    client = checked(cluster.client("n0", OPAQUE, NAMESPACE))
    for path in PATHS[:11]:
        store(client, path)
        cluster.nodes["n0"].engine.settle()
    assert tiers_had(client, PATHS[:11]) == {"host": 33}
    in_memory = client.stats()["node"]["codecs"]["coded"]["host"]
    assert in_memory.keys() == {"lossless"}


def test_all_tiers_keep_every_bit(opened, tmp_path) -> None:
    folder = tmp_path / "objects"
    folder.mkdir()
    client = opened(device="1MiB:cpu", disk="1MiB", objects=str(folder), quality="near_exact")
    store(client, *PATHS)
    for path in PATHS:
        fetch(client, path)
        fetch(client, path)
    assert len(tiers_had(client)) >= 2  # which blocks are where depends on how far the engine is


@pytest.mark.parametrize("quality", ["exact", "compact"])
def test_the_next_cache_with_the_same_disk_has_the_blocks(opened, tmp_path, quality: str) -> None:
    settings = {"disk": "8MiB", "disk_path": str(tmp_path / "disk"), "quality": quality}
    (tmp_path / "disk").mkdir()
    first, paths = opened(**settings), [(turn, 1, 2) for turn in range(60)]
    store(first, *paths)
    first.close()
    other = opened(replace(OPAQUE, description="other pages"), **settings)
    assert other.match(tokens_of(PATHS[0], OPAQUE)).tokens == 0
    other.close()
    had = tiers_had(opened(**settings), paths)
    assert had["disk"] >= 72, "180 blocks were stored, of which memory has at most 50"


def test_a_restarted_node_shows_its_blocks(clusters, checked) -> None:
    cluster = clusters(quality="near_exact", disk="8MiB")
    client = checked(cluster.client("n0", OPAQUE, NAMESPACE))
    store(client, *PATHS)
    cluster.nodes["n0"].close(remove=False)
    cluster.start_node("n0")
    assert tiers_had(client).total() == 3 * len(PATHS)


@pytest.mark.parametrize("quality", QUALITIES)
def test_blocks_are_pulled_from_a_peer(clusters, checked, quality: str) -> None:
    cluster = clusters(2, quality=quality, disk="8MiB")
    one, other = (checked(cluster.client(node, OPAQUE, NAMESPACE)) for node in cluster.nodes)
    store(one, *PATHS)
    cluster.nodes["n0"].engine.settle()
    cluster.report_all()
    assert other.match(tokens_of(PATHS[0], OPAQUE)).tokens_by_tier == {"peer": 3 * T}
    for path in (PATHS[0], PATHS[-1]):
        assert fetch(other, path) == {"peer": 3}
        assert fetch(other, path) == {"host": 3}
    stranger = checked(cluster.client("n1", replace(OPAQUE, description="other pages"), NAMESPACE))
    assert stranger.match(tokens_of(PATHS[0], OPAQUE)).tokens == 0


def test_a_model_of_a_kv_layout_is_encoded_with_loss_beside_an_opaque_one(clusters, checked) -> None:
    layout = KVLayout(2, 2, 32, "bfloat16", 64)
    assert layout.block_bytes == OPAQUE.block_bytes
    cluster = clusters(quality="near_exact", disk="8MiB")
    opaque, open_ = (checked(cluster.client("n0", each, NAMESPACE)) for each in (OPAQUE, layout))
    for path in PATHS:
        store(opaque, path)
        assert open_.store(tokens_of(path, layout), kv_of(path, layout)).refused == 0
    cluster.nodes["n0"].engine.settle()
    assert tiers_had(opaque).total() == 3 * len(PATHS)
    worst = 0.0
    for path in PATHS:
        fetched = open_.fetch(tokens_of(path, layout))
        assert fetched.tokens == 3 * layout.block_tokens
        worst = max(worst, relative_error(kv_of(path, layout), fetched.kv))
    encoder = cluster.nodes["n0"].storage.encoder
    assert 0.0 < worst <= encoder.most_error(NAMESPACE.root(layout))
    assert encoder.most_error(NAMESPACE.root(OPAQUE)) == 0.0
    coded = cluster.nodes["n0"].stats()["codecs"]["coded"].values()
    assert {codec for by_codec in coded for codec in by_codec} == {"lossless", "int8"}


def test_layouts_with_different_descriptions_never_meet(clusters, checked) -> None:
    cluster = clusters(host="4MiB")
    names = ["one order", "another order"]
    clients = {name: checked(cluster.client("n0", replace(OPAQUE, description=name), NAMESPACE)) for name in names}
    store(clients["one order"], *PATHS[:4], engine="one order")
    assert clients["another order"].match(tokens_of(PATHS[0], OPAQUE)).tokens == 0
    assert fetch(clients["another order"], PATHS[0]) == {}
    store(clients["another order"], *PATHS[:4], engine="another order")
    for name, client in clients.items():
        for path in PATHS[:4]:
            assert fetch(client, path, engine=name) == {"host": 3}


def test_ranks_of_an_opaque_model_have_their_own_blocks(clusters, checked) -> None:
    cluster = clusters()
    ranks = [replace(NAMESPACE, rank=rank, world=2) for rank in range(2)]
    clients = [checked(cluster.client("n0", OPAQUE, rank)) for rank in ranks]
    for number, client in enumerate(clients):
        store(client, PATHS[0], engine=str(number))
    for number, client in enumerate(clients):
        assert fetch(client, PATHS[0], engine=str(number)) == {"host": 3}


# Plans and codecs


def test_a_plan_says_which_codecs_do_not_apply() -> None:
    lower = {"disk": "1GiB", "objects": "memory://"}
    assert opaque_plan(Config(**lower)).as_record() == {
        "host": {"codec": "raw", "why": "quality exact"},
        "disk": {"codec": "lossless", "why": "quality exact"},
        "objects": {"codec": "lossless", "why": "quality exact"},
    }
    assert opaque_plan(Config(quality="compact", codec="disk=int4,objects=raw", **lower)).as_record() == {
        "host": {"codec": "lossless", "why": f"quality compact, but {ONLY_LOSSLESS}, so not int8"},
        "disk": {"codec": "lossless", "why": f"set by codec, but {ONLY_LOSSLESS}, so not int4"},
        "objects": {"codec": "raw", "why": "set by codec"},
    }
    assert opaque_plan(Config(error_budget="kl=1e-3", codec="disk=raw", disk="1GiB")).as_record() == {
        "host": {"codec": "lossless", "why": f"error_budget: {ONLY_LOSSLESS}"},
        "disk": {"codec": "raw", "why": "set by codec"},
    }


@pytest.mark.parametrize(
    "settings", [{"quality": quality} for quality in QUALITIES] + [{"error_budget": "kl=1e-3"}, {"codec": "host=int4"}]
)
def test_no_setting_needs_a_calibration_or_spends_an_error(settings: dict, tmp_path, caplog) -> None:
    encoder = BlockEncoder(Config(**settings, calibration=str(tmp_path / "of another model.safetensors")))
    root, facts = NAMESPACE.root(OPAQUE), ModelInfo(OPAQUE, NAMESPACE.weights)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert encoder.introduce(root, facts)["calibration"] is None
            encoder.introduce(root, replace(facts, rope_halves=False))
    assert encoder.most_error(root) == 0.0
    assert [ONLY_LOSSLESS in record.message for record in caplog.records] == [True] * (settings != {"quality": "exact"})


@pytest.mark.parametrize("name", [codec.name for codec in CODECS])
def test_a_lossy_codec_is_replaced_by_the_lossless_one(name: str) -> None:
    wanted = codec_for(name, None) if name == "raw" else LosslessCodec(2)
    assert codec_for(name, OPAQUE) == wanted
    with pytest.raises(TieredKVError, match="unknown codec"):
        codec_for("int9", OPAQUE)


@pytest.mark.parametrize("cls", [codec for codec in CODECS if codec.is_lossy])
def test_a_lossy_codec_itself_falls_back(cls) -> None:
    encoded = cls.for_layout(OPAQUE).encode(bytes_of((1,)).view(-1))
    assert encoded.fell_back == "opaque"
    assert not encoded.codec.is_lossy
    assert encoded.error == 0.0


def test_blocks_of_an_odd_number_of_bytes_keep_every_bit(opened) -> None:
    layout = OpaqueLayout(3 * 4099, 3, "odd", 8)
    client = opened(layout, quality="near_exact", disk="8MiB", host="1MiB")
    kv = torch.randint(0, 4, layout.kv_shape(300), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert client.store(range(300), kv).refused == 0
    fetched = client.fetch(range(300))
    assert fetched.tokens == 300
    assert torch.equal(fetched.kv, kv)
    assert Tier.DISK.label in fetched.tokens_by_tier or "lossless" in client.stats()["node"]["codecs"]["coded"].get("host", {})
