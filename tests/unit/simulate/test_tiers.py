"""Tests of the simulator with several tiers: equality with the replay, caps, and writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.simulate.traces import CHAINS, DATA, trace_of
from tiered_kv.blocks import Tier
from tiered_kv.policy import POLICY_NAMES, create_policy
from tiered_kv.tools.simulate.replay import Cache, history_for, replay
from tiered_kv.tools.simulate.tiers import TieredCache, replay_tiers, tiers_of
from tiered_kv.tools.simulate.trace import read_trace

OWN_TIERS = [tier for tier in Tier if tier is not Tier.CHECKPOINT]
SHARES = {Tier.DEVICE: 0.02, Tier.HOST: 0.1, Tier.DISK: 0.3, Tier.OBJECTS: 0.5}


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_one_tier_hits_what_the_replay_hits(policy):
    trace = read_trace(DATA / "documents-b64.jsonl.zst")
    one, replayed = replay_tiers(trace, policy, {Tier.HOST: 0.1}), replay(trace, policy, 0.1)
    assert (one.hit_tokens, one.counts.get("dropped", 0)) == (replayed.hit_tokens, replayed.evictions)


@settings(deadline=None, max_examples=50)
@given(CHAINS, st.integers(1, 20), st.sampled_from(POLICY_NAMES))
def test_one_tier_agrees_request_by_request(tmp_path_factory, chains, capacity, policy):
    trace = trace_of(tmp_path_factory.mktemp("trace"), chains)
    history = history_for(policy)
    tiered, plain = TieredCache(policy, {Tier.HOST: capacity}), Cache(create_policy(policy, history, capacity), history, capacity)
    for request in trace:
        arguments = (request.keys, request.time_s, request.output_tokens)
        assert tiered.request(*arguments) == plain.request(*arguments)
        tiered.check()


@settings(deadline=None, max_examples=50)
@given(CHAINS, st.lists(st.integers(1, 12), min_size=4, max_size=4), st.sets(st.sampled_from(OWN_TIERS)))
def test_every_cap_holds_after_every_request(tmp_path_factory, chains, capacities, absent):
    caps = {tier: blocks for tier, blocks in zip(OWN_TIERS, capacities, strict=True) if tier is Tier.HOST or tier not in absent}
    cache = TieredCache("lru", caps)
    for request in trace_of(tmp_path_factory.mktemp("trace"), chains):
        cache.request(request.keys, request.time_s, request.output_tokens)
        cache.check()


def test_a_lower_tier_adds_hits_and_is_written_little_more_than_once():
    trace = read_trace(DATA / "documents-b64.jsonl.zst")
    alone, all_tiers = replay_tiers(trace, "lru", {Tier.HOST: 0.1}), replay_tiers(trace, "lru", SHARES)
    assert all_tiers.token_hit_ratio > alone.token_hit_ratio + 0.1
    assert all(all_tiers.hit_ratio_by_tier.values())
    assert 1 <= all_tiers.write_amplification["disk"] <= 1.3
    assert all_tiers.write_amplification["objects"] == 1


def test_tiers_have_aliases_by_warmth():
    assert tiers_of("cold=1,disk=0.5, warm = 0.1,hot=0.01") == {Tier.DEVICE: 0.01, Tier.HOST: 0.1, Tier.DISK: 0.5, Tier.OBJECTS: 1.0}
