"""Invalid parents, from a worker, in old shared memory, in a disk folder, and in a checkpoint: none of them hangs a node."""

import subprocess
import sys
import threading
import uuid
from contextlib import closing, suppress

import pytest

from tests.contracts.transport import NBYTES, PATIENCE_S, ROOT, key_of, keys_of
from tests.unit.tiers.records import record_of
from tiered_kv.blocks import BlockInfo, Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.checkpoints.steps import LoadRequest, MountRequest
from tiered_kv.protocol.unix_socket import SocketSession
from tiered_kv.tiers.disk.tier import DiskTier
from tiered_kv.tiers.objects.folder_store import FolderStore
from tiered_kv.tiers.objects.mounted import MountedBlock
from tiered_kv.tiers.objects.packs import PackWriter

A, B, C = keys_of(3)
NODE = """
import sys
from tiered_kv import Config
from tiered_kv.protocol.unix_socket import SessionServer
from tiered_kv.node.node import Node

node = Node(Config(host="4MiB", policy=sys.argv[2]), sys.argv[1], "n0")
server = SessionServer(f"{node.directory}/sock", node.open_session, node.report_commits)
print(node.directory, flush=True)
sys.stdin.read()
node.check()
server.close()
node.close()
print("ended", flush=True)
"""


def told(*arguments: object) -> tuple:
    """Returns the fields of an empty hint."""
    return (*arguments, None, None, None, True)


@pytest.mark.parametrize("policy", ["adaptive", "s3fifo"])
def test_a_cycle_of_parents_does_not_hang_the_node(policy: str) -> None:
    """The worker commits A as child of B and B as child of A, with all kinds of hints, and has both evicted and stored again."""
    command = [sys.executable, "-c", NODE, uuid.uuid4().hex[:8], policy]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        directory = process.stdout.readline().strip()
        try:
            with closing(SocketSession(f"{directory}/sock", PATIENCE_S)) as session:
                for depths in ((0, 0), (5, 6), (7, 8), (1, 2)):
                    cycle = [(A, B, depths[0]), (B, A, depths[1])]
                    for claims in (cycle, cycle[:1], cycle[1:]):
                        offsets = session.reserve(NBYTES, [key for key, _, _ in claims], None)
                        with suppress(TieredKVError):
                            session.commit(ROOT, NBYTES, [(*claim[:2], at, claim[2]) for claim, at in zip(claims, offsets, strict=True)])
                        session.hint(*told(A))
                        session.hint(*told(B))
                    session.hint(A, 3, 1.0, None, False)
                    for first in range(10, 90, 8):
                        offsets = session.reserve(NBYTES, keys_of(8, first), None)
                        chain = [
                            (key_of(first + at), key_of(first + at - 1) if at else None, offset, at) for at, offset in enumerate(offsets)
                        ]
                        session.commit(ROOT, NBYTES, chain)
                assert session.stats()["blocks"] > 8
            said, _ = process.communicate(timeout=PATIENCE_S)
            assert said.strip() == "ended"
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ([(A, B, 0)], "has parent"),
        ([(A, None, 4)], "its depth must be 0, got 4"),
        ([(A, B, 5), (B, A, 6)], "its depth must be 7, got 5"),
        ([(A, None, 0), (B, A, 1), (C, B, 1)], "its depth must be 2, got 1"),
        ([(A, None, 0), (A, B, 3)], "at the depths 0 and 3"),
        ([(C, key_of(7), 9)], "its depth must be 1, got 9"),
    ],
)
def test_a_commit_with_inconsistent_depths_is_rejected_as_a_whole(node_factory, claims: list, words: str) -> None:
    node = node_factory(host="1MiB", store_wait_ms=0)
    with closing(node.open_session()) as session:
        session.commit(ROOT, NBYTES, [(key_of(7), None, *session.reserve(NBYTES, [key_of(7)], None), 0)])
        used = node.stats()["tiers"]["host"]["used_bytes"]
        offsets = session.reserve(NBYTES, keys_of(len(claims)), None)
        blocks = [(key, parent, offset, depth) for (key, parent, depth), offset in zip(claims, offsets, strict=True)]
        with pytest.raises(TieredKVError, match=words) as refusal:
            session.commit(ROOT, NBYTES, blocks)
        assert refusal.value.kind is Kind.TRANSPORT
        assert list(node.engine.machine.blocks) == [key_of(7)]
        assert node.stats()["reserved_bytes"] == 0
        assert node.stats()["tiers"]["host"]["used_bytes"] == used
        (offset,) = session.reserve(NBYTES, [B], key_of(7))
        assert session.commit(ROOT, NBYTES, [(B, key_of(7), offset, 1)]) == [True], "the session goes on"


def test_reading_a_damaged_folder_with_a_cycle_ends(node_factory, tmp_path) -> None:
    cycle = {1: 2, 2: 3, 3: 1, 4: 4, 5: 1}
    records = [
        record._replace(info=record.info._replace(parent=record_of(above, 3000).key))
        for record, above in ((record_of(number, 3000), above) for number, above in cycle.items())
    ]
    node = node_factory(host="1MiB", disk=f"8MiB:{tmp_path}", cluster_id="first")
    folder = node.storage.disk.folder
    node.close()
    with closing(DiskTier(folder, 8 << 20, 1 << 20, owner="first")) as tier:
        assert all(answer.location for answer in tier.append(records))
        tier.close(remove=False)
    node = node_factory(host="1MiB", disk=f"8MiB:{tmp_path}", cluster_id="second")
    assert len(node.engine.machine.blocks) == len(cycle)
    with closing(node.open_session()) as session:
        within(lambda: [session.hint(*told(record.key)) for record in records])
        within(lambda: session.bring([record.key for record in records], 1.0))
    node.engine.settle()
    node.check()
    assert all(block.link is None for block in node.engine.machine.blocks.values())


def test_a_checkpoint_with_a_cycle_is_loaded_without_parent_links(node_factory, tmp_path) -> None:
    places = {1: (2, 8), 2: (1, 9), 3: (3, 0), 4: (99, (1 << 32) - 1), 5: (4, 1 << 31)}
    store = FolderStore(tmp_path)
    writer = PackWriter(store)
    for number in places:
        writer.add(record_of(number, 3000))
    info = writer.finish()
    store.close()
    blocks = [
        MountedBlock(
            BlockInfo(entry.key, record_of(above, 3000).key, entry.root, depth),
            Location(Tier.CHECKPOINT, entry.codec, 0, entry.offset, entry.stored_bytes, entry.raw_bytes),
        )
        for entry, (above, depth) in zip(info.entries, places.values(), strict=True)
    ]
    node = node_factory(host="1MiB")
    assert node.checkpoint(MountRequest(str(tmp_path), [info.name], blocks)) == len(blocks)
    node.checkpoint(LoadRequest())
    node.checkpoint_loader._job.done.result(PATIENCE_S)
    with closing(node.open_session()) as session:
        within(lambda: [session.hint(*told(each.key)) for each in blocks])
        session.reserve(NBYTES, keys_of(100, 100), None)
    assert not node.engine.machine.blocks_by_tier[Tier.HOST], "they go as all others"


def test_cycles_in_damaged_headers_of_shared_memory_are_ignored(node_factory) -> None:
    cluster_id = uuid.uuid4().hex[:8]
    node = node_factory(host="1MiB", cluster_id=cluster_id)
    with closing(node.open_session()) as session:
        offsets = session.reserve(NBYTES, keys_of(3), None)
        session.commit(ROOT, NBYTES, [(A, None, offsets[0], 0), (B, A, offsets[1], 1), (C, B, offsets[2], 2)])
    storage = node.storage
    for key, parent, depth in ((A, C, 3), (C, B, (1 << 32) - 2)):
        offset = node.engine.machine.blocks[key].copies[Tier.HOST].offset
        header = storage.host.header(offset)
        storage.host.sign(offset, header._replace(info=header.info._replace(parent=parent, depth=depth)))
    node.close(remove=False)
    node = node_factory(host="1MiB", cluster_id=cluster_id, store_wait_ms=0)
    assert len(node.engine.machine.blocks) == 3
    node.check()
    with closing(node.open_session()) as session:
        within(lambda: [session.hint(*told(key)) for key in (A, B, C)])
        session.reserve(NBYTES, keys_of(100, 50), None)
    assert not node.engine.machine.blocks, "they go as all others"


def within(call) -> None:
    """Run `call` on a separate thread, which must end in time."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"
