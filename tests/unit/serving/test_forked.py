"""A worker that forks after a fetch: its child has none of the parent's threads, but can fetch."""

import hashlib
from pathlib import Path as FilePath

import pytest
import torch

from tests.forking import in_child
from tests.unit.serving.prompts import NAMESPACE, kv_of, tokens_of
from tests.unit.serving.test_failures import LARGE, filled_disk
from tiered_kv.client.connect import client_of


def digest(kv: torch.Tensor) -> str:
    return hashlib.sha256(kv.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def fetched(client, turns: list[int]) -> list[str]:
    """Returns a digest of the KV of these prompts. Asserts that all are fetched within a deadline that only a hang misses."""
    found = []
    for turn in turns:
        each = client.fetch(tokens_of((turn,), LARGE), deadline_ms=8000)
        assert each.tokens == LARGE.block_tokens, f"{each.tokens} tokens of turn {turn}"
        found.append(digest(each.kv))
    return found


def turns_in(client, tier: str, codec: str) -> list[int]:
    records = {turn: client.explain(tokens_of((turn,), LARGE))[0] for turn in range(40)}
    return [turn for turn, each in records.items() if (each.tier, each.codec) == (tier, codec)]


def test_a_child_reads_blocks_on_disk(node_factory, tmp_path: FilePath) -> None:
    node, client = filled_disk(node_factory, tmp_path)
    with client:
        turns = [turn for turn in range(40) if client.explain(tokens_of((turn,), LARGE))[0].tier == "disk"][:4]
        node._closing.set()  # no beat promotes what is read here
        node._beats.join()
        before = fetched(client, turns)
        assert in_child(lambda: fetched(client, turns)) == before
        assert fetched(client, turns) == before, "the parent goes on as before"
        node._closing.clear()


@pytest.mark.parametrize("codec", ["int8", "lossless"])
def test_a_child_decodes_compressed_blocks(node_factory, codec: str) -> None:
    node = node_factory(host="1MiB", codec=f"host={codec}", store_wait_ms=20_000)
    with client_of(node.info(), LARGE, NAMESPACE, connect=node.open_session) as client:
        for turn in range(40):
            client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))
            node.engine.drain_touches()
            node.engine.settle()
        turns = turns_in(client, "host", codec)[:4]
        assert turns
        before = fetched(client, turns)
        assert in_child(lambda: fetched(client, turns)) == before
        assert in_child(lambda: in_child(lambda: fetched(client, turns))) == before, "a child of a child, too"
        assert fetched(client, turns) == before
