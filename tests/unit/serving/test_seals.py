"""Flipped bits in host memory. Seals detect them when a block leaves memory, in the scrubber, and in each fetch with `verify_host`."""

import time
from types import SimpleNamespace

import pytest

from tests.contracts.transport import NBYTES, ROOT, key_of, keys_of, wait_until
from tests.unit.serving.processes import until
from tests.unit.serving.prompts import NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tests.unit.serving.test_failures import lives  # noqa: F401
from tests.unit.serving.test_saving_filling import cluster, filled, mounted_blocks, saved  # noqa: F401
from tiered_kv import KVLayout
from tiered_kv.blocks import Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import as_token_ids
from tiered_kv.node import seals
from tiered_kv.node.checkpoints.steps import LoadRequest, MountRequest, SnapshotRequest, WriteRequest, WriteStatusRequest
from tiered_kv.tiers.host import HEADER_BYTES

LARGE = KVLayout(2, 2, 16, "float32", 64)
"""Blocks of 32 KiB: 30 fill the arena of a 1 MiB host tier."""
PATH = (1, 2, 3)
PATIENCE_S = 60.0


def cached(node_factory, client_factory, **settings):
    node = node_factory(**{"host": "1MiB", "store_wait_ms": 10_000, **settings})
    return node, client_factory(node, LARGE, NAMESPACE)


def store(client, *paths) -> None:
    for path in paths:
        assert client.store(tokens_of(path, LARGE), kv_of(path, LARGE)).refused == 0


def had(client, path=PATH) -> int:
    """Returns how many blocks of a path are fetched. Asserts that each is as it was stored."""
    return assert_is_prefix(client.fetch(tokens_of(path, LARGE)), path, LARGE)


def keys(path=PATH) -> list[bytes]:
    return NAMESPACE.chain(LARGE).keys(as_token_ids(tokens_of(path, LARGE)))


def flip(node, path=PATH, block: int = 1, byte: int = 777) -> None:
    """Flip a bit of a block's payload in host memory, or of its header if `byte` is negative."""
    location = node.engine.machine.blocks[keys(path)[block]].copies[Tier.HOST]
    node.storage.host._bytes[location.offset + byte] ^= 16


def wait_for(node, count: int, figure: str = "sealed") -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while node.stats()["seals"][figure] < count:
        assert time.monotonic() < deadline_s, node.stats()["seals"]
        time.sleep(0.01)  # polls, orders nothing


def settle(node) -> None:
    node.engine.drain_touches()
    node.engine.settle()


def test_every_block_is_sealed_soon_after_it_was_stored(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory)
    store(client, PATH)
    wait_for(node, 3)
    until(lambda: not node.stats()["seals"]["unsealed"], "the queue is empty: the scrubber may have been first", PATIENCE_S)
    headers = node.storage.host.headers
    locations = [node.storage.index.get(key) for key in keys()]
    assert all(headers.matches(each.offset, headers.digest(each.offset, each.stored_bytes)) for each in locations)
    assert node.stats()["seals"] == {
        "sealed": 3,
        "unsealed": 0,
        "scrubbed": node.stats()["seals"]["scrubbed"],
        "flipped": 0,
        "slots_mended": 0,
    }


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock of `seals`, in seconds: a list of one number."""
    now_s = [1000.0]
    monkeypatch.setattr(seals, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    return now_s


def test_blocks_are_sealed_when_stores_pause_or_the_first_has_waited_long_enough(node_factory, client_factory, now) -> None:
    node, client = cached(node_factory, client_factory)
    node.seals.close()
    store(client, PATH)
    now[0] += 0.9 * seals.QUIET_S
    assert not node.seals._is_due()
    now[0] += 0.2 * seals.QUIET_S
    assert node.seals._is_due(), "the stores have paused"
    node.seals._seal_some()
    assert (node.seals.stats()["sealed"], node.seals.stats()["unsealed"]) == (3, 0)
    begun_s, number = now[0], 10
    while now[0] < begun_s + seals.SEAL_WITHIN_S:
        store(client, (number,))
        assert not node.seals._is_due()
        now[0], number = now[0] + 0.9 * seals.QUIET_S, number + 1
    store(client, (number,))
    assert node.seals._is_due(), "the first block has waited long enough"


def test_the_scrubber_waits_for_a_pause_before_each_batch_but_not_for_long(node_factory, client_factory, now, monkeypatch) -> None:
    monkeypatch.setattr(seals, "BATCH_BLOCKS", 1)
    node, client = cached(node_factory, client_factory)
    node.seals.close()
    store(client, PATH)
    now[0] += 2 * seals.QUIET_S
    node.seals._scrub_paced()
    for scrubbed in (1, 2):
        begun_s = now[0]
        while node.stats()["seals"]["scrubbed"] == scrubbed:
            node.seals.committed([])  # as after a store
            now[0] += seals.QUIET_S / 2
            node.seals._scrub_paced()
        assert begun_s + seals.WAIT_FOR_QUIET_S <= now[0] <= begun_s + seals.WAIT_FOR_QUIET_S + seals.QUIET_S


def test_the_scrubber_finds_a_flipped_bit_by_itself(node_factory, client_factory, monkeypatch) -> None:
    monkeypatch.setattr(seals, "PASS_EVERY_S", 0.0)
    node, client = cached(node_factory, client_factory)
    store(client, PATH)
    wait_for(node, 3)
    flip(node)
    wait_for(node, 1, "flipped")
    assert had(client) == 1
    assert node.engine.machine.counts["lost"] == 1
    store(client, PATH)
    assert had(client) == 3


def test_with_verify_host_a_fetch_never_serves_a_flipped_bit(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory, verify_host=True)
    store(client, PATH)
    assert had(client) == 3
    for byte in (0, 777, LARGE.block_bytes - 1, -1, -60):
        flip(node, byte=byte)
        assert had(client) == 1
        assert keys()[1] not in node.engine.machine.blocks, "the node was told, and has given it up"
        store(client, PATH)
        assert had(client) == 3
    assert node.stats()["seals"]["flipped"] == 5


def test_a_flipped_bit_of_a_header_gives_no_wrong_block(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory)
    node.seals.close()  # its thread may seal the block again after the flip, which makes the header right; `scrub` works without it
    for bit in range(HEADER_BYTES * 8):
        store(client, PATH)
        node.seals.scrub()
        location = node.storage.index.get(keys()[1])
        before = node.stats()["seals"]["flipped"]
        node.storage.host._bytes[location.offset - HEADER_BYTES + bit // 8] ^= 1 << bit % 8
        had(client)
        node.seals.scrub()
        version = 32 <= bit < 48
        assert version or keys()[1] not in node.engine.machine.blocks or node.stats()["seals"]["flipped"] > before, f"bit {bit}"
        assert had(client) in (1, 3)


@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_flipped_block_does_not_reach_the_disk(node_factory, client_factory, tmp_path, is_sealed: bool) -> None:
    node, client = cached(node_factory, client_factory, disk=f"8MiB:{tmp_path / 'disk'}")
    store(client, PATH)
    if is_sealed:
        node.seals.scrub()
        flip(node)
    for turn in range(10, 30):
        store(client, (turn, 1, 2))
        settle(node)
    assert had(client) == (1 if is_sealed else 3)
    assert node.stats()["seals"]["flipped"] == is_sealed


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_a_flipped_block_is_not_compressed_in_place(node_factory, client_factory, codec: str) -> None:
    node, client = cached(node_factory, client_factory, codec=f"host={codec}")
    store(client, PATH)
    node.seals.scrub()
    for block in range(3):
        flip(node, block=block)
    for turn in range(10, 30):
        store(client, (turn, 1, 2))
        settle(node)
    assert client.fetch(tokens_of(PATH, LARGE)).tokens == 0


def test_a_seal_is_not_written_over_one_of_another_thread(node_factory, client_factory, monkeypatch) -> None:
    """A thread hashes a block without a seal, another one seals it, and a bit flips: the first one must not seal the flipped bytes."""
    node, client = cached(node_factory, client_factory)
    node.seals.close()
    store(client, PATH)
    with node.engine.lock:
        batch = [node.seals._block(key) for key in keys()]
    judge, host = node.storage.host.judge, node.storage.host

    def late(key: bytes, location) -> tuple[bool, int | None]:
        if key == keys()[0]:
            with monkeypatch.context() as patch:
                patch.setattr(host, "judge", judge)
                node.seals.scrub()
        if key == keys()[1]:
            flip(node)
        return True, host.headers.digest(location.offset, location.stored_bytes)

    monkeypatch.setattr(host, "judge", late)
    node.seals._look(batch)
    monkeypatch.setattr(host, "judge", judge)
    assert node.stats()["seals"]["flipped"] == 1
    assert had(client) == 1


def test_a_flipped_bit_of_a_compressed_block_is_detected_by_its_frame(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory, codec="host=lossless")
    for turn in range(30):
        store(client, (turn, 1, 2))
        settle(node)
    coded = [key for key, location in node.storage.index.items() if location.codec]
    location = node.storage.index.get(coded[0])
    node.storage.host._bytes[location.offset + 777] ^= 16
    node.seals.scrub()
    assert node.stats()["seals"]["flipped"] == 1 and coded[0] not in node.engine.machine.blocks


def test_a_flipped_block_is_not_promoted_to_the_device(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory, device="1MiB:cpu", verify_host=True)
    store(client, PATH)
    had(client)
    flip(node)
    settle(node)
    assert had(client) == 1


def test_a_flipped_block_is_not_sent_to_a_peer(cluster) -> None:  # noqa: F811
    here = cluster(nodes=2)
    owner, other = (here.client(node, LARGE, NAMESPACE) for node in ("n0", "n1"))
    store(owner, PATH)
    here.nodes["n0"].seals.scrub()
    flip(here.nodes["n0"])
    here.report_all()
    other.match(tokens_of(PATH, LARGE))
    here.report_all()
    assert had(other) == 1
    wait_until(here.nodes["n0"], lambda: keys()[1] not in here.nodes["n0"].engine.machine.blocks)
    assert had(owner) == 1 and here.nodes["n0"].stats()["seals"]["flipped"] == 1


def test_a_checkpoint_leaves_a_flipped_block_out(cluster, tmp_path) -> None:  # noqa: F811
    here = cluster()
    client = here.client("n0", LARGE, NAMESPACE)
    store(client, PATH, (7, 8, 9))
    here.nodes["n0"].seals.scrub()
    flip(here.nodes["n0"])
    _, state = saved(here.nodes["n0"], tmp_path / "packs")
    assert state.left == [keys()[1]]
    assert {entry.key for pack in state.packs for entry in pack.entries} == {*keys(), *keys((7, 8, 9))} - {keys()[1]}


def test_a_block_that_leaves_during_a_checkpoint_is_not_set_aside_when_flipped(cluster, tmp_path) -> None:  # noqa: F811
    here = cluster()
    node, client = here.nodes["n0"], here.client("n0", LARGE, NAMESPACE)
    store(client, PATH)
    node.seals.scrub()
    snapshot = node.checkpoint(SnapshotRequest())
    flip(node)
    for turn in range(10, 40):
        store(client, (turn, 1, 2))
    (tmp_path / "packs").mkdir()
    node.checkpoint(WriteRequest(str(tmp_path / "packs"), [seen.key for seen in snapshot.blocks]))
    while not (state := node.checkpoint(WriteStatusRequest())).is_done:
        time.sleep(0.01)  # polls for an end, orders nothing
    assert keys()[1] not in {entry.key for pack in state.packs for entry in pack.entries}


def test_blocks_loaded_from_a_checkpoint_are_sealed_at_once(cluster, tmp_path) -> None:  # noqa: F811
    here = cluster()
    store(here.client("n0", LARGE, NAMESPACE), PATH)
    snapshot, state = saved(here.nodes["n0"], tmp_path / "packs")
    fresh = here.start_node("n1")
    fresh.seals.close()  # whose thread would seal them as well
    names, blocks = mounted_blocks(snapshot, state)
    fresh.checkpoint(MountRequest(str(tmp_path / "packs"), names, blocks))
    fresh.checkpoint(LoadRequest())
    filled(fresh)
    locations = [fresh.engine.machine.blocks[key].copies[Tier.HOST] for key in keys()]
    assert all(fresh.storage.host.headers.is_sealed(location.offset) for location in locations)


def test_a_damaged_block_is_dropped_after_its_reader_has_finished(node_factory, client_factory) -> None:
    node, client = cached(node_factory, client_factory)
    store(client, PATH)
    node.seals.scrub()
    flip(node)
    with node.pinned(keys()) as here:
        node.seals.scrub()
        assert len(here) == 3 and keys()[1] in node.engine.machine.blocks
        assert len(list(node.storage.frames(here))) == 1
    wait_until(node, lambda: keys()[1] not in node.engine.machine.blocks)
    assert had(client) == 1 and node.stats()["seals"]["flipped"] == 1


def test_seals_survive_a_restart_of_the_node(lives) -> None:  # noqa: F811
    here = lives()
    with here.client(LARGE) as client:
        store(client, PATH)
        here.node.seals.scrub()
        here.stop()
        here.start()
        assert here.node.seals.stats()["sealed"] == 0
        flip(here.node)
        here.node.seals.scrub()
        assert here.node.seals.stats()["flipped"] == 1
        assert had(client) == 1


@pytest.mark.parametrize("byte", [0, 4, 5, 6, 9, 119])
def test_a_node_starts_with_damaged_headers(lives, byte: int) -> None:  # noqa: F811
    here = lives(device="1MiB:cpu")
    with here.client(LARGE) as client:
        store(client, PATH)
        had(client)
        here.node.engine.drain_touches()
        here.stop()
        flip_after = here.node.directory / "arena"
        content = bytearray(flip_after.read_bytes())
        at = content.find(b"TKVE")
        while at >= 0:
            content[at + byte] ^= 129
            at = content.find(b"TKVE", at + 1)
        with flip_after.open("r+b") as file:
            file.write(content)
        here.start()
        assert had(client) in (0, 3)
        here.node.check()


def test_an_invalid_digest_is_rejected_and_a_wrong_one_is_a_miss(node_factory, client_factory) -> None:
    node = node_factory(host="1MiB", verify_host=True)
    session = node.open_session()
    (offset,) = session.reserve(NBYTES, keys_of(1), None)
    for digest in ("x", -1, 1 << 64, True):
        with pytest.raises(TieredKVError) as raised:
            session.commit(ROOT, NBYTES, [(key_of(0), None, offset, 0, digest)])
        assert raised.value.kind is Kind.TRANSPORT
    assert session.commit(ROOT, NBYTES, [(key_of(0), None, offset, 0, 5)]) == [True]
    node.seals.scrub()
    assert key_of(0) not in node.engine.machine.blocks
    session.close()
