"""Decides how many leading blocks of a chain to load, and how long to wait for them, when computing them may be faster.

Loading and computing follow each other: first the leading blocks are loaded, then the model computes the rest. So the best number of
blocks to load is one after which all further loads together would save no time.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from tiered_kv.blocks import Tier
from tiered_kv.client.load_costs import LoadCosts, LoadPart, label_of
from tiered_kv.client.prefill_cost import PrefillCost
from tiered_kv.client.reader import FoundBlock
from tiered_kv.keys import BlockKey

MUST_SAVE = 1.25
"""A load must be expected to be this many times faster than computing, because both estimates may be wrong."""
SLACK = 0.05
"""The part of the time to compute the prompt that a fetch may lose by waiting for a source about which nothing is known."""
SLACK_KNOWN = 0.15
"""The same for loads from sources that have been fast enough so far. It is larger, because what is left has to be computed after all."""
LATENESS = 1.5
"""A load from such a source may take this many times longer than expected, and the slack."""
SLOWER = "slower"
"""The reason for declined tokens: the load would have taken longer than computing them."""
LATE = "late"
"""The reason for declined tokens: their load took longer than expected, so the fetch no longer waited for it."""
MEASURING = "measuring"
"""The reason for declined tokens: nothing certain is known about the source, and an earlier load from it has not ended."""
SHARED = 2.0
"""While a load goes on for which no fetch waits any more, another one from its source is expected to take this many times longer."""
UNKNOWN = "unknown"
IN_MEMORY = ""
"""The source of blocks that need no decision."""

_SOURCES: dict[int, str] = {int(tier): tier.label if tier > Tier.HOST else IN_MEMORY for tier in Tier}


class Choice(NamedTuple):
    """The number of leading blocks to load, and the expected time by the label of the tier.

    `unknown`: the chosen sources whose time is not certain; it counts as 0 in `expected_s`. `declined`: the parts after the chosen
    blocks, and for each the reason.
    """

    blocks: int
    expected_s: dict[str, float]
    unknown: frozenset[str]
    declined: list[tuple[LoadPart, str]]


def parts_of(found: Sequence[FoundBlock]) -> list[LoadPart]:
    """Returns the parts of blocks that the index contains."""
    parts: list[LoadPart] = []
    start, tiers = 0, [each.slot.tier for each in found]
    for source, group in groupby(tiers, _SOURCES.__getitem__):
        end = start + len(list(group))
        nbytes = sum(each.slot.stored_bytes for each in found[start:end]) if source != IN_MEMORY else 0
        parts.append(LoadPart(source, end - start, nbytes))
        start = end
    return parts


def choose(parts: Sequence[LoadPart], cost: PrefillCost, block_tokens: int, costs: LoadCosts) -> Choice:
    """Returns which leading blocks to load. A source that is not known yet is chosen, unless a load from it is running for too long."""
    best = blocks = 0
    most = saved = 0.0
    rows = []
    for number, part in enumerate(parts):
        end = blocks + part.blocks
        compute_s = cost.seconds(blocks * block_tokens, end * block_tokens)
        load_s, reason = _load_s(part, costs, compute_s)
        saved += compute_s - MUST_SAVE * load_s
        rows.append((part, load_s, reason, end))
        blocks = end
        if saved >= most:
            best, most = number + 1, saved
    expected_s: dict[str, float] = {}
    for part, load_s, reason, _ in rows[:best]:
        if part.source != IN_MEMORY:
            label = label_of(part.source)
            expected_s[label] = expected_s.get(label, 0.0) + (0.0 if reason == UNKNOWN else load_s)
    unknown = frozenset(row[0].source for row in rows[:best] if row[2] == UNKNOWN)
    declined = [(part, reason if reason == MEASURING else SLOWER) for part, _, reason, _ in rows[best:]]
    return Choice(rows[best - 1][3] if best else 0, expected_s, unknown, declined)


def _load_s(part: LoadPart, costs: LoadCosts, compute_s: float) -> tuple[float, str]:
    """Returns the expected time of a load, and UNKNOWN or MEASURING if that is not certain. `compute_s`: the time to compute the part.

    Of a source whose latency and rate were not told apart, the larger estimate counts if even that is good enough, else the smaller one.
    """
    if part.source == IN_MEMORY:
        return 0.0, ""
    known, is_shared = costs.of(part.source), costs.is_measuring(part.source)
    if known is not None:
        most_s = known.seconds_at_most(part.nbytes) * (SHARED if is_shared else 1.0)
        if known.is_certain(part.nbytes) or MUST_SAVE * most_s <= compute_s:
            return most_s, ""
    if is_shared:
        return float("inf"), MEASURING
    return known.seconds(part.nbytes) if known is not None else 0.0, UNKNOWN


class Patience:
    """How long one fetch waits for blocks that it loads.

    It ends at the deadline, or earlier once two things are true: the load has taken all the time that was allowed for it, and the fetch
    has lost more than its slack, SLACK or SLACK_KNOWN of the time to compute the prompt. What it has lost is the time that has passed,
    less the time to compute the blocks that have arrived. So a load about which nothing is known can make a request slower by SLACK at
    most.
    """

    def __init__(self, cost: PrefillCost, block_tokens: int, first: int, deadline_s: float, slack_s: float) -> None:
        """`first`: the first block of the load. `slack_s`: the most time to lose."""
        self._cost = cost
        self._block_tokens = block_tokens
        self._first = first
        self._deadline_s = deadline_s
        self._begun_s: float | None = None
        self.slack_s = slack_s
        self.allowed_s = 0.0
        """How long the load may take, besides the slack; 0 if nothing is known."""
        self.was_late = False

    def is_over(self, now_s: float, arrived: int = 0) -> bool:
        """Returns whether to stop waiting. The wait begins with the first call. `arrived`: how many leading blocks have arrived."""
        if self._begun_s is None:
            self._begun_s = now_s
        if now_s >= self._deadline_s:
            return True
        took_s = now_s - self._begun_s
        if took_s <= self.allowed_s + self.slack_s:
            return False
        gained_s = self._cost.seconds(self._first * self._block_tokens, max(arrived, self._first) * self._block_tokens)
        self.was_late = took_s - gained_s > self.slack_s
        return self.was_late


class LoadPlan(NamedTuple):
    """What a fetch loads: the leading `keys`, and those `found` among them.

    `waits`, `reads`: the patience with the node's loads, and with reads from disk. `peers`: the parts that other nodes have; if it
    was not asked which blocks they have, a single one for all of them. `offered`: for each block that could be loaded, the label of
    its tier. `declined`: numbers of blocks by label and reason.
    """

    keys: list[BlockKey]
    found: list[FoundBlock]
    waits: Patience
    reads: Patience
    peers: tuple[LoadPart, ...]
    offered: list[str]
    declined: Counter[tuple[str, str]]
