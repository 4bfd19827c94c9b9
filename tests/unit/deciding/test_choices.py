"""Fetches from a slow peer, a slow disk and a slow object store: what pays is loaded, the rest is declined, and recovery is noticed."""

import time
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import pytest
import torch

from tests.unit.peers.test_streams import clients_of, make_cluster  # noqa: F401 - fixtures are imported by name
from tests.unit.serving.prompts import LAYOUT, NAMESPACE, assert_is_prefix, kv_of, tokens_of
from tiered_kv import KVLayout
from tiered_kv.blocks import Tier
from tiered_kv.client import deciding, load_costs
from tiered_kv.client.deciding import DecidingClient
from tiered_kv.client.load_costs import LoadCosts, LoadPart
from tiered_kv.client.prefill_cost import PrefillCost
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.disk.segments import SegmentReader
from tiered_kv.tiers.faulty import EVERY, FaultPlan, Faulty
from tiered_kv.tools.bench.slow_link import SlowLink

T = LAYOUT.block_tokens
LARGE = KVLayout(2, 2, 16, "float32", 64)
"""Blocks of 32 KiB: 30 fill the arena of a 1 MiB host tier."""
SLOW_S = 0.2
PATIENCE_S = 20.0


def rate_for(seconds: float, blocks: int = 8, layout: KVLayout = LAYOUT) -> float:
    """Returns the rate of a model that computes `blocks` in so many seconds."""
    return blocks * layout.block_tokens / seconds


def path(number: int) -> tuple[int, ...]:
    return (number, *range(1, 8))


def until(true: Callable[[], Any]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def the_directory_answers_in_time(monkeypatch) -> None:
    """Has fetches wait for the directory, however busy the machine is: a request that computes for 20 ms waits 1 ms for it."""
    in_time, note = DecidingClient._in_time, LoadCosts.note

    def waiting(self: DecidingClient, loading: Any, patience: Any, arrived: Any, sources: Any) -> bool:
        if sources == [deciding.DIRECTORY]:
            wait([loading], PATIENCE_S)
        return in_time(self, loading, patience, arrived, sources)

    def note_loads(self: LoadCosts, source: str, nbytes: int, seconds: float) -> None:
        if source != deciding.DIRECTORY:
            note(self, source, nbytes, seconds)

    monkeypatch.setattr(DecidingClient, "_in_time", waiting)
    monkeypatch.setattr(LoadCosts, "note", note_loads)
    monkeypatch.setattr(deciding, "ANSWER_S", 0.0)


class Slowness:
    """A delay of calls that a test changes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def fault(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        time.sleep(self.seconds)
        return call(*arguments, **options)


# A peer


class Pair:
    """Two nodes, the first of which is behind a link whose latency a test changes. Each request is for a prefix of its own."""

    def __init__(self, cluster: Any, checked: Callable, latency_s: float) -> None:
        self.cluster = cluster
        self.link = SlowLink(cluster.links["n0"].address)
        self.link._latency_s = latency_s
        cluster.announce("n0", self.link.address)
        self.owner, self.client = clients_of(cluster, checked)
        self.number = 0

    def fetch(self, **options: Any) -> tuple[Any, float]:
        """Returns the result of a fetch of eight blocks that only the other node has, and the seconds that it took."""
        self.number += 1
        asked = path(self.number)
        self.owner.store(tokens_of(asked), kv_of(asked))
        self.cluster.report_all()
        begun_s = time.monotonic()
        fetched = self.client.fetch(tokens_of(asked), **options)
        took_s = time.monotonic() - begun_s
        assert_is_prefix(fetched, asked)
        assert fetched.declined == sum(fetched.declined_by_reason.values())
        return fetched, took_s

    def settle(self) -> None:
        until(lambda: not self.client.is_measuring)


@pytest.fixture
def pair(make_cluster, checked):  # noqa: F811 - the fixture
    made: list[Pair] = []

    def make(latency_s: float = SLOW_S, **settings: Any) -> Pair:
        made.append(Pair(make_cluster(**settings), checked, latency_s))
        return made[-1]

    yield make
    for each in made:
        each.settle()
        each.client.close()
        each.link.close()


def test_a_known_slow_peer_is_declined_only_where_computing_is_faster(pair) -> None:
    two = pair()
    two.fetch(recompute_tokens_per_s=0)
    two.fetch(recompute_tokens_per_s=0)
    fetched, took_s = two.fetch(recompute_tokens_per_s=rate_for(0.02))
    assert (fetched.tokens, fetched.declined_by_reason) == (0, {"peer: slower": 8 * T})
    assert took_s < SLOW_S + 0.1
    fetched, _ = two.fetch(recompute_tokens_per_s=rate_for(60.0))
    assert (fetched.tokens_by_tier, fetched.declined) == ({"peer": 8 * T}, 0)
    two.settle()  # the probe that the decline started
    own = two.client.own_stats()
    assert own["declined_tokens"] == own["declined_tokens_peer_slower"] == 8 * T
    assert two.cluster.nodes["n1"].stats()["declined_tokens"] == {"disk": 0, "objects": 0, "checkpoint": 0, "peer": 8 * T}
    assert two.client.load_costs()["peer"]["latency_s"] > 0


def test_a_slow_peer_about_which_nothing_is_known_costs_a_small_part_of_computing(pair) -> None:
    two = pair(latency_s=1.0)
    fetched, took_s = two.fetch(recompute_tokens_per_s=rate_for(1.0))
    assert (fetched.tokens, fetched.declined_by_reason) == (0, {"peer: measuring": 8 * T})
    assert took_s < 0.8  # 0.06 s on a quiet machine; the block takes 4 s with its handshake
    fetched, took_s = two.fetch(recompute_tokens_per_s=rate_for(1.0))
    assert (fetched.tokens, fetched.declined_by_reason) == (0, {"peer: measuring": 8 * T})
    two.settle()
    assert two.client.load_costs()["peer n0"]["loads"] == 1
    fetched, _ = two.fetch(recompute_tokens_per_s=rate_for(1.0))
    assert fetched.declined_by_reason == {"peer: slower": 8 * T}


def test_a_fast_peer_about_which_nothing_is_known_is_used_at_once(pair) -> None:
    two = pair(latency_s=0.0)
    fetched, _ = two.fetch(recompute_tokens_per_s=rate_for(60.0))
    assert (fetched.tokens_by_tier, fetched.declined) == ({"peer": 8 * T}, 0)
    out = torch.empty(LAYOUT.kv_shape(8 * T), dtype=LAYOUT.torch_dtype)
    fetched, _ = two.fetch(recompute_tokens_per_s=rate_for(60.0), out=out)
    assert (fetched.tokens_by_tier, fetched.declined) == ({"peer": 8 * T}, 0)


def test_without_a_rate_everything_is_loaded(pair) -> None:
    two = pair()
    for _ in range(2):
        fetched, _ = two.fetch()
        assert (fetched.tokens_by_tier, fetched.declined_by_reason) == ({"peer": 8 * T}, {})


def test_a_link_that_has_become_slow_is_left_in_time(pair) -> None:
    two = pair(latency_s=0.0)
    for _ in range(3):
        two.fetch(recompute_tokens_per_s=rate_for(60.0))
    two.link._latency_s = 3.0
    fetched, took_s = two.fetch(recompute_tokens_per_s=rate_for(4.0))
    assert (fetched.tokens, fetched.declined_by_reason) == (0, {"peer: late": 8 * T})
    assert took_s < 2.0  # 0.25 s on a quiet machine
    two.settle()
    two.fetch(recompute_tokens_per_s=rate_for(4.0))
    two.settle()
    fetched, _ = two.fetch(recompute_tokens_per_s=rate_for(4.0))
    assert fetched.tokens == 0


def test_a_link_that_is_fast_again_is_noticed(pair, monkeypatch) -> None:
    monkeypatch.setattr(load_costs, "PROBE_EVERY_S", 0.0)
    two = pair(latency_s=0.3)  # with more, no stream is opened within a second
    two.fetch(recompute_tokens_per_s=0)
    two.fetch(recompute_tokens_per_s=0)
    fetched, _ = two.fetch(recompute_tokens_per_s=rate_for(0.5))
    assert fetched.tokens == 0
    two.settle()
    two.link._latency_s = 0.0
    for _ in range(5):
        fetched, _ = two.fetch(recompute_tokens_per_s=rate_for(0.5))
        two.settle()
    assert (fetched.tokens_by_tier, fetched.declined) == ({"peer": 8 * T}, 0), two.client.load_costs()


def test_declines_of_one_source_probe_it_once_in_a_while(pair) -> None:
    two = pair()
    two.fetch(recompute_tokens_per_s=0)
    two.fetch(recompute_tokens_per_s=0)
    for _ in range(3):
        assert two.fetch(recompute_tokens_per_s=rate_for(0.02))[0].declined
        two.settle()
    assert two.client.load_costs()["peer n0"]["loads"] == 1  # of the one probe; before it, the peer had no name


def test_only_the_slow_one_of_two_peers_is_declined(make_cluster, checked) -> None:  # noqa: F811 - the fixture
    cluster = make_cluster(3)
    slow, fast, asking = clients_of(cluster, checked)
    with SlowLink(cluster.links["n0"].address, SLOW_S) as link:
        cluster.announce("n0", link.address)

        def fetch(owner: Any, number: int, rate: float) -> Any:
            owner.store(tokens_of(path(number)), kv_of(path(number)))
            cluster.report_all()
            return asking.fetch(tokens_of(path(number)), recompute_tokens_per_s=rate)

        for number in range(4):
            fetch(slow if number % 2 else fast, number, rate_for(60.0))
        fetched = fetch(slow, 5, rate_for(0.3))
        assert fetched.tokens == 0, asking.load_costs()
        assert fetched.declined == 8 * T
        fetched = fetch(fast, 6, rate_for(0.6))
        assert (fetched.tokens, fetched.declined) == (8 * T, 0), asking.load_costs()
        until(lambda: not asking.is_measuring)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf"), "fast", True])
def test_a_rate_must_be_a_number(client_factory, node_factory, rate: Any) -> None:
    client = client_factory(node_factory(), LAYOUT, NAMESPACE)
    with pytest.raises(TieredKVError, match="recompute_tokens_per_s") as caught:
        client.fetch(tokens_of(path(1)), recompute_tokens_per_s=rate)
    assert caught.value.kind is Kind.CONFIG


def test_a_fetch_from_memory_decides_nothing(client_factory, node_factory, monkeypatch) -> None:
    client = client_factory(node_factory(), LAYOUT, NAMESPACE)
    client.store(tokens_of(path(1)), kv_of(path(1)))
    monkeypatch.setattr(deciding, "parts_of", None)
    for _ in range(3):
        client.note_prefill(1000, 1.0)
    assert client.fetch(tokens_of(path(1))).tokens == 8 * T
    assert client.fetch(tokens_of(path(2))).tokens == 0


# A disk, and an object store


def moved_down(node: Any, client: Any, tier: Tier, paths: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Store many prefixes in a small host tier. Returns those that are wholly in the lower tier."""
    for each in paths:
        client.store(tokens_of(each, LARGE), kv_of(each, LARGE))
        node.engine.drain_touches()
        node.engine.settle()
    label = tier.label
    return [each for each in paths if {record.tier for record in client.explain(tokens_of(each, LARGE))} == {label}]


LOWER = {
    Tier.DISK: lambda tmp_path: {"disk": f"8MiB:{tmp_path / 'disk'}"},
    Tier.OBJECTS: lambda tmp_path: {"objects": "memory://"},
}


@pytest.mark.parametrize("tier", LOWER)
def test_a_slow_tier_is_declined_and_used_again_when_it_is_fast(tier, node_factory, client_factory, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(load_costs, "PROBE_EVERY_S", 0.0)
    slowness = Slowness(0.0)
    node = node_factory(host="1MiB", store_wait_ms=10_000, **LOWER[tier](tmp_path))
    client = client_factory(node, LARGE, NAMESPACE)
    below = moved_down(node, client, tier, [(number, 1, 2, 3) for number in range(24)])
    assert len(below) >= 8
    plain_read = SegmentReader.read
    if tier is Tier.DISK:
        monkeypatch.setattr(SegmentReader, "read", lambda self, *asked: slowness.fault(plain_read, self, *asked))
    else:
        node.storage.logs[tier] = Faulty(node.storage.logs[tier], FaultPlan(read={EVERY: slowness.fault}))

    def fetch(rate: float) -> Any:
        asked = below.pop()
        fetched = client.fetch(tokens_of(asked, LARGE), recompute_tokens_per_s=rate)
        assert_is_prefix(fetched, asked, LARGE)
        until(lambda: not client.is_measuring)
        return fetched

    slowness.seconds = SLOW_S
    assert fetch(0).tokens_by_tier == {tier.label: 4 * LARGE.block_tokens}
    computed_s = SLOW_S / 2
    fetched = fetch(rate_for(computed_s, 4, LARGE))
    assert (fetched.tokens, fetched.declined_by_reason) == (0, {f"{tier.label}: slower": 4 * LARGE.block_tokens})
    assert node.stats()["declined_tokens"][tier.label] == 4 * LARGE.block_tokens
    assert fetch(rate_for(60.0, 4, LARGE)).tokens == 4 * LARGE.block_tokens
    slowness.seconds = 0.0
    for _ in range(4):
        fetched = fetch(rate_for(computed_s, 4, LARGE))
    assert (fetched.tokens, fetched.declined) == (4 * LARGE.block_tokens, 0)


def test_a_disk_that_hangs_costs_a_small_part_of_computing(node_factory, client_factory, tmp_path, monkeypatch) -> None:
    node = node_factory(host="1MiB", store_wait_ms=10_000, disk=f"8MiB:{tmp_path / 'disk'}")
    client = client_factory(node, LARGE, NAMESPACE)
    asked = moved_down(node, client, Tier.DISK, [(number, 1, 2, 3) for number in range(16)])[0]
    plain_read, slowness = SegmentReader.read, Slowness(2.0)
    monkeypatch.setattr(SegmentReader, "read", lambda self, *asked: slowness.fault(plain_read, self, *asked))
    begun_s = time.monotonic()
    fetched = client.fetch(tokens_of(asked, LARGE), recompute_tokens_per_s=rate_for(1.0, 4, LARGE))
    assert time.monotonic() - begun_s < 1.0  # 0.06 s on a quiet machine
    assert (fetched.tokens, fetched.declined_by_reason) == (0, {"disk: late": 4 * LARGE.block_tokens})
    time.sleep(2.2)  # the hanging reads end


def test_requests_too_short_to_ask_the_directory_use_a_peer_that_has_proved_fast(pair, monkeypatch) -> None:
    monkeypatch.undo()  # the directory is asked as ever
    two = pair(latency_s=0.0)
    rate = rate_for(0.015)  # 5 % of it is less than an answer of the directory takes
    fetched, _ = two.fetch(recompute_tokens_per_s=rate)
    assert (fetched.tokens, fetched.declined) == (0, 0)
    until(lambda: "peer n0" in two.client.load_costs())  # a thread has asked, and pulled a block
    two.client._costs.note_pull([LoadPart("peer n0", 1, LAYOUT.block_bytes)], 1, LAYOUT.block_bytes, 1e-5)  # as on a quiet machine
    two.client._costs.note_pull([LoadPart("peer n0", 8, LAYOUT.block_bytes)], 8, LAYOUT.block_bytes, 2e-5)
    assert two.client._fast_peers_s(PrefillCost(1 / rate), 0, 8) is not None
