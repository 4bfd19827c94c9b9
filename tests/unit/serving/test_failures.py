"""Failures on one machine, and their effect on a worker (docs/failures.md): of workers, the node, and the disk."""

import errno
import os
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from tests.contracts.transport import NBYTES, PATIENCE_S, ROOT, key_of, keys_of, wait_until
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import Config, KVLayout
from tiered_kv.blocks import Stored, Tier
from tiered_kv.client.connect import client_of
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.view import NodeView
from tiered_kv.node.node import Node
from tiered_kv.protocol.unix_socket import SessionServer, SocketSession
from tiered_kv.tiers.disk.segments import Files, segment_path
from tiered_kv.tiers.disk.tier import Refusal
from tiered_kv.tiers.faulty import EVERY, FaultPlan, Faulty, fails, refuses, waits

PATH = (1, 2, 0, 1)
TOKENS, KV = tokens_of(PATH), kv_of(PATH)
LARGE = KVLayout(2, 2, 16, "float32", 64)  # 32 KiB: 30 fill the arena of a 1 MiB host tier

WORKER = """
import sys
from tiered_kv.memory.view import NodeView
from tiered_kv.protocol.unix_socket import SocketSession

directory, nbytes, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
view, session = NodeView.open(directory), SocketSession(directory + "/sock", 30.0)
generation = view.generation
offsets = session.reserve(nbytes, [bytes([at]) * 32 for at in range(count)], None)
with view.guard([(offset, nbytes) for offset in offsets], generation) as ours:
    for offset in offsets:
        view.extent(offset, nbytes).fill_(7)
    print(len(offsets), ours, flush=True)
    sys.stdin.read()
"""


@contextmanager
def served(node: Node):
    server = SessionServer(f"{node.directory}/sock", node.open_session)
    try:
        yield node
    finally:
        server.close()


# A worker that dies or leaves


def test_reservations_of_a_killed_worker_are_released(node_factory) -> None:
    with served(node_factory(host="1MiB")) as node:
        command = [sys.executable, "-c", WORKER, str(node.directory), str(NBYTES), "6"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout.readline().split() == ["6", "True"]
            assert node.stats()["reserved_bytes"] == 6 * NBYTES
            worker.send_signal(signal.SIGKILL)
            worker.wait(PATIENCE_S)
        wait_until(node, lambda: not node.stats()["sessions"])
        node.beat()  # its locks may have ended after its socket
        node.check()
        assert node.stats()["tiers"]["host"]["used_bytes"] == 0
        assert not dict(node.storage.index.items()), "nothing of it was ever visible"


def test_extents_that_a_worker_still_writes_are_not_reused(node_factory) -> None:
    with served(node_factory(host="1MiB", store_wait_ms=0)) as node, NodeView.open(node.directory) as view:
        session = SocketSession(f"{node.directory}/sock", PATIENCE_S)
        offsets = session.reserve(NBYTES, keys_of(3), None)
        with view.guard([(offset, NBYTES) for offset in offsets], view.generation) as ours:
            assert ours
            session.close()
            wait_until(node, lambda: not node.stats()["sessions"])
            node.check()
            other = node.open_session()
            assert not set(other.reserve(NBYTES, keys_of(100), None)) & set(offsets)
            other.close()
        node.beat()
        node.check()
        assert node.stats()["tiers"]["host"]["used_bytes"] == 0


def test_a_store_on_an_ended_session_changes_nothing(node_factory) -> None:
    node = node_factory(host="1MiB")
    session = node.open_session()
    (offset,) = session.reserve(NBYTES, keys_of(1), None)
    session.close()
    with pytest.raises(TieredKVError):
        session.commit(ROOT, NBYTES, [(key_of(1), None, offset, 0)])
    with pytest.raises(TieredKVError):
        session.reserve(NBYTES, keys_of(1), None)
    assert node.stats()["blocks"] == node.stats()["tiers"]["host"]["used_bytes"] == 0


# A node that is stopped and made again


class Lives:
    """Successive nodes with the same ids, each with its socket, and clients that outlive them."""

    def __init__(self, **settings: object) -> None:
        self.config = Config.of({"host": "1MiB", **settings})
        self.cluster_id = uuid.uuid4().hex[:8]
        self.start()

    def start(self) -> None:
        self.node = Node(self.config, self.cluster_id, "n0")
        self.server = SessionServer(f"{self.node.directory}/sock", self.node.open_session)

    def stop(self, remove: bool = False) -> None:
        self.server.close()
        self.node.engine.settle()
        self.node.check()
        self.node.close(remove)

    def client(self, layout: KVLayout = LAYOUT):
        return client_of(self.node.info(), layout, NAMESPACE)


@pytest.fixture
def lives(tmp_path):
    made = []

    def make(**settings: object) -> Lives:
        made.append(Lives(disk_path=str(tmp_path / "disk"), **settings))
        return made[-1]

    yield make
    for each in made:
        each.stop(remove=True)


def test_a_restarted_node_has_its_blocks_and_its_workers_continue(lives) -> None:
    life = lives(disk="4MiB")
    with life.client(LARGE) as client:
        paths = [(turn, 1, 2) for turn in range(20)]  # more than the host tier holds
        for path in paths:
            assert client.store(tokens_of(path, LARGE), kv_of(path, LARGE)).new == 3
        life.node.engine.settle()
        by_tier = [client.match(tokens_of(path, LARGE)).tokens_by_tier for path in paths]
        assert {"disk"} in [set(tiers) for tiers in by_tier]
        assert {"host"} in [set(tiers) for tiers in by_tier]
        life.stop()
        for path in paths:  # nobody is there, and reads go on
            assert assert_is_prefix(client.fetch(tokens_of(path, LARGE)), path, LARGE) == 3
        assert client.store(tokens_of((99,), LARGE), kv_of((99,), LARGE)) == Stored(0, 0, 1)
        assert client.stats()["node"] is None
        life.start()
        life.node.check()
        assert [client.match(tokens_of(path, LARGE)).tokens for path in paths] == [3 * 64] * 20
        with life.client(LARGE) as fresh:  # the other one tries again after a moment
            assert fresh.store(tokens_of((99,), LARGE), kv_of((99,), LARGE)) == Stored(1, 0, 0)
            assert fresh.fetch(tokens_of((99,), LARGE)).tokens == client.fetch(tokens_of((99,), LARGE)).tokens == 64


def test_an_attached_worker_stores_at_once_after_a_restart(lives) -> None:
    """The worker's session ended with the old node. The files show that another node writes them now."""
    life = lives()
    with life.client() as client:
        client.store(TOKENS, KV)
        life.stop()
        life.start()
        other = tokens_of((5, 5))
        assert client.store(other, kv_of((5, 5))) == Stored(2, 0, 0)
        assert assert_is_prefix(client.fetch(TOKENS), PATH) == 4


def test_after_a_restart_the_least_recently_used_block_is_evicted_first(lives) -> None:
    life = lives()
    with life.client(LARGE) as client:
        for turn in range(28):
            client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))
        for turn in range(14):
            client.fetch(tokens_of((turn,), LARGE))
        life.stop()
        life.start()
    with life.client(LARGE) as client:
        for turn in range(100, 110):
            assert client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE)).new == 1
        assert all(client.match(tokens_of((turn,), LARGE)).tokens for turn in range(14))


def test_a_restart_does_not_read_the_whole_disk(lives) -> None:
    life = lives(disk="8MiB")
    with life.client(LARGE) as client:
        for turn in range(60):
            client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))
            client.fetch(tokens_of((turn,), LARGE))
        life.stop()
        life.start()
        life.node.beat()
        life.node.engine.settle()
        assert life.node.stats()["counts"].get("promoted", 0) == 0


def test_a_store_during_a_restart_is_refused_and_corrupts_nothing(lives) -> None:
    """The node dies between reservation and packing, so the extents may already have another owner."""
    life = lives()
    with life.client() as client:
        session = SocketSession(f"{life.node.directory}/sock", PATIENCE_S)

        class DiesAfterReserve:
            def __init__(self, wait_s: float) -> None:
                pass

            def reserve(self, *arguments):
                offsets = session.reserve(*arguments)
                life.stop()
                life.start()
                return offsets

            def __getattr__(self, name: str):
                return getattr(session, name)

        client._pool._close_idle()
        client._pool._connect = DiesAfterReserve
        before = life.node.storage.index.generation
        assert client.store(TOKENS, KV) == Stored(0, 0, 4)
        assert life.node.storage.index.generation == before + 1
        assert client.match(TOKENS).tokens == 0
        life.node.check()
        assert life.node.stats()["tiers"]["host"]["used_bytes"] == 0


def test_a_restarted_node_does_not_reuse_extents_that_a_worker_still_packs(lives) -> None:
    life = lives(store_wait_ms=0)
    with NodeView.open(life.node.directory) as view:
        session = life.node.open_session()
        offsets = session.reserve(NBYTES, keys_of(3), None)
        with view.guard([(offset, NBYTES) for offset in offsets], view.generation) as ours:
            assert ours
            life.stop()
            life.start()
            life.node.check()
            with closing(life.node.open_session()) as fresh:
                assert not set(fresh.reserve(NBYTES, keys_of(100), None)) & set(offsets)
        life.node.beat()
        life.node.check()
        assert life.node.stats()["tiers"]["host"]["used_bytes"] == 0


# Disk


def filled_disk(node_factory, tmp_path, faults: FaultPlan | None = None, turns: int = 40, **settings: object):
    """Returns a node with a host tier of 30 blocks, and a client that has stored `turns` chains of one block."""
    node = node_factory(host="1MiB", disk_path=str(tmp_path / "disk"), **{"disk": "4MiB", **settings})
    if faults:
        node.storage.disk._files = Faulty(Files(), faults)
    client = client_of(node.info(), LARGE, NAMESPACE, connect=node.open_session)
    for turn in range(turns):
        client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))
    node.engine.settle()
    return node, client


def hits(client, turns: range) -> int:
    """Returns how many of the chains can be fetched. Asserts that each is as it was stored."""
    return sum(assert_is_prefix(client.fetch(tokens_of((turn,), LARGE)), (turn,), LARGE) for turn in turns)


def flip(node: Node, key: bytes, at: int) -> None:
    location = node.engine.machine.blocks[key].copies[Tier.DISK]
    path = segment_path(node.storage.disk.folder, location.segment)
    with path.open("r+b") as file:
        file.seek(location.offset + at)
        byte = file.read(1)[0]
        file.seek(location.offset + at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("at", [0, 40, 200, 20_000], ids=["magic", "key", "first byte", "middle"])
def test_a_flipped_byte_on_disk_is_a_miss_and_the_copy_is_dropped(node_factory, tmp_path, at: int) -> None:
    node, client = filled_disk(node_factory, tmp_path)
    with client:
        key = bytes.fromhex(client.explain(tokens_of((0,), LARGE))[0].key)
        assert client.match(tokens_of((0,), LARGE)).tokens_by_tier == {"disk": 64}
        flip(node, key, at)
        client.fetch(tokens_of((1,), LARGE))  # a promotion of another block makes sure that there is room for this one
        for _ in range(3):
            assert client.fetch(tokens_of((0,), LARGE)).tokens == 0
            node.engine.drain_touches()
            node.engine.settle()
        assert key not in node.engine.machine.blocks
        assert node.stats()["counts"]["lost"] == 1
        assert client.explain(tokens_of((0,), LARGE))[0].why == "damaged"
        assert client.store(tokens_of((0,), LARGE), kv_of((0,), LARGE)) == Stored(1, 0, 0)
        assert hits(client, range(1)) == 1


def test_blocks_read_from_disk_are_promoted_to_memory(node_factory, tmp_path) -> None:
    node, client = filled_disk(node_factory, tmp_path)
    with client:
        for _ in range(2):  # the first makes room
            assert hits(client, range(1)) == 1
            node.engine.drain_touches()
            node.engine.settle()
        assert client.match(tokens_of((0,), LARGE)).tokens_by_tier == {"host": 64}
        assert hits(client, range(40)) == 40


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_with_failing_writes_does_not_stop_stores(node_factory, tmp_path, code: int) -> None:
    node, client = filled_disk(node_factory, tmp_path, FaultPlan(pwritev={EVERY: fails(code)}), turns=60)
    with client:
        stats = node.stats()
        assert stats["tiers"]["disk"]["blocks"] == 0
        assert stats["counts"]["demote_failed"]
        assert stats["counts"]["dropped"]
        assert hits(client, range(32, 60)) >= 25, "the latest are still in memory"
        assert client.store(tokens_of((99,), LARGE), kv_of((99,), LARGE)) == Stored(1, 0, 0)


def test_one_failed_disk_write_loses_nothing(node_factory, tmp_path) -> None:
    node, client = filled_disk(node_factory, tmp_path, FaultPlan(pwritev={1: fails(errno.EIO)}), turns=32)
    with client:
        assert node.stats()["counts"]["demote_failed"] >= 1
        assert hits(client, range(32)) >= 31


def test_a_block_is_readable_at_every_moment_of_its_demotion(node_factory, tmp_path) -> None:
    entered, gate = threading.Event(), threading.Event()
    plan = FaultPlan(pwritev={1: waits(entered, gate)})
    node, client = filled_disk(node_factory, tmp_path, plan, turns=29)
    with client:
        storing = threading.Thread(
            target=lambda: [client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE)) for turn in range(29, 35)]
        )
        storing.start()
        assert entered.wait(PATIENCE_S)
        assert hits(client, range(29)) == 29
        gate.set()
        storing.join(PATIENCE_S)
        node.engine.settle()
        assert hits(client, range(35)) == 35


def test_a_full_disk_evicts_its_oldest_blocks(node_factory, tmp_path) -> None:
    node, client = filled_disk(node_factory, tmp_path, turns=120, disk="1MiB")
    with client:
        usage = node.stats()["tiers"]["disk"]
        assert usage["used_bytes"] <= usage["capacity_bytes"] == 1 << 20
        assert node.stats()["counts"]["lost"] > 20
        assert hits(client, range(120)) >= 40
        assert not client.match(tokens_of((0,), LARGE)).tokens


def test_no_lock_is_held_while_the_disk_removes_a_segment(node_factory, tmp_path) -> None:
    free = []

    def removes(call, *arguments):
        with ThreadPoolExecutor(1) as others:
            free.append(others.submit(node.engine.lock.acquire, timeout=PATIENCE_S).result())
            others.submit(node.engine.lock.release if free[-1] else int).result()
        return call(*arguments)

    node, client = filled_disk(node_factory, tmp_path, disk="1MiB", turns=0)
    node.storage.disk._files = Faulty(Files(), FaultPlan(truncate={EVERY: removes}))
    with client:
        for turn in range(120):
            client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))
        node.engine.settle()
    assert free
    assert all(free)


def test_a_segment_deleted_by_others_is_a_miss(node_factory, tmp_path) -> None:
    node, client = filled_disk(node_factory, tmp_path)
    with client:
        disk = node.storage.disk
        lost = [segment for segment in disk._segments]
        for segment in lost:
            os.truncate(segment_path(disk.folder, segment), 0)
        assert client.fetch(tokens_of((0,), LARGE)).tokens == 0
        assert hits(client, range(39, 40)) == 1
        for segment in lost:  # as the bookkeeping says, for the check at the end
            os.truncate(segment_path(disk.folder, segment), disk._segments[segment].nbytes)


def test_a_hanging_disk_delays_no_fetch_beyond_its_deadline(node_factory, tmp_path) -> None:
    entered, gate = threading.Event(), threading.Event()
    _, client = filled_disk(node_factory, tmp_path)
    with client:
        turns = [turn for turn in range(40) if client.match(tokens_of((turn,), LARGE)).tokens_by_tier == {"disk": 64}]
        client._source._disk._segments._files = Faulty(Files(), FaultPlan(preadv={EVERY: waits(entered, gate)}))
        for turn in turns[:6]:  # more than there are threads to hang
            assert client.fetch(tokens_of((turn,), LARGE), deadline_ms=20).tokens == 0
        assert entered.is_set()
        gate.set()
        assert hits(client, range(40)) == 40


def test_failed_batches_of_disk_writes_do_no_harm(node_factory, tmp_path) -> None:
    node = node_factory(host="1MiB", disk="4MiB", disk_path=str(tmp_path / "disk"))
    node.storage.logs[Tier.DISK] = Faulty(node.storage.disk, FaultPlan(append={1: refuses(Refusal.FULL), 2: refuses(Refusal.IO_ERROR)}))
    with client_of(node.info(), LARGE, NAMESPACE, connect=node.open_session) as client:
        for turn in range(40):
            client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))
        node.engine.settle()
        assert hits(client, range(40)) >= 35


# Places that cannot be used


def test_the_error_for_an_unwritable_disk_folder_names_the_setting(tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TieredKVError, match="disk_path") as refusal:
        Node(Config.of({"host": "1MiB", "disk": "1MiB", "disk_path": str(tmp_path / "file")}), uuid.uuid4().hex[:8], "n0")
    assert refusal.value.kind is Kind.STORAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_the_error_for_a_disk_folder_without_permission_names_the_setting(tmp_path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(TieredKVError, match="disk_path"):
        Node(Config.of({"host": "1MiB", "disk": "1MiB", "disk_path": str(tmp_path / "locked")}), uuid.uuid4().hex[:8], "n0")


@pytest.mark.parametrize("host", [0, "0", "1KiB"])
def test_the_error_for_a_missing_host_tier_names_the_setting(host) -> None:
    with pytest.raises(TieredKVError, match="host") as refusal:
        Config.of({"host": host})
    assert refusal.value.kind is Kind.CONFIG


def test_the_error_for_missing_shared_memory_names_the_setting(tmp_path) -> None:
    with pytest.raises(TieredKVError, match="shm_path"):
        Node(Config.of({"host": "1MiB", "shm_path": str(tmp_path / "missing")}), "c", "n0")
    with pytest.raises(TieredKVError, match="host"):
        Node(Config.of({"host": 1 << 50}), uuid.uuid4().hex[:8], "n0")


def test_two_nodes_with_the_same_ids_cannot_run_at_the_same_time(node_factory) -> None:
    node = node_factory(host="1MiB", cluster_id="same")
    with pytest.raises(TieredKVError, match="another process is the writer"):
        Node(node.config, "same", "n0")
