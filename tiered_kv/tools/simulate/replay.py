"""The replay: sends one trace through one policy under one cap, and counts the hits and the prefill they save.

Each request does exactly what it would do in the store (see `Cache.request`), so that the same blocks hit in both.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tiered_kv import policy as policies
from tiered_kv.policy import EvictionPolicy, History, create_policy
from tiered_kv.tools.simulate.trace import Trace

FLOPS_POSITION_TOKENS = 30_500
"""The position at which a token's attention over the earlier tokens costs as many FLOPs as all weights, in an 8B Llama. So the prefill
of a token at position p costs 1 + p / FLOPS_POSITION_TOKENS times that of the first token."""

PROGRESS_REQUESTS = 64

Progress = Callable[[int], None]
"""Called from time to time with the number of requests replayed since the last call."""


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one policy on one trace under one cap. `capacity` is a share of the trace's unique full blocks, as given."""

    trace: str
    policy: str
    capacity: float
    capacity_blocks: int
    input_tokens: int
    hit_tokens: int
    token_hit_ratio: float
    flops_saved_ratio: float
    asked_blocks: int
    hit_blocks: int
    evictions: int
    seconds: float


class Cache:
    """The blocks cached under a cap of `capacity_blocks` blocks, all of one size. `policy` decides which blocks stay."""

    def __init__(self, policy: EvictionPolicy, history: History, capacity_blocks: int) -> None:
        self.policy, self.history, self.capacity_blocks = policy, history, capacity_blocks
        self.used_blocks = 0
        self.evictions = 0

    def request(self, keys: list[int], now_s: float, answer_tokens: int) -> int:
        """Fetch a chain, and store its missing blocks as far as there is room. Returns how many leading blocks hit."""
        hit = self.policy.leading(keys)
        if hit:
            self.history.seen(keys[:hit], None, now_s)
            self.policy.use(keys[:hit])
        if hit < len(keys):
            self._store(keys, hit, now_s)
        if keys:
            self.history.hint(keys[-1], now_s, answer_tokens=answer_tokens)
        return hit

    def _store(self, keys: list[int], resident: int, now_s: float) -> None:
        while resident < len(keys):
            missing = keys[resident:]
            lacking = len(missing) - (self.capacity_blocks - self.used_blocks)
            if lacking > 0:
                self._evict(self.policy.victims(lacking, set(keys[:resident]), now_s, incoming=missing))
            taken = missing[: self.capacity_blocks - self.used_blocks]
            if not taken:
                return
            parent = keys[resident - 1] if resident else None
            self.history.seen(taken, parent, now_s)
            self.policy.add(taken, parent, 1)
            self.used_blocks += len(taken)
            resident += len(taken)

    def _evict(self, victims: list[int]) -> None:
        for key in victims:
            self.policy.remove(key)
        self.used_blocks -= len(victims)
        self.evictions += len(victims)

    def check(self) -> None:
        """Assert that the cap holds and that the policy is consistent."""
        assert self.used_blocks == len(self.policy) <= self.capacity_blocks
        self.policy.check()


def capacity_in_blocks(trace: Trace, capacity: float) -> int:
    """Returns the number of blocks in a share of the trace's unique full blocks, rounded up, at least one."""
    return max(1, math.ceil(capacity * trace.unique_blocks - 1e-6))


def replay(trace: Trace, policy_name: str, capacity: float, *, cost_weight: float = 0.0, progress: Progress | None = None) -> Result:
    """Replay `trace` from a cold start under a cap of `capacity`, a share of its unique blocks.

    The policy `belady` is the offline optimum. `cost_weight`: see `create_policy`.
    """
    capacity_blocks = capacity_in_blocks(trace, capacity)
    if policy_name == "belady":
        from tiered_kv.tools.simulate.belady import BeladyCache

        return run(trace, BeladyCache(trace, capacity_blocks), policy_name, capacity, progress=progress)
    history = history_for(policy_name)
    policy = create_policy(policy_name, history, capacity_blocks, cost_weight=cost_weight, block_tokens=trace.block_tokens)
    return run(trace, Cache(policy, history, capacity_blocks), policy_name, capacity, progress=progress)


def history_for(policy_name: str) -> History:
    """Returns the history that the policy needs. Only `adaptive` learns from its history."""
    return policies.create_history() if policy_name == "adaptive" else History()


def replay_with(
    trace: Trace, policy: EvictionPolicy, history: History, capacity_blocks: int, *, progress: Progress | None = None
) -> Result:
    """Replay `trace` with a policy and a history that the caller created."""
    capacity = capacity_blocks / max(trace.unique_blocks, 1)
    return run(trace, Cache(policy, history, capacity_blocks), type(policy).__name__, capacity, progress=progress)


def run(trace: Trace, cache: Cache, name: str, capacity: float, *, progress: Progress | None = None) -> Result:
    """Send every request of `trace` through `cache`. Returns the counts."""
    begun_s = time.perf_counter()
    hits = send(trace, cache.request, progress)
    return Result(
        trace=trace.name,
        policy=name,
        capacity=capacity,
        capacity_blocks=cache.capacity_blocks,
        input_tokens=hits.input_tokens,
        hit_tokens=hits.hit_tokens,
        token_hit_ratio=hits.token_ratio,
        flops_saved_ratio=hits.flops_ratio,
        asked_blocks=len(trace.ids),
        hit_blocks=hits.blocks,
        evictions=cache.evictions,
        seconds=time.perf_counter() - begun_s,
    )


class Hits(NamedTuple):
    """The hits of a whole trace.

    token_ratio: share of all input tokens that hit. flops_ratio: share of the prefill FLOPs that the hits save.
    """

    blocks: int
    hit_tokens: int
    input_tokens: int
    token_ratio: float
    flops_ratio: float


def send(trace: Trace, request: Callable[[list[int], float, int], int], progress: Progress | None) -> Hits:
    """Call `request` for every request of `trace`. Returns the hits.

    `request` takes the keys, the time, and the number of answer tokens. It returns how many leading blocks hit.
    """
    blocks, hit_weight, weight = 0, 0.0, 0.0
    for at, each in enumerate(trace, 1):
        hit = request(each.keys, each.time_s, each.output_tokens)
        blocks += hit
        hit_weight += prefill_weight(hit * trace.block_tokens)
        weight += prefill_weight(each.input_tokens)
        if progress is not None and (at % PROGRESS_REQUESTS == 0 or at == len(trace)):
            progress((at - 1) % PROGRESS_REQUESTS + 1)
    hit_tokens, input_tokens = blocks * trace.block_tokens, int(trace.input_tokens.sum())
    return Hits(blocks, hit_tokens, input_tokens, hit_tokens / max(input_tokens, 1), hit_weight / max(weight, 1.0))


def prefill_weight(tokens: int) -> float:
    """Returns the cost of a prefill of a prompt's first `tokens` tokens, in units of the first token's cost."""
    return tokens + tokens * (tokens - 1) / 2 / FLOPS_POSITION_TOKENS
