"""What more memory would bring: the estimates of a node against the exact figures of replayed traces."""

from collections.abc import Iterator
from hashlib import blake2b

import pytest

from tests.unit.serving.prompts import NAMESPACE, kv_of, tokens_of
from tests.unit.simulate.traces import DATA
from tiered_kv import KVLayout
from tiered_kv.blocks import GoneCause, Location, Tier
from tiered_kv.cluster.status import more_room, summarize
from tiered_kv.node.insight.ceiling import Ceiling
from tiered_kv.node.insight.distinct import DistinctKeys
from tiered_kv.policy import create_policy
from tiered_kv.tools.simulate.replay import Cache, capacity_in_blocks, history_for, replay
from tiered_kv.tools.simulate.trace import Trace, read_trace

LARGE = KVLayout(2, 2, 16, "float32", 64)
BLOCK = Location(Tier.HOST, 0, 0, 0, 1, 1)


def key_of(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little", signed=True), digest_size=32).digest()


class ObservedCache(Cache):
    """A simulated cache that reports to a `Ceiling` as a node does, and counts what an infinite cache would have hit."""

    def __init__(self, trace: Trace, policy: str, share: float) -> None:
        capacity, history = capacity_in_blocks(trace, share), history_for(policy)
        super().__init__(create_policy(policy, history, capacity, cost_weight=0, block_tokens=trace.block_tokens), history, capacity)
        self.asked = self.hit = self.infinite = 0
        self.ceiling = Ceiling(capacity, lambda: (self.asked, self.hit))
        self._seen: set[int] = set()

    def request(self, keys: list[int], now_s: float, answer_tokens: int) -> int:
        hit = super().request(keys, now_s, answer_tokens)
        self.asked, self.hit = self.asked + len(keys), self.hit + hit
        self.ceiling.stored([key_of(key) for key in keys[hit:]])
        self.infinite += next((at for at, key in enumerate(keys) if key not in self._seen), len(keys))
        self._seen.update(keys)
        return hit

    def _evict(self, victims: list[int]) -> None:
        super()._evict(victims)
        for key in victims:
            self.ceiling.gone(key_of(key), BLOCK, GoneCause.DROPPED, 1, 0.0)


def requests_of(traces: list[Trace]) -> Iterator[tuple[list[int], float]]:
    """Yields the requests of several traces in turns. Their blocks have nothing in common."""
    for requests in zip(*traces, strict=False):
        for number, request in enumerate(requests):
            yield [key * len(traces) + number for key in request.keys], request.time_s


@pytest.mark.parametrize("names", [["chat"], ["documents"], ["chat", "documents"]], ids="+".join)
@pytest.mark.parametrize("policy", ["adaptive", "lru"])
@pytest.mark.parametrize("share", [0.02, 0.2])
def test_the_ceiling_of_a_trace_is_within_a_point_of_the_exact_one(names: list[str], policy: str, share: float) -> None:
    traces = [read_trace(DATA / f"{name}-b64.jsonl.zst") for name in names]
    cache = ObservedCache(traces[0], policy, share)
    for number, (keys, now_s) in enumerate(requests_of(traces)):
        cache.request(keys, now_s, 0)
        if number % 10 == 0:
            cache.ceiling.beat()
    cache.ceiling.beat()
    cache.ceiling.check()
    figures = cache.ceiling.stats()
    assert figures["hit_blocks_infinite"] / cache.asked == pytest.approx(cache.infinite / cache.asked, abs=0.01)
    assert figures["hit_blocks"] <= figures["hit_blocks_twice_room"] <= figures["hit_blocks_infinite"] <= figures["asked_blocks"]
    if len(names) == 1:
        twice = replay(traces[0], policy, 2 * share)
        assert figures["hit_blocks_twice_room"] / cache.asked == pytest.approx(twice.hit_blocks / twice.asked_blocks, abs=0.05)


@pytest.mark.parametrize("count", [0, 1, 1_000, 100_000, 1_000_000])
def test_different_keys_are_counted_within_one_percent(count: int) -> None:
    sketch = DistinctKeys()
    for _ in range(2):
        for first in range(0, count, 50_000):
            sketch.add([key_of(number) for number in range(first, min(first + 50_000, count))])
    assert sketch.estimate() == pytest.approx(count, rel=0.01)
    sketch.check()


def test_the_memory_stays_below_a_mebibyte_however_many_blocks_pass() -> None:
    ceiling = Ceiling(1 << 40, lambda: (0, 0))
    for number in range(60_000):
        ceiling.gone(key_of(number), BLOCK, GoneCause.RECLAIMED, 1, 0.0)
    ceiling.beat()
    ceiling.check()
    assert ceiling.nbytes <= 1 << 20
    assert len(ceiling._log) == 0


def test_sampling_keeps_the_estimate_of_twice_the_room() -> None:
    """Far more blocks are evicted than are remembered: each remembered one stands for several."""
    blocks, asked = 40_000, [0, 0]
    ceiling = Ceiling(blocks, lambda: tuple(asked))
    for _ in range(2):
        for number in range(blocks):
            ceiling.stored([key_of(number)])
        for number in range(blocks):
            ceiling.gone(key_of(number), BLOCK, GoneCause.DROPPED, 1, 0.0)
    asked[0] = 2 * blocks
    ceiling.beat()
    assert ceiling._parts > 1
    assert ceiling.stats()["hit_blocks_twice_room"] == pytest.approx(blocks, rel=0.1)


def test_only_evictions_count_as_a_lack_of_room() -> None:
    ceiling = Ceiling(10, lambda: (2, 0))
    for cause in (GoneCause.DAMAGED, GoneCause.ENDED, GoneCause.TOO_LOSSY, GoneCause.FORGOTTEN):
        ceiling.gone(key_of(cause), BLOCK, cause, 1, 0.0)
        ceiling.stored([key_of(cause)])
    ceiling.beat()
    assert ceiling.stats()["hit_blocks_twice_room"] == 0


def test_a_node_reports_what_more_room_would_have_brought(node_factory, client_factory) -> None:
    node = node_factory(host="1MiB")
    client = client_factory(node, LARGE, NAMESPACE)
    for _ in range(2):
        for turn in range(40):
            tokens = tokens_of((turn,), LARGE)
            if not client.fetch(tokens).tokens:
                client.store(tokens, kv_of((turn,), LARGE))
    node.beat()
    figures = node.stats()["ceiling"]
    assert figures["asked_blocks"] == 80
    assert figures["hit_blocks_infinite"] == 40, "in the second round each block had been stored before"
    assert figures["hit_blocks"] < figures["hit_blocks_twice_room"] <= 40
    about = {"cluster_id": "abc", "config": node.config, "nodes": [{**node.info(), "silent_s": 0.1, "stats": node.stats()}]}
    summary = summarize(about)
    assert summary["more_room"]["hit_ratio_infinite"] == summary["nodes"][0]["more_room"]["hit_ratio_infinite"] == 0.5
    assert "with any room 50.0%" in more_room(summary)
    del about["nodes"][0]["stats"]["ceiling"]  # a node of an older version
    assert more_room(summarize(about)) == ""


def test_refused_stores_count_as_misses_that_more_room_would_have_avoided(node_factory, client_factory) -> None:
    node = node_factory(host="1MiB", store_wait_ms=0)
    client = client_factory(node, LARGE, NAMESPACE)
    for turn in range(40):
        client.store(tokens_of((turn,), LARGE), kv_of((turn,), LARGE))
    before = node.ceiling._stored
    with node.pinned(list(node.engine.machine.blocks)):
        for _ in range(2):
            assert client.fetch(tokens_of((99,), LARGE)).tokens == 0
            assert client.store(tokens_of((99,), LARGE), kv_of((99,), LARGE)).refused == 1
    node.beat()
    assert node.ceiling._stored >= before
    assert node.stats()["ceiling"]["hit_blocks_infinite"] == 1, "an infinite cache would have had it the second time"
