"""A node's part in checkpoints: it writes packs of a snapshot, and uses packs' blocks as its coldest tier."""

import pickle
import threading
import time

import pytest

from tests.unit.serving.prompts import NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.embedded import InProcessCluster
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.checkpoints.loader import runs_of
from tiered_kv.node.checkpoints.steps import (
    LoadProgressRequest,
    LoadRequest,
    MountRequest,
    ReshardRequest,
    SnapshotRequest,
    StopWritingRequest,
    WriteRequest,
    WriteStatus,
    WriteStatusRequest,
)
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.mounted import MountedBlock
from tiered_kv.tiers.objects.packs import read_footer

LARGE = KVLayout(2, 2, 16, "float32", 64)
"""Blocks of 32 KiB: 30 fill the arena of a 1 MiB host tier."""
ROOT = NAMESPACE.root(LARGE)
PATHS = [(turn, 1, 2) for turn in range(6)]


class Here(InProcessCluster):
    """A cluster that closes its clients."""

    def __init__(self, config: Config, nodes: int) -> None:
        self.clients = []
        super().__init__(config, nodes)

    def client(self, *arguments):
        self.clients.append(super().client(*arguments))
        return self.clients[-1]

    def close(self) -> None:
        for client in self.clients:
            client.close()
        super().close()


@pytest.fixture
def cluster():
    clusters = []

    def start(nodes: int = 1, **settings) -> Here:
        clusters.append(Here(Config(**{"host": "1MiB", "store_wait_ms": 10_000, **settings}), nodes))
        return clusters[-1]

    yield start
    for each in clusters:
        each.close()


def client_of(cluster: InProcessCluster, node: str = "n0"):
    return cluster.client(node, LARGE, NAMESPACE)


def store(client, *paths) -> None:
    for path in paths:
        assert client.store(tokens_of(path, LARGE), kv_of(path, LARGE)).refused == 0


def blocks_had(client, path) -> dict[str, int]:
    fetched = client.fetch(tokens_of(path, LARGE))
    assert_is_prefix(fetched, path, LARGE)
    return {tier: tokens // LARGE.block_tokens for tier, tokens in fetched.tokens_by_tier.items()}


def written(node) -> WriteStatus:
    for _ in range(3000):
        state = node.checkpoint(WriteStatusRequest())
        if state.is_done:
            return state
        time.sleep(0.01)  # polls for an end, orders nothing
    raise AssertionError("writing did not end")


def filled(node):
    for _ in range(3000):
        state = node.checkpoint(LoadProgressRequest())
        if state.is_done:
            return state
        time.sleep(0.01)  # polls for an end, orders nothing
    raise AssertionError("filling did not end")


def saved(node, folder, pack_bytes: int = 300_000, **wish):
    """Write all blocks of a node in packs. Returns the packs' content."""
    snapshot = node.checkpoint(SnapshotRequest(*wish.values()))
    folder.mkdir(exist_ok=True)
    node.checkpoint(WriteRequest(str(folder), [seen.key for seen in snapshot.blocks], None, pack_bytes))
    state = written(node)
    assert state.error is None
    return snapshot, state


def mounted_blocks(snapshot, state) -> tuple[list[str], list[MountedBlock]]:
    places = {entry.key: (number, entry) for number, pack in enumerate(state.packs) for entry in pack.entries}
    blocks = []
    for seen in sorted(snapshot.blocks, key=lambda seen: seen.depth):
        number, entry = places[seen.key]
        location = Location(Tier.CHECKPOINT, entry.codec, number, entry.offset, entry.stored_bytes, entry.raw_bytes)
        blocks.append(MountedBlock(BlockInfo(seen.key, seen.parent, seen.root, seen.depth), location, seen.hits + 1))
    return [pack.name for pack in state.packs], blocks


def test_a_snapshot_lists_the_most_recently_used_blocks_first(cluster) -> None:
    here = cluster()
    client = client_of(here)
    store(client, *PATHS[:3])
    blocks_had(client, PATHS[0])
    snapshot = here.nodes["n0"].checkpoint(SnapshotRequest())
    assert [seen.depth for seen in snapshot.blocks[:3]] == [0, 1, 2]
    assert [seen.hits for seen in snapshot.blocks] == [1] * 3 + [0] * 6
    assert {seen.root for seen in snapshot.blocks} == {ROOT} == set(snapshot.models)
    assert snapshot.models[ROOT]["namespace"]["weights"] == NAMESPACE.weights
    only_hit = here.nodes["n0"].checkpoint(SnapshotRequest(None, 1)).blocks
    assert [seen.key for seen in only_hit] == [seen.key for seen in snapshot.blocks[:3]]
    assert here.nodes["n0"].checkpoint(SnapshotRequest((int(Tier.DISK),))).blocks == []


def test_packs_have_the_snapshots_blocks_which_are_hits_once_mounted_elsewhere(cluster, tmp_path) -> None:
    here = cluster(disk=f"4MiB:{tmp_path / 'disk'}")
    store(client_of(here), *[(turn, 1, 2) for turn in range(20)])  # more than memory holds
    node = here.nodes["n0"]
    node.engine.settle()
    snapshot, state = saved(node, tmp_path / "packs")
    assert {Tier.HOST, Tier.DISK} == {seen.tier for seen in snapshot.blocks}
    assert (state.blocks, state.left) == (len(snapshot.blocks), [])
    with FolderStore(tmp_path / "packs") as packs:
        assert {pack.name: pack.nbytes for pack in state.packs} == packs.sizes()
        assert [read_footer(packs, pack.name, pack.nbytes) for pack in state.packs] == state.packs
        assert max(packs.sizes().values()) <= 300_000
    there = cluster(host="4MiB")
    names, blocks = mounted_blocks(snapshot, state)
    assert there.nodes["n0"].checkpoint(MountRequest(str(tmp_path / "packs"), names, blocks)) == len(blocks)
    other = client_of(there)
    assert blocks_had(other, (3, 1, 2)) == {"checkpoint": 3}
    there.nodes["n0"].engine.settle()
    assert blocks_had(other, (3, 1, 2)) == {"host": 3}
    usage = there.nodes["n0"].stats()["tiers"]["checkpoint"]
    assert usage["blocks"] == len(blocks)
    there.nodes["n0"].check()


def test_loading_fills_memory_then_disk_and_evicts_nothing(cluster, tmp_path) -> None:
    here = cluster(host="4MiB")
    paths = [(turn, 1, 2) for turn in range(30)]  # 90 blocks
    store(client_of(here), *paths)
    snapshot, state = saved(here.nodes["n0"], tmp_path / "packs")
    there = cluster(disk=f"1MiB:{tmp_path / 'disk'}", disk_segment="128KiB")
    node = there.nodes["n0"]
    own = (77, 1)
    store(client_of(there), own)
    names, blocks = mounted_blocks(snapshot, state)
    assert node.checkpoint(MountRequest(str(tmp_path / "packs"), names, blocks)) == 90
    node.checkpoint(LoadRequest())
    state = filled(node)
    assert state.error is None
    assert state.problems == []
    assert 20 <= state.host <= 30
    assert 15 <= state.disk <= 30
    machine = node.engine.machine
    assert all(Tier.HOST in machine.blocks[block.key].copies for block in blocks[: state.host])
    node.engine.settle()
    node.check()
    client = client_of(there)
    assert blocks_had(client, own) == {"host": 2}
    for path in paths:
        assert sum(blocks_had(client, path).values()) == 3
    node.engine.settle()
    node.check()


def test_blocks_evicted_between_snapshot_and_pack_are_still_written(cluster, tmp_path) -> None:
    here = cluster()
    client, node = client_of(here), here.nodes["n0"]
    store(client, *PATHS[:2])
    snapshot = node.checkpoint(SnapshotRequest())
    with node.running():
        pass
    node.forget(ROOT)
    assert node.stats()["blocks"] == 0
    node.checkpoint(WriteRequest(str(tmp_path), [seen.key for seen in snapshot.blocks]))
    state = written(node)
    room = int(node.config.host / 8) // LARGE.block_bytes
    assert state.blocks == room - 1 or state.blocks == room
    assert state.blocks + len(state.left) == 6
    node.checkpoint(StopWritingRequest())
    assert node.engine.on_gone is None


def test_one_checkpoint_is_written_at_a_time_and_an_abandoned_one_ends(cluster, tmp_path, monkeypatch) -> None:
    here = cluster()
    node = here.nodes["n0"]
    store(client_of(here), *PATHS)
    with pytest.raises(TieredKVError, match="there is no snapshot"):
        node.checkpoint(WriteRequest(str(tmp_path), []))
    with pytest.raises(TieredKVError, match="nothing is being written"):
        node.checkpoint(WriteStatusRequest())
    keys = [seen.key for seen in node.checkpoint(SnapshotRequest()).blocks]
    node.checkpoint(WriteRequest(str(tmp_path), keys, 100_000.0, 70_000))  # two blocks a pack and a second
    with pytest.raises(TieredKVError, match="another checkpoint"):
        node.checkpoint(SnapshotRequest())
    monkeypatch.setattr("tiered_kv.node.checkpoints.writer.UNASKED_S", 0.0)
    for _ in range(1000):
        if node.checkpoint_writer._job is None:
            break
        time.sleep(0.01)  # polls for the beat that notices, orders nothing
    assert node.checkpoint_writer._job is None
    assert len(FolderStore(tmp_path).sizes()) < 9
    assert node.checkpoint(SnapshotRequest()).blocks


def test_a_store_that_fails_ends_the_writing_with_its_error(cluster, tmp_path) -> None:
    here = cluster()
    node = here.nodes["n0"]
    store(client_of(here), *PATHS)
    keys = [seen.key for seen in node.checkpoint(SnapshotRequest()).blocks]
    (tmp_path / "packs").mkdir()
    node.checkpoint(WriteRequest(str(tmp_path / "packs"), keys[:1]))
    assert written(node).error is None
    node.checkpoint(SnapshotRequest())
    (tmp_path / "packs").rename(tmp_path / "other")
    (tmp_path / "packs").write_text("no folder")
    with pytest.raises(TieredKVError) as refused:
        node.checkpoint(WriteRequest(str(tmp_path / "packs"), keys))
    assert refused.value.kind is Kind.STORAGE
    (tmp_path / "packs").unlink()
    with pytest.raises(TieredKVError, match="no such folder on this machine") as refused:
        node.checkpoint(WriteRequest(str(tmp_path / "packs"), keys))
    assert refused.value.context["setting"] == "url"
    assert not (tmp_path / "packs").exists(), "what is not shared by the nodes is not made up"


def test_an_unexpected_end_of_writing_is_reported_and_the_node_can_write_again(cluster, tmp_path, monkeypatch) -> None:
    here = cluster()
    node = here.nodes["n0"]
    store(client_of(here), *PATHS)

    def full(*_):
        raise MemoryError("no room for a copy")

    keys = [seen.key for seen in node.checkpoint(SnapshotRequest()).blocks]
    with monkeypatch.context() as patch:
        patch.setattr("tiered_kv.node.checkpoints.writer._copied", full)
        node.checkpoint(WriteRequest(str(tmp_path), keys))
        assert "MemoryError" in str(written(node).error)
    node.checkpoint(StopWritingRequest())
    assert node.engine.on_gone is None
    assert saved(node, tmp_path)[1].blocks == len(keys)


def test_a_damaged_frame_is_reported_and_all_other_blocks_are_restored(cluster, tmp_path) -> None:
    here = cluster()
    store(client_of(here), *PATHS)
    snapshot, state = saved(here.nodes["n0"], tmp_path)
    names, blocks = mounted_blocks(snapshot, state)
    bad = blocks[-1]
    path = tmp_path / names[bad.location.segment]
    content = bytearray(path.read_bytes())
    content[bad.location.offset + 500] ^= 1
    path.write_bytes(content)
    there = cluster()
    node = there.nodes["n0"]
    node.checkpoint(MountRequest(str(tmp_path), names, blocks))
    node.checkpoint(LoadRequest())
    state = filled(node)
    assert (state.host, state.damaged) == (len(blocks) - 1, 1)
    assert bad.key.hex() in state.problems[0]
    assert bad.key not in node.engine.machine.blocks
    node.check()


def test_a_missing_pack_loses_only_its_blocks(cluster, tmp_path) -> None:
    here = cluster()
    store(client_of(here), *PATHS)
    snapshot, state = saved(here.nodes["n0"], tmp_path)
    names, blocks = mounted_blocks(snapshot, state)
    gone = {block.key for block in blocks if block.location.segment == 0}
    (tmp_path / names[0]).unlink()
    there = cluster()
    node = there.nodes["n0"]
    node.checkpoint(MountRequest(str(tmp_path), names, blocks))
    node.checkpoint(LoadRequest())
    state = filled(node)
    assert (state.host, state.damaged) == (len(blocks) - len(gone), len(gone))
    assert not gone & node.engine.machine.blocks.keys()
    node.check()


def test_a_full_index_drops_blocks_that_only_the_checkpoint_has_first(cluster, tmp_path, monkeypatch) -> None:
    here = cluster()
    store(client_of(here), *PATHS)
    snapshot, state = saved(here.nodes["n0"], tmp_path)
    names, blocks = mounted_blocks(snapshot, state)
    there = cluster()
    node = there.nodes["n0"]
    monkeypatch.setattr(type(node.storage.index), "capacity_blocks", property(lambda _: 20))
    assert node.checkpoint(MountRequest(str(tmp_path), names, blocks)) == 17
    client = client_of(there)
    store(client, (50, 51, 52, 53, 54, 55))
    assert blocks_had(client, (50, 51, 52, 53, 54, 55)) == {"host": 6}
    assert node.engine.machine.blocks_by_tier[Tier.CHECKPOINT] <= 14
    node.beat()
    assert node.engine.machine.blocks_by_tier[Tier.CHECKPOINT] <= 12
    assert blocks_had(client, PATHS[0])["checkpoint"] >= 1
    node.check()


def test_blocks_of_one_pack_are_read_together() -> None:
    def block(number: int, segment: int, offset: int, nbytes: int = 100) -> MountedBlock:
        return MountedBlock(BlockInfo(bytes([number]) * 32, None, ROOT, 0), Location(Tier.CHECKPOINT, 0, segment, offset, nbytes, nbytes))

    near, far, other = [block(1, 0, 0), block(2, 0, 150), block(3, 0, 260)], block(4, 0, 1 << 20), block(5, 1, 0)
    runs = list(runs_of([near[2], far, other, near[0], near[1]]))
    assert [(run.segment, run.offset, run.nbytes, run.blocks) for run in runs] == [
        (0, 0, 360, near),
        (0, 1 << 20, 100, [far]),
        (1, 0, 100, [other]),
    ]
    assert [run.nbytes for run in runs_of(near, most_bytes=300)] == [250, 100]


def test_workers_store_and_fetch_while_a_checkpoint_is_written_and_read(cluster, tmp_path) -> None:
    here = cluster(host="4MiB")
    node, client = here.nodes["n0"], client_of(here)
    paths = [(turn, 1, 2) for turn in range(25)]
    store(client, *paths)
    snapshot = node.checkpoint(SnapshotRequest())
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work() -> None:
        turn = 100
        try:
            while not stop.is_set():
                store(client, (turn, 1))
                blocks_had(client, paths[turn % 25])
                turn += 1
        except BaseException as error:  # noqa: BLE001 (told below)
            wrong.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for number in range(5):
            (tmp_path / str(number)).mkdir()
            node.checkpoint(WriteRequest(str(tmp_path / str(number)), [seen.key for seen in snapshot.blocks], None, 200_000))
            state = written(node)
            assert state.error is None
            assert state.blocks + len(state.left) == len(snapshot.blocks)
            snapshot = node.checkpoint(SnapshotRequest())
    finally:
        stop.set()
        worker.join()
    assert not wrong
    node.engine.settle()
    node.check()


def test_over_a_slow_link_large_reads_fall_back_to_single_blocks(cluster, tmp_path, monkeypatch) -> None:
    here = cluster()
    store(client_of(here), *PATHS)
    snapshot, state = saved(here.nodes["n0"], tmp_path)
    names, blocks = mounted_blocks(snapshot, state)
    whole, asked = FolderStore.get_range, []

    def slow(self, name: str, offset: int, nbytes: int):
        asked.append(nbytes)
        if nbytes > 40_000:
            raise self.failed(f"get {name}", "it took too long")
        return whole(self, name, offset, nbytes)

    monkeypatch.setattr(FolderStore, "get_range", slow)
    there = cluster(host="8MiB")
    node = there.nodes["n0"]
    node.checkpoint(MountRequest(str(tmp_path), names, blocks))
    node.checkpoint(LoadRequest())
    state = filled(node)
    assert (state.host, state.damaged, state.error) == (len(blocks), 0, None)
    assert max(asked) > 40_000


def test_requests_can_be_pickled_and_do_not_print_credentials() -> None:
    block = MountedBlock(BlockInfo(bytes(32), None, ROOT, 0), Location(Tier.CHECKPOINT, 0, 0, 0, 100, 100))
    secret = {"AWS_SECRET_ACCESS_KEY": "very secret"}
    requests = [
        SnapshotRequest((2, 3), 1, "ticket"),
        WriteRequest("s3://bucket", [bytes(32)], 1e6, credentials=secret),
        MountRequest("s3://bucket", ["pack"], [block], {ROOT: {"weights": "w"}}, secret),
        ReshardRequest("s3://bucket", ["pack"], [], credentials=secret),
        LoadProgressRequest(),
    ]
    for request in requests:
        assert pickle.loads(pickle.dumps(request)) == request
        assert "very secret" not in repr(request)
