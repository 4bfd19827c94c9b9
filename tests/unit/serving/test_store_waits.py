"""A store never exceeds its wait, with a slow disk, and while another thread holds the engine's lock."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.contracts.transport import PATIENCE_S
from tests.unit.serving.prompts import NAMESPACE
from tests.unit.store.bench import NBYTES
from tests.unit.store.world import key_of
from tiered_kv import KVLayout
from tiered_kv.client.connect import client_of
from tiered_kv.node.node import Node
from tiered_kv.node.worker_session import LOCK_WAIT_S, NodeSession
from tiered_kv.tiers.disk.segments import Files
from tiered_kv.tiers.faulty import EVERY, FaultPlan, Faulty

LAYOUT = KVLayout(4, 2, 64, "bfloat16", 64)
"""Blocks of 128 KiB."""
WAIT_MS = 200
MORE_S = 0.5
"""How long after its wait a store may end, on a busy machine. The error that this detects took several seconds."""


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def slow(gate: threading.Event, call_s: float) -> Faulty:
    """A disk on which each write takes `call_s`, until the test's end."""

    def fault(call: Callable, *arguments: object) -> object:
        gate.wait(call_s)
        return call(*arguments)

    return Faulty(Files(), FaultPlan(pwritev={EVERY: fault}))


def node_with_slow_disk(node_factory: Callable, gate: threading.Event, tmp_path, **settings: object) -> Node:
    node = node_factory(**{"host": "8MiB", "disk": "64MiB", "disk_path": str(tmp_path / "disk"), "store_wait_ms": WAIT_MS, **settings})
    node.storage.disk._files = slow(gate, 3.0)
    return node


def stores(client, count: int, blocks: int = 32) -> list[float]:
    """Make several long stores. Returns the duration of each."""
    kv = torch.randn(LAYOUT.kv_shape(blocks * LAYOUT.block_tokens)).bfloat16()
    took_s = []
    for number in range(count):
        begun_s = time.monotonic()
        client.store(range(number * 100_000, number * 100_000 + blocks * LAYOUT.block_tokens), kv)
        took_s.append(time.monotonic() - begun_s)
    return took_s


@pytest.mark.parametrize("quality", ["exact", "near_exact"])
def test_no_round_of_a_store_exceeds_its_wait(node_factory, gate, tmp_path, monkeypatch, quality: str) -> None:
    node = node_with_slow_disk(node_factory, gate, tmp_path, quality=quality)
    rounds: list[float] = []
    reserve_within = NodeSession.reserve_within

    def timed(*arguments, **options) -> list[int]:
        begun_s = time.monotonic()
        try:
            return reserve_within(*arguments, **options)
        finally:
            rounds.append(time.monotonic() - begun_s)

    monkeypatch.setattr(NodeSession, "reserve_within", timed)
    with client_of(node.info(), LAYOUT, NAMESPACE, connect=node.open_session) as client:
        stores(client, 6)
    assert max(rounds) < WAIT_MS / 1000 + MORE_S
    gate.set()


@pytest.mark.parametrize("quality", ["exact", "near_exact"])
def test_a_store_of_many_rounds_has_one_deadline(node_factory, gate, tmp_path, quality: str) -> None:
    """The staging area of `near_exact` has room for a few blocks in each round, and each round may wait for a slow disk."""
    node = node_with_slow_disk(node_factory, gate, tmp_path, quality=quality)
    with client_of(node.info(), LAYOUT, NAMESPACE, connect=node.open_session) as client:
        assert max(stores(client, 8)) < WAIT_MS / 1000 + MORE_S
    gate.set()


def test_a_store_does_not_wait_for_the_lock_longer_than_for_room(node_factory, gate) -> None:
    node = node_factory(host="1MiB")
    session = node.open_session()
    held = threading.Event()

    def hold() -> None:
        with node.engine.lock:
            held.set()
            assert gate.wait(PATIENCE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(PATIENCE_S)
    begun_s = time.monotonic()
    assert session.reserve_within(NBYTES, [key_of(1)], None, 0.05) == []
    assert time.monotonic() - begun_s < 0.05 + LOCK_WAIT_S + MORE_S
    gate.set()
    holder.join(PATIENCE_S)
    offsets = session.reserve_within(NBYTES, [key_of(1)], None, 0.05)
    assert len(offsets) == 1
    session.release(offsets)
    session.close()
