"""Damaged slots of the shared index: no flipped bit or random word gives a wrong block or an exception, and the node repairs slots."""

import random
import time

import pytest

from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tests.unit.serving.test_failures import lives  # noqa: F401
from tiered_kv.blocks import Location, Tier
from tiered_kv.keys import as_token_ids
from tiered_kv.memory import words as w
from tiered_kv.node import seals

PATHS = [(turn, 1, 2, 3) for turn in range(6)]
BLOCKS = [path[: end + 1] for path in PATHS for end in range(4)]
SLOT_BITS = w.SLOT_BYTES * 8


def stored(node_factory, client_factory, **settings):
    node = node_factory(**{"host": "1MiB", **settings})
    client = client_factory(node, LAYOUT, NAMESPACE)
    for path in PATHS:
        assert client.store(tokens_of(path), kv_of(path)).new == 4
    return node, client


def keys_of(path) -> list[bytes]:
    return NAMESPACE.chain(LAYOUT).keys(as_token_ids(tokens_of(path)))


def slots_of(node) -> dict[bytes, int]:
    return {key: slot for slot, key in node.storage.index._slot_keys()}


def words_of(node) -> memoryview:
    return node.storage.index._words


def used(client, path) -> int:
    """Make all calls that read the index. Asserts that fetches return only stored blocks."""
    client.match(tokens_of(path))
    records = client.explain(tokens_of(path))
    assert len(records) == len(path)
    return assert_is_prefix(client.fetch(tokens_of(path)), path)


def all_hit_again(node, client) -> None:
    """Report every block to the node, and assert that all are hits again."""
    node.doubt(list(node.engine.machine.blocks))
    node.check()
    assert [used(client, path) for path in PATHS] == [4] * len(PATHS)


def test_no_flipped_bit_of_a_slot_gives_a_wrong_block_or_an_exception(node_factory, client_factory) -> None:
    node, client = stored(node_factory, client_factory)
    key = keys_of(PATHS[2])[1]
    for bit in range(SLOT_BITS):
        words_of(node)[slots_of(node)[key] * w.SLOT_WORDS + bit // 64] ^= 1 << bit % 64
        used(client, PATHS[2])
        node.doubt([key])
        assert used(client, PATHS[2]) == 4, f"bit {bit}"
    all_hit_again(node, client)


@pytest.mark.parametrize("tiers", [{}, {"device": "1MiB:cpu"}, {"codec": "host=lossless"}, {"disk": "4MiB"}], ids=str)
def test_random_words_in_slots_give_no_wrong_block_and_no_exception(node_factory, client_factory, tmp_path, tiers: dict) -> None:
    if "disk" in tiers:
        tiers = {**tiers, "disk_path": str(tmp_path / "disk")}
    node, client = stored(node_factory, client_factory, **tiers)
    dice = random.Random(12)
    for _ in range(150):
        slot = dice.choice([*slots_of(node).values(), dice.randrange(node.storage.index._slots)])
        for word in dice.sample(range(w.SLOT_WORDS), dice.choice([1, 1, 2, 8])):
            words_of(node)[slot * w.SLOT_WORDS + word] = dice.getrandbits(64) >> dice.choice([0, 0, 32, 48])
        if "device" in tiers:  # the pool has no headers: a slot that names another whole block there is believed
            _drop_device_slots_that_name_another_block(node)
        for path in PATHS:
            used(client, path)
        node.beat()
        node.engine.settle()
    all_hit_again(node, client)


def _drop_device_slots_that_name_another_block(node) -> None:
    blocks = node.engine.machine.blocks
    for key, location in list(node.storage.index.items()):
        if location.tier == Tier.DEVICE and key in blocks and blocks[key].copies.get(Tier.DEVICE) != location:
            node.storage.index.remove(key)


def test_a_slot_that_names_another_block_is_a_miss_and_is_repaired(node_factory, client_factory) -> None:
    node, client = stored(node_factory, client_factory)
    keys = keys_of(PATHS[0])
    for wrong in (keys[2], keys_of(PATHS[1])[3]):
        node.storage.index.put(keys[1], node.storage.index.get(wrong))
        assert used(client, PATHS[0]) == 1
        assert used(client, PATHS[0]) == 4, "the node was told, and has written the slot anew"
    assert node.stats()["seals"]["slots_mended"] == 2


def test_storing_a_block_with_a_damaged_slot_repairs_the_slot(node_factory, client_factory) -> None:
    node, client = stored(node_factory, client_factory)
    key = keys_of(PATHS[0])[3]
    words_of(node)[slots_of(node)[key] * w.SLOT_WORDS + 5] = 0  # the slot is empty now
    assert used(client, PATHS[0]) == 3
    assert client.store(tokens_of(PATHS[0]), kv_of(PATHS[0])).present == 4
    assert used(client, PATHS[0]) == 4
    node.check()


def test_the_scrubber_repairs_slots_by_itself(node_factory, client_factory, monkeypatch) -> None:
    monkeypatch.setattr(seals, "PASS_EVERY_S", 0.0)
    node, client = stored(node_factory, client_factory)
    for slot in list(slots_of(node).values())[::5]:
        words_of(node)[slot * w.SLOT_WORDS + 6] ^= 1 << 20
    deadline_s = time.monotonic() + 60
    while node.stats()["seals"]["slots_mended"] < 5:
        assert time.monotonic() < deadline_s
        time.sleep(0.02)  # polls, orders nothing
    assert [used(client, path) for path in PATHS] == [4] * len(PATHS)


def test_damaged_ticks_and_counts_do_no_harm(node_factory, client_factory) -> None:
    node, client = stored(node_factory, client_factory)
    views = node.storage.index._views
    for value in ((1 << 64) - 1, 1 << 63, 0):
        for slot in slots_of(node).values():
            views.ticks[slot], views.counts[slot] = value, value & (1 << 32) - 1
        views.header[w.TICK] = views.header[w.HIT] = value
        assert [used(client, path) for path in PATHS] == [4] * len(PATHS)
        node.beat()


@pytest.mark.parametrize("seed", range(8))
def test_a_restart_with_damaged_slots_keeps_the_other_blocks(lives, seed: int) -> None:  # noqa: F811
    here = lives(host="4MiB")
    with here.client() as client:
        for path in PATHS:
            client.store(tokens_of(path), kv_of(path))
    node, dice = here.node, random.Random(seed)
    node.seals.close()
    damaged = dice.sample(list(slots_of(node).values()), 3)
    for slot in damaged:
        word = dice.randrange(1, w.SLOT_WORDS)
        words_of(node)[slot * w.SLOT_WORDS + word] ^= dice.choice([1 << dice.randrange(64), dice.getrandbits(64)])
    words_of(node)[damaged[0] * w.SLOT_WORDS + 7] ^= 1 << 20  # a length that reaches over many blocks
    here.server.close()
    node.close(remove=False)
    here.start()
    assert len(here.node.storage.index) >= len(BLOCKS) - 3
    here.node.check()
    with here.client() as client:
        for path in PATHS:
            used(client, path)
            assert client.store(tokens_of(path), kv_of(path)).refused == 0
        assert [used(client, path) for path in PATHS] == [4] * len(PATHS)


def test_a_location_outside_the_arena_is_no_hit(node_factory, client_factory) -> None:
    node, client = stored(node_factory, client_factory)
    key = keys_of(PATHS[0])[0]
    nbytes = LAYOUT.block_bytes
    for offset in (0, 64, node.storage.host.capacity_bytes - nbytes + 64, 1 << 40, (1 << 64) - 512):
        node.storage.index.put(key, Location(Tier.HOST, 0, 0, offset, nbytes, nbytes))
        assert used(client, PATHS[0]) == 0
        assert used(client, PATHS[0]) == 4
