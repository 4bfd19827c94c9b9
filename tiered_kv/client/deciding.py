"""A client that loads from slow tiers and from other nodes only what its model would not compute faster.

Nothing here happens in a fetch whose blocks are all in this machine's memory, or before the rate of the model is known.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from itertools import takewhile
from typing import Any

import torch

from tiered_kv.blocks import PEER, Tier
from tiered_kv.client.access import NodeAccess
from tiered_kv.client.base import ALL_PEERS, LABELS, question_s
from tiered_kv.client.calls import Names
from tiered_kv.client.explaining.explaining_client import ExplainingClient
from tiered_kv.client.load_costs import LoadPart, label_of, peer_source
from tiered_kv.client.load_plan import IN_MEMORY, LATE, LATENESS, SLACK, SLACK_KNOWN, SLOWER, Choice, LoadPlan, Patience, choose, parts_of
from tiered_kv.client.prefill_cost import PrefillCost
from tiered_kv.client.reader import BlockSource, DiskMeter, FoundBlock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.messages import BlockRun

LOOK_AGAIN_S = 0.0005
ANSWER_WITHIN_S = 0.02
ANSWER_S = 0.001
"""The time of such a question while it is not known."""
ASK_AGAIN_S = 0.25
"""How often the directory is asked in the background while requests are too short to wait for it."""
DIRECTORY = "directory"
"""The source whose loads are the questions which nodes have some blocks."""
FAST = 4.0
"""If even the slowest known peer is this many times faster than computing, a fetch does not ask first which peers have the blocks."""

_IN_MEMORY_TIERS = frozenset(map(int, (Tier.DEVICE, Tier.HOST)))


class DecidingClient(ExplainingClient):
    """Adds to `ExplainingClient` the choice between loading blocks and computing them."""

    @property
    def is_measuring(self) -> bool:
        """Whether a load is running for which no fetch waits any more, because it was slow, or because it only measures a source."""
        return self._costs.is_busy

    def _planned(
        self,
        access: NodeAccess,
        names: Names,
        keys: list[BlockKey],
        found: list[FoundBlock],
        tiers: set[int],
        tokens_per_s: float | None,
        deadline_s: float,
    ) -> LoadPlan | None:
        """Returns what a fetch should load. None: everything, because nothing is known about computing, or all blocks are in memory.

        `tiers`: those of the `found` blocks.
        """
        if tokens_per_s is None and len(found) == len(keys) and tiers <= _IN_MEMORY_TIERS:
            return None
        cost = self._prefills.cost if tokens_per_s is None else cost_of(tokens_per_s)
        rest = keys[len(found) :] if len(found) < len(keys) and access.source.peers else []
        if cost is None or (tiers <= _IN_MEMORY_TIERS and not rest):
            return None
        parts = parts_of(found)
        patience = _Patiences(cost, self.layout.block_tokens, parts, len(keys), deadline_s)
        choice = self._chosen(parts, cost)
        peers: tuple[LoadPart, ...] = ()
        if rest and choice.blocks == len(found) and (peers_s := self._fast_peers_s(cost, len(found), len(rest))) is not None:
            return patience.plan(keys, found, choice, (ALL_PEERS,), peers_s)
        if rest:
            peers = self._holders(access, names, keys, len(found), patience.waits, deadline_s)
            choice = self._chosen([*parts, *peers], cost)
            if len(found) < choice.blocks and self._costs.of(source := peers[0].source) is None:
                choice = self._explored(access, names, keys, found, patience, [*parts, *peers], source, deadline_s)
        self._probe(access, names, keys, found, choice)
        return patience.plan(keys, found, choice, peers)

    def _chosen(self, parts: Sequence[LoadPart], cost: PrefillCost) -> Choice:
        return choose(parts, cost, self.layout.block_tokens, self._costs)

    def _fast_peers_s(self, cost: PrefillCost, start: int, blocks: int) -> float | None:
        """Returns the time in which the slowest known peer would send `blocks`, if that is much less than computing one or all of them."""
        t, nbytes = self.layout.block_tokens, self.layout.block_bytes
        one_s, all_s = self._costs.peers_seconds(nbytes), self._costs.peers_seconds(blocks * nbytes)
        if one_s is None or all_s is None or one_s * FAST > cost.seconds(start * t, (start + 1) * t):
            return None
        return all_s if all_s * FAST <= cost.seconds(start * t, (start + blocks) * t) else None

    def _holders(
        self, access: NodeAccess, names: Names, keys: list[BlockKey], start: int, patience: Patience, deadline_s: float
    ) -> tuple[LoadPart, ...]:
        """Returns the parts that other nodes have, from block `start` on. Each is as long as possible, as the node will request them.

        Does not ask if the answer would take a large part of the time to compute the blocks.
        """
        if (self._costs.seconds(DIRECTORY, 1) or ANSWER_S) > patience.slack_s:
            if self._costs.may_probe(DIRECTORY, ASK_AGAIN_S):
                self._pulls.submit(self._explore_alone, access, names, self._run_of(names, keys, start, 1))
            return ()
        asking = self._pulls.submit(self._ask_holders, access, keys[start:], max(deadline_s - self._clock.now_s(), 0.0))
        holders = asking.result() if self._in_time(asking, patience, lambda: 0, [DIRECTORY]) else []
        parts, start = [], 0
        while start < len(holders):
            stops = {node: next((n for n in range(start, len(holders)) if node not in holders[n]), len(holders)) for node in holders[start]}
            best = max(stops, key=lambda node: stops[node])
            parts.append(LoadPart(peer_source(best), stops[best] - start, (stops[best] - start) * self.layout.block_bytes))
            start = stops[best]
        return tuple(parts)

    def _ask_holders(self, access: NodeAccess, keys: list[BlockKey], wait_s: float) -> list[list[str]]:
        begun_s = self._clock.now_s()
        holders = self._locate(access, keys, wait_s)
        self._costs.note(DIRECTORY, 1, self._clock.now_s() - begun_s)
        return holders

    def _explored(
        self,
        access: NodeAccess,
        names: Names,
        keys: list[BlockKey],
        found: list[FoundBlock],
        patience: "_Patiences",
        parts: list[LoadPart],
        source: str,
        deadline_s: float,
    ) -> Choice:
        """Pull one block from a peer about which nothing is known, and choose again with what that showed."""
        run, patience.has_explored = self._run_of(names, keys, len(found), 1), True
        pulling = self._pulls.submit(self._pull, access, names, run, deadline_s, (LoadPart(source, 1, run.nbytes),))
        self._in_time(pulling, patience.waits, lambda: len(found) + len(access.source.find(run.keys)), [source])
        return self._chosen(parts, patience.cost)

    def _explore_alone(self, access: NodeAccess, names: Names, run: BlockRun) -> None:
        """Ask who has a block, and pull it from an unknown peer, so that requests which cannot wait for that know both."""
        holders = self._ask_holders(access, run.keys, question_s(access))
        if holders and self._costs.of(peer_source(holders[0][0])) is None:
            part = LoadPart(peer_source(holders[0][0]), 1, run.nbytes)
            self._pull(access, names, run, self._clock.now_s() + access.deadline_s, (part,))

    def _run_of(self, names: Names, keys: list[BlockKey], start: int, blocks: int) -> BlockRun:
        parent = keys[start - 1] if start else None
        return BlockRun(names.root, self.layout.block_bytes, parent, keys[start : start + blocks], start)

    def _probe(self, access: NodeAccess, names: Names, keys: list[BlockKey], found: list[FoundBlock], choice: Choice) -> None:
        """Load the first declined block in a thread now and then, so that a source which is fast again is noticed."""
        part, reason = choice.declined[0] if choice.declined else (None, "")
        if part is None or reason != SLOWER or part.source == IN_MEMORY or not self._costs.may_probe(part.source):
            return
        at, until_s = choice.blocks, self._clock.now_s() + access.deadline_s
        if at > len(found):
            return  # its parent is not here yet
        self._costs.begin_measuring(part.source)
        if at == len(found):
            probing: Future[Any] = self._pulls.submit(
                self._pull, access, names, self._run_of(names, keys, at, 1), until_s, (LoadPart(part.source, 1, self.layout.block_bytes),)
            )
        elif part.source == LABELS[Tier.DISK]:
            probing = self._pulls.submit(self._probe_disk, access.source, found[at], until_s)
        else:
            probing = self._pulls.submit(self._bring, access, keys[at : at + 1], found[at : at + 1], keys[at : at + 1], until_s)
        probing.add_done_callback(lambda _: self._costs.end_measuring(part.source))

    def _probe_disk(self, source: BlockSource, found: FoundBlock, until_s: float) -> None:
        kv = torch.empty(self.layout.kv_shape(self.layout.block_tokens), dtype=self.layout.torch_dtype)
        source.read([found], kv, lambda: self._clock.now_s() >= until_s, self._meter(None))

    # Waiting

    def _in_time(self, loading: "Future[Any]", patience: Patience, arrived: Callable[[], int], sources: Sequence[str]) -> bool:
        """Wait for a load while that pays. Returns whether it has ended. If not, it goes on, and its time is still recorded."""
        while not loading.done():
            if patience.is_over(self._clock.now_s(), arrived()):
                self._go_on_without(loading, sources)
                return False
            wait([loading], LOOK_AGAIN_S)
        return True

    def _go_on_without(self, loading: "Future[Any]", sources: Sequence[str]) -> None:
        self._costs.begin_measuring(*sources)
        loading.add_done_callback(lambda _: self._costs.end_measuring(*sources))

    def _leave(self, pulling: "Future[list[FoundBlock]]", plan: LoadPlan) -> None:
        """Stop waiting for a pull."""
        self._go_on_without(pulling, [part.source for part in plan.peers])

    def _bring_in_time(
        self,
        access: NodeAccess,
        keys: list[BlockKey],
        found: list[FoundBlock],
        hidden: list[BlockKey],
        deadline_s: float,
        plan: LoadPlan | None,
    ) -> list[FoundBlock]:
        """Have the node load the `hidden` blocks. Returns the leading blocks of `keys` that are then readable."""
        if plan is None:
            return self._bring(access, keys, found, hidden, deadline_s)
        source = access.source

        def readable() -> list[FoundBlock]:
            present = source.find(keys)
            still = set(source.hidden(present))
            return present[: next((count for count, each in enumerate(present) if each.key in still), len(present))]

        loading = self._pulls.submit(self._bring, access, keys, found, hidden, deadline_s)
        labels = {LABELS[each.slot.tier] for each in found if each.slot.tier > Tier.DISK}
        if self._in_time(loading, plan.waits, lambda: len(readable()), sorted(labels)):
            return access.source.find(keys)
        return readable()

    def _pulled_in_time(self, access: NodeAccess, names: Names, run: BlockRun, plan: LoadPlan, deadline_s: float) -> list[FoundBlock]:
        """Pull blocks from other nodes. Returns the leading ones that have arrived when that ends or takes too long."""
        pulling = self._pulls.submit(self._pull, access, names, run, deadline_s, plan.peers)
        sources = [part.source for part in plan.peers]
        find = access.source.find
        if self._in_time(pulling, plan.waits, lambda: run.depth + len(find(run.keys)), sources):
            return pulling.result()
        return find(run.keys)

    def _meter(self, plan: LoadPlan | None) -> DiskMeter:
        """Returns the meter of a fetch's reads from disk."""
        disk = LABELS[Tier.DISK]

        def note(read: int, wanted: int, seconds: float) -> None:
            if read:
                self._costs.note(disk, read, seconds)
            else:
                self._costs.note_silence(disk, wanted, seconds)

        now_s = self._clock.now_s
        return DiskMeter(lambda: plan is not None and plan.reads.is_over(now_s()), now_s, note)

    # Results

    def _note_declined(self, access: NodeAccess, plan: LoadPlan, found: list[FoundBlock], read: int) -> dict[str, int]:
        """Count what a fetch did not load. Returns the tokens by tier and reason.

        `found`: the blocks that this node had; those not loaded count as used, so that the node moves them to faster tiers.
        """
        declined, source = plan.declined, access.source
        if plan.waits.was_late or plan.reads.was_late:
            offered = [LABELS[each.slot.tier] for each in plan.found] + [PEER] * (plan.peer_blocks + self._elsewhere(access, plan))
            declined.update((label, LATE) for label in offered[read:])
        source.touch(found[min(read + 1, len(plan.found)) :])
        tokens = {key: blocks * self.layout.block_tokens for key, blocks in declined.items()}
        for (label, reason), count in tokens.items():
            self._count_declined(source, label, reason, count)
        return {f"{label}: {reason}": count for (label, reason), count in tokens.items()}

    def _count_declined(self, source: BlockSource, label: str, reason: str, tokens: int) -> None:
        self._count(**{"declined_tokens": tokens, f"declined_tokens_{label}_{reason}": tokens})
        source.tally_declined(label, tokens)

    def _elsewhere(self, access: NodeAccess, plan: LoadPlan) -> int:
        """Returns how many blocks of a late fetch other nodes have, if it did not ask that before; 0 without a prompt answer."""
        rest = plan.keys[len(plan.found) + plan.peer_blocks :]
        if not rest:
            return 0
        asking = self._pulls.submit(self._ask_holders, access, rest, question_s(access))
        wait([asking], ANSWER_WITHIN_S)
        return len(asking.result()) if asking.done() else 0

    def _locate(self, access: NodeAccess, keys: list[BlockKey], wait_s: float | None = None) -> list[list[str]]:
        """Returns the names of the other nodes that hold each leading key; an empty list if this node does not answer."""
        wait_s, no_nodes = question_s(access) if wait_s is None else min(wait_s, question_s(access)), list[list[str]]()
        return self._ask(access, lambda session: session.locate(keys, wait_s), no_nodes, wait_s)


class _Patiences:
    """The patience of one fetch with the node's loads and with reads from disk, and the plan that it makes."""

    def __init__(self, cost: PrefillCost, block_tokens: int, parts: Sequence[LoadPart], end: int, deadline_s: float) -> None:
        """`parts`: of the blocks that this node has. `end`: the number of the prompt's blocks."""
        self.cost = cost
        in_memory = parts[0].blocks if parts and parts[0].source == IN_MEMORY else 0
        self._prompt_s = cost.seconds(in_memory * block_tokens, end * block_tokens)
        self.has_explored = False
        slack_s = SLACK * self._prompt_s
        readable = sum(each.blocks for each in takewhile(lambda each: each.source in (IN_MEMORY, LABELS[Tier.DISK]), parts))
        self.waits = Patience(cost, block_tokens, readable, deadline_s, slack_s)
        self._reads = Patience(cost, block_tokens, in_memory, deadline_s, slack_s)

    def plan(
        self, keys: list[BlockKey], found: list[FoundBlock], choice: Choice, peers: tuple[LoadPart, ...], peers_s: float = 0.0
    ) -> LoadPlan:
        """Returns the plan of a choice. `peers_s`: the expected time of a load from peers that the choice does not include."""
        disk_s = choice.expected_s.get(LABELS[Tier.DISK], 0.0)
        waits_s = sum(choice.expected_s.values()) - disk_s + peers_s
        self.waits.allowed_s, self._reads.allowed_s = LATENESS * waits_s, LATENESS * disk_s
        known = not choice.unknown and not self.has_explored
        both = disk_s > 0 and waits_s > 0
        self.waits.slack_s = self._reads.slack_s = (SLACK_KNOWN if known else SLACK) * self._prompt_s / (2 if both else 1)
        declined = Counter[tuple[str, str]]()
        label = ""
        for part, reason in choice.declined:  # the first of them is never in memory
            label = label_of(part.source) or label
            declined[label, reason] += part.blocks
        keys = keys if peers == (ALL_PEERS,) else keys[: choice.blocks]
        return LoadPlan(keys, found[: choice.blocks], self.waits, self._reads, peers, max(choice.blocks - len(found), 0), declined)


def cost_of(tokens_per_s: float) -> PrefillCost | None:
    """Returns the cost of a prefill at a rate that the caller gave; None for the rate 0. Raises (kind `config`) if it is not a rate."""
    is_rate = isinstance(tokens_per_s, int | float) and not isinstance(tokens_per_s, bool) and 0 <= tokens_per_s < float("inf")
    if not is_rate:
        message = f"recompute_tokens_per_s: must be a number of tokens a second, or 0 to load everything, got {tokens_per_s!r}"
        raise TieredKVError(Kind.CONFIG, message, setting="recompute_tokens_per_s")
    return PrefillCost(1 / tokens_per_s) if tokens_per_s else None
