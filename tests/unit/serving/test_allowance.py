"""Blocks that a cluster of another quality left or sends.

They are shown only if their error is within the current plan's. Otherwise they are misses, and can be stored again.
"""

import time
import uuid
from contextlib import contextmanager

import pytest
import torch

from tests.unit.serving.prompts import NAMESPACE, block_of, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.client.connect import client_of
from tiered_kv.clock import ManualClock
from tiered_kv.codecs import Int4Codec, Int8Codec, LosslessCodec
from tiered_kv.codecs.rotation import rope_of_theta
from tiered_kv.embedded import InProcessCluster
from tiered_kv.keys import BlockKey
from tiered_kv.node.allowance import Allowance
from tiered_kv.node.checkpoints.steps import (
    LoadProgressRequest,
    LoadRequest,
    MountRequest,
    SnapshotRequest,
    WriteRequest,
    WriteStatusRequest,
)
from tiered_kv.node.codec_plan import most_error
from tiered_kv.node.compression import BlockEncoder
from tiered_kv.tiers.objects.mounted import MountedBlock

LAYOUT = KVLayout(2, 2, 32, "bfloat16", 64)
"""Blocks of 32 KiB."""
T = LAYOUT.block_tokens
ROOT = NAMESPACE.root(LAYOUT)
ROPE = rope_of_theta(1e4, LAYOUT.head_dim)
PATHS = [(turn, 1) for turn in range(60)]
PLENTY = "16MiB"
LOSSY = [{"quality": "near_exact"}, {"quality": "balanced"}, {"codec": "host=int8,disk=lossless"}, {"codec": "host=raw,disk=fp8"}]
ids = pytest.mark.parametrize("lossy", LOSSY, ids=lambda each: next(iter(each.values())))


def kv_of(path: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([block_of(path[:end], LAYOUT) for end in range(1, len(path) + 1)], dim=-2)


@contextmanager
def worker(node):
    with client_of(node.info(), LAYOUT, NAMESPACE, connect=lambda: node.open_session(), rope=ROPE) as client:
        yield client


def settle(node) -> None:
    node.engine.drain_touches()
    node.engine.settle()
    node.check()


def store(node, client) -> int:
    """Store all paths. Returns how many blocks are not cached afterwards."""
    missing = 0
    for path in PATHS:
        missing += client.store(tokens_of(path, LAYOUT), kv_of(path)).refused
        settle(node)
    return missing


def hits(client) -> tuple[int, int]:
    """Returns how many blocks are hits, and how many of these differ from the stored bits."""
    had = differing = 0
    for path in PATHS:
        fetched = client.fetch(tokens_of(path, LAYOUT))
        had += fetched.tokens // T
        for block in range(fetched.tokens // T):
            part = fetched.kv[..., block * T : (block + 1) * T, :]
            differing += not torch.equal(part, block_of(path[: block + 1], LAYOUT))
    return had, differing


def assert_exact_again(node) -> None:
    """Assert that no hit differs from the stored bits, and that all blocks are hits once they are stored again."""
    with worker(node) as client:
        had, differing = hits(client)
        assert not differing, f"{differing} of {had} hits are not what was stored"
        settle(node)
        assert store(node, client) == 0
        assert hits(client) == (2 * len(PATHS), 0)
        settle(node)


@pytest.fixture
def filled(node_factory):
    """`filled(**settings)` returns a node with all paths, compressed as the settings require in the tiers that they reached."""

    def make(**settings):
        node = node_factory(**{"host": "1MiB", "store_wait_ms": 20_000, **settings})
        with worker(node) as client:
            store(node, client)
            hits(client)
            settle(node)
        return node

    return make


@ids
def test_an_exact_cluster_shows_no_lossy_blocks_of_an_older_disk_folder(filled, node_factory, tmp_path, lossy, caplog) -> None:
    disk = f"{PLENTY}:{tmp_path}"
    filled(disk=disk, cluster_id="lossy", **lossy).close()
    node = node_factory(host="1MiB", disk=disk, cluster_id="exact", store_wait_ms=20_000)
    assert node.stats()["too_lossy"]["disk"] > 20
    assert sum("blocks are not shown (source: disk)" in each.message for each in caplog.records) == 1
    assert_exact_again(node)


def test_blocks_hidden_from_an_exact_cluster_are_shown_to_a_lossy_one(filled, node_factory, tmp_path) -> None:
    disk = f"{PLENTY}:{tmp_path}"
    filled(disk=disk, cluster_id="first", quality="near_exact").close()
    node = node_factory(host="1MiB", disk=disk, cluster_id="second")
    refused = node.stats()["too_lossy"]["disk"]
    node.close()
    node = node_factory(host="1MiB", disk=disk, cluster_id="third", quality="near_exact")
    assert node.stats()["tiers"]["disk"]["blocks"] >= refused > 0
    assert node.stats()["too_lossy"] == {}


def test_a_clusters_disk_folder_is_used_at_lower_quality_only(filled, node_factory, tmp_path) -> None:
    disk = f"{PLENTY}:{tmp_path}"
    filled(disk=disk, cluster_id="int4", quality="balanced").close()
    node = node_factory(host="1MiB", disk=disk, cluster_id="int8", quality="near_exact")
    assert node.stats()["too_lossy"]["disk"] > 20
    node.close()
    for number, looser in enumerate(({"quality": "balanced"}, {"codec": "disk=int4"}, {"quality": "archive"})):
        node = node_factory(host="1MiB", disk=disk, cluster_id=f"looser{number}", **looser)
        assert node.stats()["too_lossy"] == {}
        assert node.stats()["blocks"] > 20
        node.close()


@ids
def test_a_lossy_cluster_shows_all_blocks_of_an_exact_one(filled, node_factory, tmp_path, lossy) -> None:
    disk = f"{PLENTY}:{tmp_path}"
    filled(disk=disk, cluster_id="exact").close()
    node = node_factory(host="1MiB", disk=disk, cluster_id="lossy", store_wait_ms=20_000, **lossy)
    assert node.stats()["too_lossy"] == {}
    there = node.stats()["tiers"]["disk"]["blocks"]
    with worker(node) as client:
        had, differing = hits(client)
    assert (had > 0, differing) == (True, 0)
    assert there > 10


@ids
def test_a_folder_without_footers_is_judged_by_its_frames(filled, node_factory, tmp_path, lossy) -> None:
    """A killed node leaves such a folder: its last segment has no footer."""
    disk = f"{PLENTY}:{tmp_path}"
    node = filled(disk=disk, cluster_id="lossy", **lossy)
    node.storage.disk._seal = lambda segment: segment.writer.close()
    node.close()
    assert_exact_again(node_factory(host="1MiB", disk=disk, cluster_id="exact", store_wait_ms=20_000))


@ids
def test_an_exact_node_shows_no_lossy_blocks_of_older_memory(filled, node_factory, tmp_path, lossy) -> None:
    disk = f"{PLENTY}:{tmp_path}"
    cluster_id = uuid.uuid4().hex[:8]
    filled(disk=disk, cluster_id=cluster_id, **lossy).close(remove=False)
    assert_exact_again(node_factory(host="1MiB", disk=disk, cluster_id=cluster_id, store_wait_ms=20_000))


def test_raw_bytes_that_were_decoded_from_lossy_ones_are_not_taken_over(node_factory, tmp_path) -> None:
    settings = {"host": "1MiB", "disk": f"{PLENTY}:{tmp_path}", "cluster_id": uuid.uuid4().hex[:8], "store_wait_ms": 20_000}
    node = node_factory(codec="host=raw,disk=int4", **settings)
    with worker(node) as client:
        store(node, client)
        path = next(path for path in PATHS if {each.tier for each in client.explain(tokens_of(path, LAYOUT))} == {"disk"})
        for _ in range(20):  # room for them is made by others that go down first
            client.fetch(tokens_of(path, LAYOUT))
            settle(node)
    worn = [
        key
        for key, block in node.engine.machine.blocks.items()
        if Tier.HOST in block.copies and node.storage.host.header(block.copies[Tier.HOST].offset).error
    ]
    assert worn
    node.close(remove=False)
    node = node_factory(**settings)
    assert node.stats()["too_lossy"]["host"] >= len(worn)
    assert not set(worn) & node.engine.machine.blocks.keys()
    assert_exact_again(node)


@ids
def test_an_exact_cluster_shows_no_lossy_blocks_of_a_checkpoint(filled, node_factory, tmp_path, lossy) -> None:
    url, names, blocks = checkpoint_of(filled(disk=f"{PLENTY}:{tmp_path / 'disk'}", **lossy), tmp_path / "checkpoint")
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()}
    node = node_factory(host="4MiB", store_wait_ms=20_000)
    shown = node.checkpoint(MountRequest(url, names, blocks))
    node.checkpoint(LoadRequest())
    told = finished(node)
    assert shown + told.too_lossy >= len(blocks)
    assert told.damaged == 0
    assert_exact_again(node)
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoint").iterdir()} == before, "packs are only read"


def test_a_cluster_that_allows_a_checkpoints_error_shows_its_blocks(filled, node_factory, tmp_path) -> None:
    url, names, blocks = checkpoint_of(filled(disk=f"{PLENTY}:{tmp_path / 'disk'}", quality="near_exact"), tmp_path / "checkpoint")
    node = node_factory(host="4MiB", quality="balanced")
    assert node.checkpoint(MountRequest(url, names, blocks)) == len(blocks)
    node.checkpoint(LoadRequest())
    assert finished(node).too_lossy == 0
    with worker(node) as client:
        assert hits(client)[0] == 2 * len(PATHS)


@pytest.mark.parametrize("first", [0, 1], ids=["exact asks lossy", "lossy asks exact"])
def test_peers_of_two_qualities_show_only_blocks_that_they_allow(checked, first: int) -> None:
    common = {"host": "1MiB", "disk": "16MiB", "heartbeat_s": 1000.0, "store_wait_ms": 20_000}
    qualities = [Config.of(common | {"quality": quality}) for quality in ("near_exact", "exact")]
    cluster = checked(InProcessCluster(qualities[first], 1, ManualClock()))
    cluster.config = qualities[1 - first]
    cluster.start_node("n1")
    holder, asker = (cluster.nodes[name] for name in ("n0", "n1"))
    with worker(holder) as client:
        store(holder, client)
        hits(client)
        settle(holder)
    cluster.report_all()
    if first == 0:
        with worker(asker) as client:
            had, differing = hits(client)
        assert not differing, f"{differing} of {had} hits are not what was stored"
        assert asker.stats()["too_lossy"]["peer"] > 0
        assert_exact_again(asker)
    else:
        with worker(asker) as client:
            assert hits(client)[0] == 2 * len(PATHS), "it may code them by itself"
        assert asker.stats()["too_lossy"] == {}


# The plan of a model that becomes known after its blocks


def test_blocks_are_dropped_if_the_models_plan_does_not_allow_their_error(filled, node_factory, tmp_path) -> None:
    """Archive needs a calibration, so its allowed error is known when a worker registers the model. Here it is that of int8."""
    disk = f"{PLENTY}:{tmp_path}"
    filled(disk=disk, cluster_id="int4", codec="host=int4,disk=int4").close()
    node = node_factory(host="1MiB", disk=disk, cluster_id="later", quality="archive", store_wait_ms=20_000)
    there = node.stats()["blocks"]
    assert there > 20
    planned = node.storage.encoder._planned

    def as_near_exact(facts):
        node.storage.encoder._config = node.config.with_(quality="near_exact")
        return planned(facts)

    node.storage.encoder._planned = as_near_exact
    with worker(node) as client:
        assert node.stats()["blocks"] < there - 20
        assert node.stats()["too_lossy"]["introduced"] == there - node.stats()["blocks"]
        assert store(node, client) == 0
        hits(client)
        settle(node)


def test_a_disallowed_block_is_dropped_once_its_reader_has_finished(filled, node_factory, tmp_path) -> None:
    disk = f"{PLENTY}:{tmp_path}"
    filled(disk=disk, cluster_id="int4", codec="host=int4,disk=int4").close()
    node = node_factory(host="1MiB", disk=disk, cluster_id="later", quality="archive")
    keys = list(node.engine.machine.blocks)
    with node.engine.lock, node.pinned(keys[:1]):
        node._too_lossy |= dict.fromkeys(keys[:2])
        node._drop_too_lossy()
        assert keys[0] in node.engine.machine.blocks
        assert keys[1] not in node.engine.machine.blocks
    node.beat()
    assert keys[0] not in node.engine.machine.blocks


# The check itself


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"quality": "exact"}, 0.0),
        ({"quality": "near_exact"}, Int8Codec.max_error_default),
        ({"quality": "balanced"}, float("inf")),
        ({"quality": "compact"}, float("inf")),
        ({"error_budget": "kl=1e-3"}, float("inf")),
        ({"codec": "host=int4"}, Int4Codec.max_error_default),
        ({"codec": "host=ecuq:1e-4"}, float("inf")),
        ({"quality": "near_exact", "codec": "host=raw"}, 0.0),
        ({"quality": "balanced", "codec": "host=int8"}, Int8Codec.max_error_default),
        ({"quality": "near_exact", "codec": "host=raw", "disk": "1MiB"}, Int8Codec.max_error_default),
    ],
    ids=str,
)
def test_the_tier_with_the_largest_error_sets_the_allowance(settings: dict, most: float) -> None:
    assert most_error(Config.of({"host": "1MiB", **settings})) == most


INT8, INT4, LOSSLESS, UNKNOWN = Int8Codec.id, Int4Codec.id, LosslessCodec.id, 250


@pytest.mark.parametrize(
    ("quality", "codec", "error", "shown"),
    [
        ("exact", LOSSLESS, 0.0, True),
        ("exact", 0, None, True),
        ("exact", LOSSLESS, 1e-9, False),
        ("exact", INT8, 0.0, False),
        ("exact", INT8, None, False),
        ("exact", UNKNOWN, None, False),
        ("near_exact", INT8, Int8Codec.max_error_default, True),
        ("near_exact", INT8, None, True),
        ("near_exact", INT4, 1e-2, False),
        ("near_exact", INT4, 1e-4, True),
        ("near_exact", LOSSLESS, 1e-2, False),
        ("near_exact", INT8, float("nan"), False),
        ("near_exact", INT8, -1.0, False),
        ("archive", INT4, 0.1, True),
    ],
)
def test_a_blocks_codec_and_error_decide_whether_it_is_shown(quality: str, codec: int, error: float | None, shown: bool) -> None:
    allowance = Allowance(BlockEncoder(Config.of({"host": "1MiB", "quality": quality})))
    assert allowance.admits(bytes(32), ROOT, codec, error) is shown


def test_an_unrecorded_error_is_read_from_the_frame_if_it_matters() -> None:
    allowance = Allowance(BlockEncoder(Config.of({"host": "1MiB", "quality": "near_exact"})))
    assert not allowance.admits(bytes(32), ROOT, INT4, 0.0, lambda: 1e-2)
    assert allowance.admits(bytes(32), ROOT, INT4, 0.0, lambda: 1e-5)
    allowance = Allowance(BlockEncoder(Config.of({"host": "1MiB"})))
    assert not allowance.admits(bytes(32), ROOT, INT4, 0.0, lambda: pytest.fail("the codec says enough"))


def checkpoint_of(node, folder) -> tuple[str, list[str], list[MountedBlock]]:
    """Write all blocks of a node as packs in a folder. Returns the packs' blocks, parents first."""
    snapshot = node.checkpoint(SnapshotRequest())
    folder.mkdir()
    node.checkpoint(WriteRequest(str(folder), [seen.key for seen in snapshot.blocks], None, 300_000))
    while not (state := node.checkpoint(WriteStatusRequest())).is_done:
        time.sleep(0.01)  # polls for an end, orders nothing
    places: dict[BlockKey, Location] = {}
    for number, pack in enumerate(state.packs):
        for entry in pack.entries:
            places[entry.key] = Location(Tier.CHECKPOINT, entry.codec, number, entry.offset, entry.stored_bytes, entry.raw_bytes)
    blocks = [
        MountedBlock(BlockInfo(seen.key, seen.parent, seen.root, seen.depth), places[seen.key])
        for seen in sorted(snapshot.blocks, key=lambda seen: seen.depth)
    ]
    node.close()
    return str(folder), [pack.name for pack in state.packs], blocks


def finished(node):
    while not (told := node.checkpoint(LoadProgressRequest())).is_done:
        time.sleep(0.01)  # polls for an end, orders nothing
    assert told.error is None
    return told
