"""A worker copies the leading blocks of a long pull while the later ones arrive."""

# ruff: noqa: F401, F811 - fixtures are imported by name

import threading

import pytest
import torch

from tests.unit.peers.test_streams import clients, clients_of, cluster, make_cluster, pair
from tests.unit.serving.prompts import LAYOUT, assert_is_prefix, kv_of, tokens_of
from tiered_kv.client import client as module
from tiered_kv.node.peers import block_server

PATH = tuple(range(12))
T = LAYOUT.block_tokens


@pytest.fixture(autouse=True)
def from_two_blocks_on(monkeypatch) -> None:
    monkeypatch.setattr(module, "READ_AHEAD_BYTES", 2 * LAYOUT.block_bytes)
    monkeypatch.setattr(block_server, "FIRST_BLOCKS", 2)
    monkeypatch.setattr(block_server, "BATCH_BYTES", 2 * LAYOUT.block_bytes)


def room(blocks: int = len(PATH)) -> torch.Tensor:
    return torch.empty(LAYOUT.kv_shape(blocks * T), dtype=LAYOUT.torch_dtype)


def test_blocks_are_copied_while_later_ones_arrive(cluster, clients, monkeypatch) -> None:
    here, there = clients
    here.store(tokens_of(PATH), kv_of(PATH))
    cluster.report_all()
    gate, seen = threading.Event(), []
    send = block_server.BlockServer._send

    def held(self, channel, items, limit) -> None:
        if len(seen) == 1:
            assert gate.wait(30.0)
        seen.append(len(items))
        send(self, channel, items, limit)

    monkeypatch.setattr(block_server.BlockServer, "_send", held)
    read = there._source.read

    def noted(found, kv, expired):
        gate.set()  # the first blocks are read although the second batch has not been sent
        return read(found, kv, expired)

    monkeypatch.setattr(there._source, "read", lambda found, kv, expired: noted(found, kv, expired) if found else [])
    fetched = there.fetch(tokens_of(PATH), out=room())
    assert assert_is_prefix(fetched, PATH) == 12
    assert fetched.tokens_by_tier == {"peer": 12 * T}


@pytest.mark.parametrize("local", [0, 3, 11])
def test_local_and_pulled_blocks_stand_in_their_places(cluster, clients, local: int) -> None:
    here, there = clients
    here.store(tokens_of(PATH), kv_of(PATH))
    there.store(tokens_of(PATH[:local]), kv_of(PATH[:local])) if local else None
    cluster.report_all()
    fetched = there.fetch(tokens_of(PATH), out=room(len(PATH) + 2))
    assert assert_is_prefix(fetched, PATH) == 12
    assert fetched.tokens_by_tier.get("host", 0) == local * T


def test_a_damaged_local_block_ends_the_fetch_before_the_pulled_ones(cluster, clients) -> None:
    here, there = clients
    here.store(tokens_of(PATH), kv_of(PATH))
    there.store(tokens_of(PATH[:4]), kv_of(PATH[:4]))
    cluster.report_all()
    node = cluster.nodes["n1"]
    key = bytes.fromhex(there.explain(tokens_of(PATH))[2].key)
    node.storage.host.disown(node.engine.machine.blocks[key].best.offset)
    assert assert_is_prefix(there.fetch(tokens_of(PATH), out=room()), PATH) == 2


def test_a_pull_that_ends_early_gives_what_it_brought(cluster, clients) -> None:
    here, there = clients
    here.store(tokens_of(PATH[:7]), kv_of(PATH[:7]))
    cluster.report_all()
    fetched = there.fetch(tokens_of(PATH), out=room())
    assert assert_is_prefix(fetched, PATH) == 7
    assert fetched.tokens_by_tier == {"peer": 7 * T}


def test_a_client_closes_its_threads(make_cluster, checked) -> None:
    cluster = make_cluster()
    here, there = clients_of(cluster, checked)
    here.store(tokens_of(PATH), kv_of(PATH))
    cluster.report_all()
    there.fetch(tokens_of(PATH), out=room())
    there.close()
    assert pair(cluster)["blocks"] == 12
