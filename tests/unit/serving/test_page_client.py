"""An engine's pages: stored under its own keys and loaded again, from every tier, and whatever happens to the node meanwhile."""

import itertools
from hashlib import blake2b

import pytest
import torch

from tests.unit.serving.processes import NodeProcess, until
from tiered_kv import Config, Namespace, OpaqueLayout
from tiered_kv.blocks import Stored
from tiered_kv.client.connect import page_client_of
from tiered_kv.client.page_client import Chain, Loaded, PageClient
from tiered_kv.client.page_copy import Pages, pages_of
from tiered_kv.embedded import Embedded, InProcessCluster
from tiered_kv.errors import Kind, TieredKVError

LAYERS, PAGE_BYTES, BLOCKS = 4, 8 << 10, 64
LAYOUT = OpaqueLayout(LAYERS * PAGE_BYTES, 16, "pages of a test", 2)
"""Blocks of 32 KiB: 31 fill a host tier of 1 MiB."""
NAMESPACE = Namespace("an engine's weights")
ROOM = {"host": "4MiB", "block_tokens": 16}


class Engine:
    """An engine's KV cache: as many arrays as layers, each with BLOCKS pages."""

    def __init__(self) -> None:
        self.arrays = [torch.zeros(BLOCKS, PAGE_BYTES, dtype=torch.uint8) for _ in range(LAYERS)]
        self.pages: Pages = pages_of(self.arrays)

    def compute(self, key: bytes, block: int) -> None:
        """Fill the pages of a block with what belongs to a key. Half of it is the same in all numbers, so that it can be encoded."""
        for layer, array in enumerate(self.arrays):
            seed = int.from_bytes(blake2b(key + bytes([layer]), digest_size=7).digest(), "big")
            numbers = torch.randn(PAGE_BYTES // 2, generator=torch.Generator().manual_seed(seed)).bfloat16()
            array[block] = numbers.view(torch.uint8)

    def has(self, key: bytes, block: int) -> bool:
        right = Engine.__new__(Engine)
        right.arrays = [torch.zeros(1, PAGE_BYTES, dtype=torch.uint8) for _ in range(LAYERS)]
        right.compute(key, 0)
        return all(torch.equal(array[block], other[0]) for array, other in zip(self.arrays, right.arrays, strict=True))

    def clear(self) -> None:
        for array in self.arrays:
            array.fill_(0)


def chain_of(name: str, blocks: int) -> Chain:
    return Chain([blake2b(f"{name} {number}".encode(), digest_size=32).digest() for number in range(blocks)])


def stored(client: PageClient, engine: Engine, chain: Chain, blocks: list[int]) -> Stored:
    for key, block in zip(chain.keys, blocks, strict=True):
        engine.compute(key, block)
    return client.store(chain, engine.pages, blocks)


def assert_loaded(client: PageClient, engine: Engine, chain: Chain, blocks: list[int], **how: object) -> Loaded:
    """Load a chain into cleared pages. Asserts that each loaded block is right, byte for byte."""
    engine.clear()
    loaded = client.load(chain, engine.pages, blocks, **how)
    assert sum(loaded.blocks_by_tier.values()) == loaded.blocks <= len(blocks)
    assert all(engine.has(key, block) for key, block in zip(chain.keys[: loaded.blocks], blocks, strict=False))
    return loaded


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def node():
    embedded = Embedded(Config.of(ROOM))
    yield embedded
    embedded.close()


@pytest.fixture
def client(node, checked) -> PageClient:
    return checked(node.page_client(LAYOUT, NAMESPACE))


def test_blocks_come_back_into_other_pages(client, engine):
    chain = chain_of("a", 12)
    assert stored(client, engine, chain, list(range(12))) == Stored(12, 0, 0)
    assert client.look(chain.keys).tiers == ["host"] * 12
    assert client.look(chain.keys).at_once == 12
    places = list(range(60, 48, -1))
    assert assert_loaded(client, engine, chain, places) == Loaded(12, {"host": 12})
    others = [block for block in range(BLOCKS) if block not in places]
    assert not any(array[others].any() for array in engine.arrays)


def test_a_part_of_a_chain_is_stored_and_loaded(client, engine):
    chain = chain_of("a", 12)
    stored(client, engine, chain.part(0, 4), [0, 1, 2, 3])
    assert stored(client, engine, chain.part(2, 8), [2, 3, 4, 5, 6, 7]) == Stored(4, 2, 0)
    assert assert_loaded(client, engine, chain.part(3), list(range(20, 29))).blocks == 5
    assert client.look(chain.part(1, 3).keys).tiers == ["host"] * 2


def test_a_part_knows_its_parent_and_depth():
    chain = chain_of("a", 5)
    assert chain.part(0) == chain
    assert chain.part(2, 4) == Chain(chain.keys[2:4], chain.keys[1], 2)
    assert chain.part(2).part(1) == Chain(chain.keys[3:], chain.keys[2], 3)


def test_a_load_ends_at_the_first_missing_block(client, engine):
    chain = chain_of("a", 6)
    stored(client, engine, chain.part(0, 2), [0, 1])
    stored(client, engine, chain.part(3), [3, 4, 5])
    assert assert_loaded(client, engine, chain, list(range(6))).blocks == 2
    assert client.look(chain.keys).tiers == ["host"] * 2


def test_layouts_with_other_descriptions_do_not_share(node, engine, client, checked):
    other = checked(node.page_client(OpaqueLayout(LAYOUT.block_bytes, 16, "pages of another test", 2), NAMESPACE))
    assert other._names.root != client._names.root


def test_blocks_on_disk_are_loaded_through_memory_of_their_own(engine, checked, tmp_path):
    config = Config.of({"host": "1MiB", "disk": "16MiB", "disk_path": str(tmp_path), "block_tokens": 16})
    embedded = Embedded(config)
    try:
        client = checked(embedded.page_client(LAYOUT, NAMESPACE))
        chains = [chain_of(name, 10) for name in "abcdef"]
        for chain in chains:
            until(lambda chain=chain: stored(client, engine, chain, list(range(10))).refused == 0, "there is room", 10.0)
        until(lambda: all(len(client.look(chain.keys).tiers) == 10 for chain in chains), "all blocks are somewhere", 10.0)
        tiers: set[str] = set()
        for chain in chains:
            assert client.look(chain.keys).at_once <= 10
            loaded = assert_loaded(client, engine, chain, list(range(30, 40)))
            assert loaded.blocks == 10
            tiers |= set(loaded.blocks_by_tier)
        assert "disk" in tiers
    finally:
        embedded.close()


def test_a_deadline_that_is_over_loads_only_what_is_in_memory(engine, checked, tmp_path):
    embedded = Embedded(Config.of({"host": "1MiB", "disk": "16MiB", "disk_path": str(tmp_path), "block_tokens": 16}))
    try:
        client = checked(embedded.page_client(LAYOUT, NAMESPACE))
        first = chain_of("first", 10)
        for chain in [first, *(chain_of(name, 10) for name in "bcdef")]:
            until(lambda chain=chain: stored(client, engine, chain, list(range(10))).refused == 0, "there is room", 10.0)
        until(lambda: "disk" in client.look(first.keys).tiers, "the first chain has left", 10.0)
        at_once = client.look(first.keys).at_once
        assert at_once < 10
        assert assert_loaded(client, engine, first, list(range(10)), deadline_s=0.0).blocks == at_once
        assert assert_loaded(client, engine, first, list(range(10))).blocks == 10
    finally:
        embedded.close()


def test_blocks_of_another_node_are_pulled(engine):
    with InProcessCluster(Config.of(ROOM), nodes=2) as cluster:
        here, there = cluster.page_client("n0", LAYOUT, NAMESPACE), cluster.page_client("n1", LAYOUT, NAMESPACE)
        chain = chain_of("a", 8)
        stored(there, engine, chain, list(range(8)))
        stored(here, engine, chain.part(0, 2), [0, 1])
        cluster.report_all()
        assert here.has_peers
        assert here.look(chain.keys).tiers == ["host"] * 2
        assert here.locate(chain.keys[2:]) == 6
        assert assert_loaded(here, engine, chain, list(range(8)), may_call=False).blocks == 2
        assert assert_loaded(here, engine, chain, list(range(8))) == Loaded(8, {"host": 2, "peer": 6})
        assert assert_loaded(here, engine, chain, list(range(8))) == Loaded(8, {"host": 8})
        for client in (here, there):
            client.close()


def test_a_block_that_changes_during_the_copy_is_loaded_again_or_not_at_all(client, engine, monkeypatch):
    """Each check of a sequence number fails once: the load tries again, through memory of its own."""
    chain = chain_of("a", 3)
    stored(client, engine, chain, [0, 1, 2])
    view = client._source._view
    calls = itertools.count()
    monkeypatch.setattr(view, "all_valid", lambda slots: False)
    monkeypatch.setattr(view, "valid", lambda slot: next(calls) > 0)
    assert assert_loaded(client, engine, chain, [5, 6, 7]).blocks >= 1
    assert client._source.invalidated == 1


def test_a_block_whose_header_names_another_is_not_believed(client, engine, node):
    chain = chain_of("a", 3)
    stored(client, engine, chain, [0, 1, 2])
    offset = client._source.find(chain.keys)[1].slot.offset
    client._source.memory[offset - 128 + 8] ^= 1  # a byte of the key in the header
    assert assert_loaded(client, engine, chain, [5, 6, 7]).blocks == 1
    assert stored(client, engine, chain.part(1), [1, 2]).refused == 0  # the node has dropped the damaged block
    assert assert_loaded(client, engine, chain, [5, 6, 7]).blocks == 3


def test_a_store_that_gets_no_room_is_refused_in_time(engine, checked):
    embedded = Embedded(Config.of({"host": "1MiB", "block_tokens": 16}))
    try:
        client = checked(embedded.page_client(LAYOUT, NAMESPACE))
        chain = chain_of("a", BLOCKS)
        result = stored(client, engine, chain, list(range(BLOCKS)))
        assert result.refused > 0
        assert result.new + result.refused == BLOCKS
        assert assert_loaded(client, engine, chain, list(range(BLOCKS))).blocks == len(client.look(chain.keys).tiers)
    finally:
        embedded.close()


def test_a_held_block_outlives_others(engine, checked):
    embedded = Embedded(Config.of({"host": "1MiB", "block_tokens": 16}))
    try:
        client = checked(embedded.page_client(LAYOUT, NAMESPACE))
        held = chain_of("held", 6)
        stored(client, engine, held, list(range(6)))
        client.hold(held.keys[-1], 60.0)
        for name in range(12):
            stored(client, engine, chain_of(f"other {name}", 6), list(range(10, 16)))
        assert client.look(held.keys).tiers == ["host"] * 6
    finally:
        embedded.close()


def test_misses_of_look_ups_are_counted(client, node, engine):
    chain = chain_of("a", 4)
    stored(client, engine, chain, [0, 1, 2, 3])
    client.missed(5)
    client.missed(0)
    client.load(chain, engine.pages, [0, 1, 2, 3])
    stats = node.node.stats()
    assert (stats["asked_blocks"], stats["hit_blocks"]) == (9, 4)


def test_a_closed_client_says_so(node, engine):
    client = node.page_client(LAYOUT, NAMESPACE)
    chain = chain_of("a", 2)
    client.close()
    for call in (lambda: client.look(chain.keys).tiers, lambda: client.load(chain, engine.pages, [0, 1])):
        with pytest.raises(TieredKVError) as caught:
            call()
        assert caught.value.kind is Kind.CLOSED


@pytest.mark.usefixtures("nursery")
class TestProcess:
    """A node in a process of its own, which comes, hangs and ends while the engine goes on."""

    def test_a_client_without_a_node_misses_and_finds_it_later(self, checked, engine):
        with NodeProcess() as node:
            info = node.info
            here: list[object] = []
            client = checked(page_client_of(lambda: info if here else None, LAYOUT, NAMESPACE))
            chain = chain_of("a", 3)
            assert not client.has_node
            assert client.look(chain.keys).tiers == []
            assert stored(client, engine, chain, [0, 1, 2]) == Stored(0, 0, 3)
            assert client.load(chain, engine.pages, [0, 1, 2]) == Loaded(0, {})
            assert client.locate(chain.keys) == 0
            here.append(True)
            until(lambda: stored(client, engine, chain, [0, 1, 2]).refused == 0, "the node is found", 10.0)
            assert client.has_node
            assert assert_loaded(client, engine, chain, [4, 5, 6]).blocks == 3

    def test_a_client_that_only_looks_up_finds_the_next_node(self, checked, engine):
        """The scheduler of an engine does nothing else."""
        chain, nodes = chain_of("a", 3), list[NodeProcess]()
        with NodeProcess() as first:
            nodes.append(first)
            client = checked(page_client_of(lambda: nodes[-1].info, LAYOUT, NAMESPACE))
            assert client.look(chain.keys).tiers == []
        with NodeProcess() as second:
            nodes.append(second)
            writer = checked(page_client_of(lambda: second.info, LAYOUT, NAMESPACE))
            stored(writer, engine, chain, [0, 1, 2])
            until(lambda: len(client.look(chain.keys).tiers) == 3, "the next node is found", 10.0)

    def test_reads_go_on_while_the_node_is_dead_and_stores_after_its_restart(self, checked, engine):
        with NodeProcess() as node:
            client = checked(page_client_of(lambda: node.info, LAYOUT, NAMESPACE))
            chain = chain_of("a", 6)
            stored(client, engine, chain.part(0, 3), [0, 1, 2])
            node.kill()
            assert assert_loaded(client, engine, chain, list(range(6))).blocks == 3
            assert stored(client, engine, chain.part(3), [3, 4, 5]).refused == 3
            node.start()
            until(lambda: stored(client, engine, chain.part(3), [3, 4, 5]).refused == 0, "stores work again", 10.0)
            assert assert_loaded(client, engine, chain, list(range(6))).blocks == 6
