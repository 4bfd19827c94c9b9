"""Tests of the replay: what a step does, what is counted, and the offline optimum against an exhaustive search and all policies."""

from functools import cache as memoized
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.simulate.traces import BLOCK_TOKENS, CHAINS, DATA, line, trace_of, write
from tiered_kv.policy import POLICY_NAMES, History, LRUPolicy, create_policy
from tiered_kv.tools.simulate.belady import BeladyCache
from tiered_kv.tools.simulate.replay import (
    FLOPS_POSITION_TOKENS,
    Cache,
    capacity_in_blocks,
    history_for,
    prefill_weight,
    replay,
    replay_with,
    run,
)
from tiered_kv.tools.simulate.trace import read_trace

ALL = [*POLICY_NAMES, "belady"]


class RecordingHistory(History):
    """Records the calls it gets."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def seen(self, keys, parent, now_s) -> None:
        self.calls.append(("seen", list(keys), parent, now_s))

    def hint(self, last_block, now_s, *, answer_tokens=None, reuse_within_s=None, ended=False) -> None:
        self.calls.append(("hint", last_block, now_s, answer_tokens))


def lru_cache(capacity: int) -> Cache:
    return Cache(LRUPolicy(), RecordingHistory(), capacity)


def test_the_history_gets_hits_then_new_blocks_then_the_answer():
    cache = lru_cache(10)
    cache.request([1, 2], 1.0, 30)
    cache.request([1, 2, 3], 2.0, 40)
    assert cache.history.calls == [
        ("seen", [1, 2], None, 1.0),
        ("hint", 2, 1.0, 30),
        ("seen", [1, 2], None, 2.0),
        ("seen", [3], 2, 2.0),
        ("hint", 3, 2.0, 40),
    ]


def test_a_request_longer_than_the_capacity_keeps_its_leading_blocks():
    cache = lru_cache(3)
    cache.request([9], 0.0, 0)
    assert cache.request([1, 2, 3, 4, 5], 1.0, 0) == 0
    assert cache.request([1, 2, 3, 4, 5], 2.0, 0) == 3
    assert cache.evictions == 1
    cache.check()


def test_a_request_without_blocks_changes_nothing():
    cache = lru_cache(3)
    assert cache.request([], 0.0, 5) == 0
    assert cache.history.calls == []


def test_tokens_are_counted_over_all_input(tmp_path):
    lines = [line(0, [1, 2, 3], 25), line(1, [1, 2, 4], 29), line(2, [5], 6)]
    result = replay(read_trace(write(tmp_path / "a-b10.jsonl", lines)), "lru", 1.0)
    assert (result.trace, result.policy, result.capacity, result.capacity_blocks) == ("a-b10.jsonl", "lru", 1.0, 2)
    assert (result.hit_blocks, result.asked_blocks, result.hit_tokens, result.input_tokens) == (2, 4, 20, 60)
    assert result.token_hit_ratio == 20 / 60
    weights = {tokens: sum(1 + at / FLOPS_POSITION_TOKENS for at in range(tokens)) for tokens in (20, 25, 29, 6)}
    assert result.flops_saved_ratio == pytest.approx(weights[20] / (weights[25] + weights[29] + weights[6]))


@given(st.integers(0, 3_000))
def test_the_weight_of_a_prefill_is_the_sum_over_its_tokens(tokens):
    assert prefill_weight(tokens) == pytest.approx(sum(1 + at / FLOPS_POSITION_TOKENS for at in range(tokens)))


@pytest.mark.parametrize(("capacity", "blocks"), [(1.0, 10), (0.3, 3), (0.31, 4), (0.001, 1)])
def test_a_share_is_rounded_up(tmp_path, capacity, blocks):
    trace = trace_of(tmp_path, [[number] for number in range(10)])
    assert capacity_in_blocks(trace, capacity) == blocks


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("lines", [[line(0, [], 0)], [line(0, [1], 4)], [line(0, [1], 10)]])
def test_tiny_traces_replay(tmp_path, policy, lines):
    result = replay(read_trace(write(tmp_path / "a-b10.jsonl", lines)), policy, 0.01)
    assert (result.hit_blocks, result.token_hit_ratio, result.flops_saved_ratio) == (0, 0.0, 0.0)


def test_progress_adds_up_to_all_requests(tmp_path):
    trace, told = trace_of(tmp_path, [[1]] * 130), []
    replay(trace, "lru", 1.0, progress=told.append)
    assert told == [64, 64, 2]


def test_a_policy_object_gives_the_same_result_as_its_name():
    trace = read_trace(DATA / "documents-b64.jsonl.zst")
    mine = replay_with(trace, LRUPolicy(), History(), 301)
    assert mine.hit_blocks == replay(trace, "lru", 0.1).hit_blocks


@settings(deadline=None, max_examples=50)
@given(CHAINS, st.integers(1, 20))
def test_the_optimum_keeps_its_cap_and_no_policy_beats_it(tmp_path_factory, chains, capacity):
    trace = trace_of(tmp_path_factory.mktemp("trace"), chains)
    optimum = BeladyCache(trace, capacity)
    best = 0
    for request in trace:
        best += optimum.request(request.keys, request.time_s, 0)
        optimum.check()
    for name in POLICY_NAMES:
        history = history_for(name)
        cache = Cache(create_policy(name, history, capacity), history, capacity)
        assert run(trace, cache, name, 1.0).hit_blocks <= best
        cache.check()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 7).map(lambda number: [number >> 2, number >> 1, number]), min_size=1, max_size=8), st.integers(1, 4))
def test_the_optimum_hits_as_often_as_an_exhaustive_search(tmp_path_factory, chains, capacity):
    chains = [[number for number in chain if number] for chain in chains]
    trace = trace_of(tmp_path_factory.mktemp("trace"), chains)
    assert run(trace, BeladyCache(trace, capacity), "belady", 1.0).hit_blocks == best_possible(chains, capacity)


def best_possible(chains: list[list[int]], capacity: int) -> int:
    """Searches all ways to keep at most `capacity` blocks, each with its ancestors. Returns the most hits of any of them."""

    @memoized
    def most(at: int, kept: frozenset[int]) -> int:
        if at == len(chains):
            return 0
        hit = next((place for place, key in enumerate(chains[at]) if key not in kept), len(chains[at]))
        known = sorted(kept | set(chains[at]))
        sets = (frozenset(each) for size in range(capacity + 1) for each in combinations(known, size))
        return hit + max(most(at + 1, each) for each in sets)

    return most(0, frozenset())


def test_the_traces_of_these_tests_have_full_blocks_of_ten_tokens(tmp_path):
    assert trace_of(tmp_path, [[1, 2]]).block_tokens == BLOCK_TOKENS
