"""One reader of the stress test, a process of its own: fetches at full speed and compares every byte with what it must be.

Says "ready", waits for a line, reads for the given seconds, prints its counts as JSON. With --trusting the validation
of a read after its copy is switched off: then it must find wrong bytes, or the test could not find any either.
"""

import argparse
import json
import random
import sys
import time

import torch

from tests.stress.content import BLOCKS, DOCUMENTS, LAYOUT, NAMESPACE, mark_of, places_L2HND, tokens_of
from tiered_kv.client.client import Client
from tiered_kv.client.connect import client_of
from tiered_kv.memory.view import NodeView
from tiered_kv.tiers.host import ExtentHeaders


def read(client: Client, seconds: float, draw: random.Random) -> dict:
    """Fetch prefixes of random documents until the time is over; what was found."""
    tokens, places = [tokens_of(document) for document in range(DOCUMENTS)], places_L2HND()
    out = torch.empty_like(places)
    counts = {"fetches": 0, "verified_blocks": 0, "wrong_blocks": 0, "wrong_bytes": 0}
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        document = draw.randrange(DOCUMENTS)
        asked = draw.randint(1, BLOCKS) * LAYOUT.block_tokens
        fetched = client.fetch(tokens[document][:asked], out)
        counts["fetches"] += 1
        for start in range(0, fetched.tokens, LAYOUT.block_tokens):
            block = slice(start, start + LAYOUT.block_tokens)
            wrong = int((fetched.kv[..., block, :] - places[..., block, :] != mark_of(document)).sum())
            counts["verified_blocks"] += 1
            counts["wrong_blocks"] += wrong > 0
            counts["wrong_bytes"] += wrong * out.element_size()
    return counts


def main() -> None:
    """Attach, wait for the start, read, report."""
    options = argparse.ArgumentParser()
    options.add_argument("info", type=json.loads)
    options.add_argument("seconds", type=float)
    options.add_argument("seed", type=int)
    options.add_argument("--trusting", action="store_true")
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.trusting:
        NodeView.valid = NodeView.all_valid = lambda self, slots: True
        ExtentHeaders.name_all = lambda self, offsets, keys: True
    with client_of(given.info, LAYOUT, NAMESPACE) as client:
        print("ready", flush=True)
        sys.stdin.readline()
        counts = read(client, given.seconds, random.Random(given.seed))
        stats = client.stats()["client"]
        print(json.dumps({**counts, "retries": stats["retries"], "node_calls": client.node_calls - 1}), flush=True)


if __name__ == "__main__":
    main()
