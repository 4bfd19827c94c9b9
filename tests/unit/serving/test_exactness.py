"""A trace through an embedded cache gives exactly the hits of its replay: the same policy code gets the same events."""

from random import Random

import pytest
import torch

import tiered_kv
from tests.unit.serving.prompts import NAMESPACE
from tiered_kv.clock import ManualClock
from tiered_kv.memory import words
from tiered_kv.node.learning import history_of, policy_of
from tiered_kv.tiers.host import HEADER_BYTES

LAYOUT = tiered_kv.KVLayout(1, 1, 64, "float32", 32)
"""Blocks of 16 KiB, so that the index has a slot for each that memory can hold."""
T = LAYOUT.block_tokens
HOST_BYTES = 2 << 20
Request = tuple[float, tuple[int, ...], int]


def capacity_blocks() -> int:
    arena_bytes = words.plan(HOST_BYTES)[1]
    return arena_bytes // -(-(LAYOUT.block_bytes + HEADER_BYTES) // 512) // 512


def trace(requests: int, seed: int = 1) -> list[Request]:
    """Returns requests (time, blocks as numbers, answer tokens): growing conversations with a few shared prefixes, and single prompts."""
    random, now_s, chats, made = Random(seed), 0.0, [], []
    for number in range(requests):
        now_s += random.expovariate(2.0)
        if chats and random.random() < 0.6:
            chat = random.choice(chats[-12:])
        else:
            chat = [random.choice((1, 2, 3))] * random.randint(0, 1)
            chats.append(chat)
        chat += [1000 * number + 10 + at for at in range(random.randint(1, 12))]
        made.append((now_s, tuple(chat), random.choice((10, 100, 1000))))
    return made


def replayed(requests: list[Request], config: tiered_kv.Config, blocks: int) -> list[int]:
    """Returns, for each request, how many leading blocks hit when only the policy runs."""
    history = history_of(config)
    policy = policy_of(config, history, blocks)
    hits = []
    for now_s, chain, answer_tokens in requests:
        hit = next((at for at, block in enumerate(chain) if chain[: at + 1] not in policy), len(chain))
        keys = [chain[: at + 1] for at in range(len(chain))]
        if hit:
            history.seen(keys[:hit], None, now_s)
            policy.use(keys[:hit])
        while there := next((at for at, key in enumerate(keys) if key not in policy), len(keys)) + 1:
            missing = keys[there - 1 :]
            if not missing:
                break
            lacking = len(missing) - (blocks - len(policy))
            if lacking > 0:
                for key in policy.victims(lacking, set(keys[: there - 1]), now_s, missing):
                    policy.remove(key)
            taken = missing[: blocks - len(policy)]
            if not taken:
                break
            parent = keys[there - 2] if there > 1 else None
            history.seen(taken, parent, now_s)
            policy.add(taken, parent, 1)
        history.hint(keys[-1], now_s, answer_tokens=answer_tokens)
        hits.append(hit)
    return hits


def stored(requests: list[Request], config: tiered_kv.Config) -> list[int]:
    """Returns the same numbers for an embedded cache."""
    clock, hits = ManualClock(), []
    with tiered_kv.open(config, layout=LAYOUT, namespace=NAMESPACE, clock=clock) as client:
        for now_s, chain, answer_tokens in requests:
            clock.advance(now_s - clock.now_s())
            ids = [block * T + at for block in chain for at in range(T)]
            hit = client.fetch(ids).tokens
            rest = torch.zeros(LAYOUT.kv_shape(len(ids) - hit))
            client.store(ids, rest, start=hit, hint=tiered_kv.Hint(answer_tokens=answer_tokens))
            hits.append(hit // T)
            client.stats()  # the last uses are told before time goes on
    return hits


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_an_embedded_cache_has_exactly_the_replays_hits(policy: str) -> None:
    config = tiered_kv.Config(host=HOST_BYTES, policy=policy, seed=3)
    requests = trace(400)
    expected = replayed(requests, config, capacity_blocks())
    assert stored(requests, config) == expected
    asked = sum(len(chain) for _, chain, _ in requests)
    assert 0.2 * asked < sum(expected) < 0.95 * asked, "neither full of hits nor without"
