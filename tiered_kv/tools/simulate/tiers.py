"""Simulates several tiers: a trace drives the store's own state machine. Copies between tiers take no time.

All blocks have one byte, so that caps count blocks. This module does the engine's and the log tiers' part in the simplest form:
it asks the machine for room, and fills and reclaims segments. Without lower tiers it hits the same blocks as `Cache`.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tiered_kv.blocks import Hint, Location, Tier
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.policy import create_policy
from tiered_kv.store import events as ev
from tiered_kv.store.machine import StoreMachine
from tiered_kv.store.movement import REINSERT_SHARE
from tiered_kv.tools.simulate.replay import Progress, capacity_in_blocks, history_for, send
from tiered_kv.tools.simulate.trace import Trace

NAMES = {"hot": Tier.DEVICE, "warm": Tier.HOST, "cold": Tier.OBJECTS} | {tier.label: tier for tier in Tier if tier is not Tier.CHECKPOINT}
IN_MEMORY = (Tier.DEVICE, Tier.HOST)
SEGMENTS = 64
"""Number of segments in a full lower tier."""
SEGMENTS_AHEAD = 2
"""A segment is copied to the next tier when at most this many other segments remain until it must be reclaimed."""


@dataclass(frozen=True, slots=True)
class TiersResult:
    """The result of one policy on one trace. Ratios by tier are shares of all input tokens. Writes are blocks per request.

    `write_amplification`: for each lower tier, blocks written divided by blocks that were new to the tier.
    """

    trace: str
    policy: str
    capacity: float
    tiers: dict[str, float]
    input_tokens: int
    hit_tokens: int
    token_hit_ratio: float
    flops_saved_ratio: float
    hit_ratio_by_tier: dict[str, float]
    writes_per_request: dict[str, float]
    write_amplification: dict[str, float]
    counts: dict[str, int]
    seconds: float


def tiers_of(text: str) -> dict[Tier, float]:
    """Parse `hot=0.1,warm=0.3,disk=1`: shares of the trace's unique blocks by tier. Raises (kind `config`) for invalid text."""
    found: dict[Tier, float] = {}
    for part in text.split(","):
        name, _, share = (each.strip() for each in part.partition("="))
        try:
            capacity = float(share)
        except ValueError:
            capacity = 0.0
        if name not in NAMES or NAMES[name] in found or not 0 < capacity <= 1:
            known = ", ".join(NAMES)
            form = f"NAME=SHARE with each tier once, NAME one of {known}, SHARE above 0 and at most 1"
            raise _invalid_tiers(f"{part.strip()!r} is invalid; expected {form}")
        found[NAMES[name]] = capacity
    if Tier.HOST not in found:
        raise _invalid_tiers(f"warm=SHARE must be given (host memory, where every block arrives), got {text!r}")
    return dict(sorted(found.items()))


def _invalid_tiers(message: str) -> TieredKVError:
    return TieredKVError(Kind.CONFIG, f"--tiers: {message}", setting="tiers")


class Log:
    """A lower tier: a log of segments. Blocks are appended one by one, and removed only together with their whole segment."""

    def __init__(self, tier: Tier, capacity: int) -> None:
        self.tier, self.capacity = tier, capacity
        self.segment_blocks = max(1, capacity // SEGMENTS)
        self.written = 0
        self._segments: dict[int, list[int]] = {0: []}
        self._newest = 0
        self._used = 0
        self._aged = -1

    def append(self, key: int) -> Location:
        """Append one block. There must be room for it."""
        if len(self._segments[self._newest]) == self.segment_blocks:
            self._newest += 1
            self._segments[self._newest] = []
        self._segments[self._newest].append(key)
        self._used += 1
        self.written += 1
        return Location(self.tier, 0, self._newest, 0, 1, 1)

    def segment_to_go(self) -> int | None:
        """Returns the number of the oldest segment if it must be reclaimed because the tier is full, else None."""
        return min(self._segments) if self._used == self.capacity else None

    def segment_to_age(self) -> int | None:
        """Returns the number of the oldest segment if it must be reclaimed soon, else None. Returns each segment only once."""
        oldest = min(self._segments)
        if self._used + SEGMENTS_AHEAD * self.segment_blocks <= self.capacity or self._aged >= oldest or oldest == self._newest:
            return None
        self._aged = oldest
        return oldest

    def remove(self, segment: int) -> list[int]:
        """Remove a segment. Returns all keys that were ever written to it."""
        keys = self._segments.pop(segment)
        self._used -= len(keys)
        if segment == self._newest:
            self._newest += 1
            self._segments[self._newest] = []
        return keys

    def keys_in(self, segment: int) -> list[int]:
        """Returns all keys that were ever written to a segment."""
        return list(self._segments[segment])

    def check(self) -> None:
        """Assert that the cap holds."""
        assert self._used == sum(map(len, self._segments.values())) <= self.capacity


class TieredCache:
    """A node's store, simulated in one thread. It takes requests and counts hits by tier."""

    def __init__(self, policy_name: str, capacities: Mapping[Tier, int], *, cost_weight: float = 0.0, block_tokens: int = 0) -> None:
        history = history_for(policy_name)
        in_memory = {
            tier: create_policy(policy_name, history, cap, cost_weight=cost_weight, block_tokens=block_tokens)
            for tier, cap in capacities.items()
            if tier in IN_MEMORY
        }
        self.machine = StoreMachine(capacities, in_memory, history)
        self.hits: Counter[Tier] = Counter()
        self.writes: Counter[Tier] = Counter()
        self.logs = {tier: Log(tier, cap) for tier, cap in capacities.items() if tier not in IN_MEMORY}
        self._capacities = dict(capacities)
        self._now_s = 0.0

    def request(self, keys: list[int], now_s: float, answer_tokens: int) -> int:
        """Fetch a chain, and store its missing blocks as far as there is room. Returns how many leading blocks hit."""
        self._now_s, blocks = now_s, self.machine.blocks
        hit = next((at for at, key in enumerate(keys) if key not in blocks), len(keys))
        self.hits.update(min(blocks[key].copies) for key in keys[:hit])
        if hit:
            self._handle(ev.Used(keys[:hit], now_s))
        self._store(keys, hit)
        if keys:
            self._handle(ev.Hinted(keys[-1], Hint(answer_tokens=answer_tokens), now_s))
        return hit

    def _store(self, keys: list[int], present: int) -> None:
        while present < len(keys):
            missing, parent = keys[present:], keys[present - 1] if present else None
            taken = missing[: self._room(Tier.HOST, missing, parent)]
            if not taken:
                return
            self._handle(ev.Committed(b"", parent, taken, [_in_memory(Tier.HOST)] * len(taken), self._now_s, present))
            self.writes[Tier.HOST] += len(taken)
            present += len(taken)

    def _room(self, tier: Tier, keys: Sequence[int], last_block: int | None) -> int:
        """Make room for `keys` in a memory tier. Returns how many more blocks fit into the tier afterwards, perhaps fewer than `keys`."""
        lacking = len(keys) - self._free(tier)
        if lacking > 0:
            self._handle(ev.Needed(tier, lacking, last_block, keys, self._now_s))
        return self._free(tier)

    def _free(self, tier: Tier) -> int:
        return self._capacities[tier] - self.machine.bytes_by_tier[tier]

    def _handle(self, event: ev.Event) -> None:
        ways: dict[tuple[Tier, Tier], list[ev.Copy]] = {}
        for instruction in self.machine.handle(event):
            if isinstance(instruction, ev.Copy):
                ways.setdefault((instruction.source.tier, instruction.target), []).append(instruction)
        for (_, target), copies in ways.items():
            if target in IN_MEMORY:
                self._fill(target, copies)
            else:
                self._append(self.logs[target], copies)

    def _fill(self, target: Tier, copies: list[ev.Copy]) -> None:
        while copies:
            taken = copies[: self._room(target, [copy.key for copy in copies], copies[-1].key)]
            if not taken:
                for copy in copies:
                    self._handle(ev.CopyFailed(copy.key, target))
                return
            for copy in reversed(taken):  # the deepest block first, because it is evicted first
                self.writes[target] += 1
                self._handle(ev.Copied(copy.key, _in_memory(target)))
            copies = copies[len(taken) :]

    def _append(self, lower: Log, copies: list[ev.Copy]) -> None:
        for copy in copies:
            while (segment := lower.segment_to_go()) is not None:
                self._reclaim(lower, segment)
            self.writes[lower.tier] += 1
            self._handle(ev.Copied(copy.key, lower.append(copy.key)))
            if Tier.OBJECTS in self.logs and lower.tier is Tier.DISK and (segment := lower.segment_to_age()) is not None:
                self._handle(ev.Aging(lower.tier, segment, lower.keys_in(segment)))

    def _reclaim(self, lower: Log, segment: int) -> None:
        keys = lower.remove(segment)
        for key in self.machine.wanted_in(lower.tier, segment, keys, REINSERT_SHARE * lower.segment_blocks):
            self._handle(ev.Moved(key, segment, lower.append(key)))
        self._handle(ev.Emptied(lower.tier, segment, keys))

    def check(self) -> None:
        """Assert that every cap holds and that the machine is consistent."""
        self.machine.check()
        for lower in self.logs.values():
            lower.check()


def _in_memory(tier: Tier) -> Location:
    return Location(tier, 0, 0, 0, 1, 1)


def replay_tiers(
    trace: Trace, policy_name: str, shares: Mapping[Tier, float], *, cost_weight: float = 0.0, progress: Progress | None = None
) -> TiersResult:
    """Replay `trace` from a cold start through several tiers. `shares`: each tier's cap as a share of the trace's unique full blocks."""
    begun_s = time.perf_counter()
    capacities = {tier: capacity_in_blocks(trace, share) for tier, share in shares.items()}
    cache = TieredCache(policy_name, capacities, cost_weight=cost_weight, block_tokens=trace.block_tokens)
    hits = send(trace, cache.request, progress)
    return TiersResult(
        trace=trace.name,
        policy=policy_name,
        capacity=sum(shares.values()),
        tiers={tier.label: share for tier, share in shares.items()},
        input_tokens=hits.input_tokens,
        hit_tokens=hits.hit_tokens,
        token_hit_ratio=hits.token_ratio,
        flops_saved_ratio=hits.flops_ratio,
        hit_ratio_by_tier={tier.label: cache.hits[tier] * trace.block_tokens / max(hits.input_tokens, 1) for tier in shares},
        writes_per_request={
            tier.label: (cache.logs[tier].written if tier in cache.logs else cache.writes[tier]) / len(trace) for tier in shares
        },
        write_amplification={tier.label: lower.written / max(cache.writes[tier], 1) for tier, lower in cache.logs.items()},
        counts=dict(cache.machine.counts),
        seconds=time.perf_counter() - begun_s,
    )
