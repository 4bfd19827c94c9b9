"""The race that the seqlock is for: three processes read blocks while a writer gives their memory to others at full speed.

The host tier holds a fifth of the documents, so every store evicts, and every extent is soon another block's. Blocks are
2 MiB, so that a copy takes long enough to be overtaken.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.hostile.nursery import Nursery, Program
from tests.stress.content import DOCUMENTS, LAYOUT, NAMESPACE, mark_of, places_L2HND, tokens_of
from tiered_kv.client.client import Client
from tiered_kv.node.node import Node
from tiered_kv.protocol.unix_socket import SessionServer

SECONDS = float(os.environ.get("TIERED_KV_STRESS_S", "20"))
READERS = 3
HOST = "44MiB"
CANARY_ROUNDS = 3
VERIFIED_PER_S = 50
EVICTED_PER_S = 10


@contextmanager
def readers(nursery: Nursery, node: Node, seconds: float, *options: str) -> Iterator[list[Program]]:
    """Reader processes that are attached and wait for their start; none outlives the block."""
    arguments = (json.dumps(node.info()), str(seconds))
    started = [Program(nursery, "tests.stress.reader", *arguments, str(seed), *options) for seed in range(READERS)]
    try:
        for reader in started:
            assert reader.stdout.readline() == "ready\n"
        yield started
    finally:
        for reader in started:
            reader.kill()
            reader.close()


def write_until(client: Client, ended: Callable[[], bool]) -> Counter[str]:
    """Store random documents as fast as can be."""
    draw, places = random.Random(7), places_L2HND()
    kv, written = torch.empty_like(places), Counter()
    while not ended():
        document = draw.randrange(DOCUMENTS)
        torch.add(places, mark_of(document), out=kv)
        stored = client.store(tokens_of(document), kv)
        written.update(new=stored.new, present=stored.present, refused=stored.refused)
    return written


def race(nursery: Nursery, node: Node, client: Client, seconds: float, *options: str) -> Counter[str]:
    """Write while the readers read; the sum of all counts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with readers(nursery, node, seconds, *options) as started:
            for reader in started:
                reader.stdin.write("go\n")
                reader.stdin.flush()
            counts = write_until(client, lambda: all(reader.poll() is not None for reader in started))
            for reader in started:
                assert reader.returncode == 0
                counts.update(json.loads(reader.stdout.read()))
    finally:
        torch.set_num_threads(threads)
    counts.update(node.stats()["counts"])
    return counts


@pytest.fixture
def start(node_factory: Callable, client_factory: Callable, checked: Callable) -> Callable:
    """Call it for a node that serves other processes, and its writer's client."""

    def make(**settings: object) -> tuple[Node, Client]:
        node = node_factory(host=HOST, **settings)
        checked(SessionServer(f"{node.directory}/sock", node.open_session))
        return node, client_factory(node, LAYOUT, NAMESPACE)

    return make


def tell(counts: Counter[str], record_property: Callable, capsys: pytest.CaptureFixture) -> None:
    record_property("counts", dict(counts))
    with capsys.disabled():
        print(f"\n  {json.dumps(counts)}")


@pytest.mark.slow
def test_readers_never_see_a_wrong_byte(nursery, start, record_property, capsys):
    node, client = start()
    counts = race(nursery, node, client, SECONDS)
    tell(counts, record_property, capsys)
    assert counts["wrong_blocks"] == counts["wrong_bytes"] == 0
    assert counts["retries"] > 0, "the race was not met"
    assert counts["verified_blocks"] > VERIFIED_PER_S * SECONDS
    assert counts["dropped"] > EVICTED_PER_S * SECONDS
    assert counts["node_calls"] == 0, "a reader asked its node"


@pytest.mark.slow
def test_readers_never_see_a_wrong_byte_of_a_block_that_moves_to_disk_and_back(nursery, start, tmp_path, record_property, capsys):
    seconds = SECONDS / 4
    node, client = start(disk="96MiB", disk_path=str(tmp_path), disk_segment="32MiB", codec="disk=raw")
    counts = race(nursery, node, client, seconds)
    tell(counts, record_property, capsys)
    assert counts["wrong_blocks"] == counts["wrong_bytes"] == 0
    assert counts["verified_blocks"] > VERIFIED_PER_S * seconds
    assert min(counts["demoted"], counts["promoted"], counts["lost"]) > 0, "blocks did not move to disk, back, and out of it"


@pytest.mark.slow
def test_readers_never_see_a_wrong_byte_of_a_block_that_is_coded_meanwhile(nursery, start, record_property, capsys):
    seconds = SECONDS / 4
    node, client = start(codec="host=lossless")
    counts = race(nursery, node, client, seconds)
    tell(counts, record_property, capsys)
    assert counts["wrong_blocks"] == counts["wrong_bytes"] == 0
    assert counts["verified_blocks"] > 0
    assert counts["shrunk"] > 0, "no block was coded"


@pytest.mark.slow
def test_without_validation_the_same_readers_see_wrong_bytes(nursery, start, record_property, capsys):
    """The canary: a defect of the kind that the test above is for, which it must be able to find."""
    node, client = start()
    for _ in range(CANARY_ROUNDS):
        counts = race(nursery, node, client, min(SECONDS / 4, 5), "--trusting")
        tell(counts, record_property, capsys)
        if counts["wrong_bytes"]:
            return
    pytest.fail("readers that trust every copy have seen no wrong byte; the race is not met any more")
