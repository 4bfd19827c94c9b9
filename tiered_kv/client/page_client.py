"""The client of an engine that manages pages itself: it loads and stores opaque blocks under keys that the engine gives.

Bytes travel straight between the engine's pages and the node's memory. As with `Client`, no fault of the cache raises an exception:
a load ends early, and a store is refused.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import torch

from tiered_kv.blocks import PEER, Explained, Stored, Tier
from tiered_kv.client.access import NodeAccess
from tiered_kv.client.base import LABELS, question_s
from tiered_kv.client.calls import Names, while_open
from tiered_kv.client.deciding import DecidingClient, cost_of
from tiered_kv.client.load_costs import LoadPart
from tiered_kv.client.load_plan import IN_MEMORY, SLOWER, Choice, choose
from tiered_kv.client.page_copy import Pages
from tiered_kv.client.prefill_cost import PrefillCost
from tiered_kv.client.reader import FoundBlock
from tiered_kv.keys import BlockKey, Namespace
from tiered_kv.protocol.messages import BlockRun, PackedBlock
from tiered_kv.protocol.session import Session

ANSWER_WITHIN_S = 0.25
"""How much longer than its wait for room a store waits for a slow node's answer. Afterwards the node counts as silent for a while."""
STAGED_BYTES_MAX = 32 << 20
"""The most memory for blocks that are decoded or read from disk before they are copied to pages. One block may always use more."""


class Chain(NamedTuple):
    """Consecutive blocks of one prompt.

    `parent`: the key of the block before them, None at the start of the prompt. `depth`: how many blocks are before them. `root`: the
    client's root for which the keys were made, None if the keys do not depend on it. If the client's root has changed since, because
    a weight epoch was raised, the blocks are misses.
    """

    keys: list[BlockKey]
    parent: BlockKey | None = None
    depth: int = 0
    root: BlockKey | None = None

    def part(self, start: int, end: int | None = None) -> "Chain":
        """Returns the part of this chain from block `start` up to, and without, block `end`."""
        return Chain(self.keys[start:end], self.keys[start - 1] if start else self.parent, self.depth + start, self.root)


class Look(NamedTuple):
    """The result of a look-up: the tier of each leading block that the node has.

    `at_once`: how many leading blocks can be loaded without waiting, because they are uncompressed in host memory.
    """

    tiers: list[str]
    at_once: int


class Loaded(NamedTuple):
    """The result of a load: how many leading blocks of a chain were copied to the engine's pages, in total and by tier."""

    blocks: int
    blocks_by_tier: dict[str, int]


class Estimates(NamedTuple):
    """The measurements of a client: the cost of a prefill (None: not known), and by source the latency and the seconds per byte."""

    prefill: PrefillCost | None
    loads: dict[str, tuple[float, float]]


class PageClient(DecidingClient):
    """Loads and stores blocks of one `OpaqueLayout`. Safe to use from several threads."""

    @while_open
    def look(self, keys: Sequence[BlockKey]) -> Look:
        """Returns the tier of each leading block that this node has. Reads shared memory only, in about 0.7 µs a block."""
        found = self._holder.take().source.find(keys)  # a client that only looks up must notice that the node was replaced
        at_once = next((count for count, each in enumerate(found) if not _is_raw_in_host(each)), len(found))
        return Look([LABELS[slot.tier] for _, slot in found], at_once)

    @while_open
    def explain(self, keys: Sequence[BlockKey]) -> list[Explained]:
        """Returns a record of each block of a chain: its tier, or the reason why it would be a miss (docs/explain.md).

        The engine made the keys, so namespaces are not compared. Waits at most QUESTION_S_MAX for the node. Counts as no use.
        """
        self._check_open()
        access, names = self._present()
        return self._finding(access, names, keys, self._clock.now_s() + question_s(access)).records()

    @property
    def deadline_s(self) -> float:
        """The cluster's setting `fetch_deadline_ms`, in seconds."""
        return self._holder.present.deadline_s

    @property
    def root(self) -> BlockKey:
        """The present root of this client's blocks. It changes when a weight epoch is raised. Calls no other process."""
        return self._present()[1].root

    @property
    def weight_epoch(self) -> int:
        """The present weight epoch of this client's namespace. Calls no other process."""
        return self._present()[1].namespace.weight_epoch

    def filled(self, namespace: Namespace) -> Namespace:
        """Returns another rank's namespace with the salt and the weight epoch of this client's. Calls no other process."""
        ours = self._present()[1].namespace
        return replace(namespace, salt=ours.salt, weight_epoch=ours.weight_epoch)

    @property
    def has_peers(self) -> bool:
        """Whether there are other live nodes, which may have blocks that this node lacks."""
        return bool(self._source.peers)

    @while_open
    def locate(self, keys: list[BlockKey]) -> int:
        """Returns how many of the leading keys other nodes hold; 0 if this node does not answer. Waits for the coordinator."""
        access = self._holder.take()
        if not keys or not access.source.peers:
            return 0
        wait_s, no_nodes = question_s(access), list[list[str]]()
        return len(self._ask(access, lambda session: session.locate(keys, wait_s), no_nodes, wait_s))

    @while_open
    def hold(self, key: BlockKey, seconds: float) -> None:
        """Keep a block and its ancestors from eviction for some seconds. One call of about 50 µs."""
        access = self._holder.take()
        self._ask(access, lambda session: session.hint(key, None, seconds, None, False), None, question_s(access))

    @while_open
    def load(self, chain: Chain, pages: Pages, blocks: Sequence[int], *, deadline_s: float | None = None, may_call: bool = True) -> Loaded:
        """Copy the chain's blocks to the pages of the engine's blocks with the numbers `blocks`, until one cannot be read in time.

        The content of the pages from that block on is undefined. `deadline_s`: seconds from now (default: the cluster's setting
        `fetch_deadline_ms`). Without `may_call`, only blocks that this process can read itself are loaded.
        """
        begun_s = self._clock.now_s()
        access, names = self._present()
        until_s = begun_s + (access.deadline_s if deadline_s is None else deadline_s)
        keys, source = list(chain.keys) if chain.root in (None, names.root) else [], access.source
        found = first_found = source.find(keys)
        if may_call:
            if hidden := source.hidden(found):
                found = self._bring(access, keys, found, hidden, until_s)
            local = len(found)
            if local < len(keys) and source.peers:
                rest = chain.part(local)
                run = BlockRun(names.root, self.layout.block_bytes, rest.parent, rest.keys, rest.depth)
                found = found + self._pull(access, names, run, until_s)
        else:
            local = len(found)
        read = self._fill(access, found, pages, blocks, until_s)
        self._report_damage(access, until_s)
        source.touch(found[: min(read + 1, local)])
        by_tier: dict[str, int] = {}
        for each in [*first_found, *found[len(first_found) : local]][:read]:  # the tiers before this load moved any block
            by_tier[LABELS[each.slot.tier]] = by_tier.get(LABELS[each.slot.tier], 0) + 1
        if read > local:
            by_tier[PEER] = read - local
        if not self._is_current(access, names):
            read, by_tier = 0, {}
        self._note_fetch(source, names, len(keys), by_tier, begun_s)
        self._note_misses(keys, read, until_s)
        return Loaded(read, by_tier)

    @while_open
    def store(self, chain: Chain, pages: Pages, blocks: Sequence[int], *, wait_s: float | None = None) -> Stored:
        """Store the chain's blocks from the pages of the engine's blocks with the numbers `blocks`. They are visible when this returns.

        `wait_s` bounds the wait for room (default: the setting `store_wait_ms`). Blocks that get no room are `refused`.
        """
        self._check_open()
        access, names = self._present()
        if chain.root not in (None, names.root):
            return Stored(0, 0, len(chain.keys))
        begun_s = self._clock.now_s()
        until_s = begun_s + (access.store_wait_s if wait_s is None else wait_s)
        keys = list(chain.keys)
        missing = [number for number, slot in enumerate(access.source.lookup_all(keys)) if slot is None]
        present = len(keys) - len(missing)

        def write(session: Session, missing: list[int], wait_s: float) -> tuple[int, int]:
            return self._write(access, session, names, chain, missing, pages, blocks, wait_s)

        stored = self._store_missing(access, names, missing, until_s, write, ANSWER_WITHIN_S)
        present += stored.present
        counts = {"stores": 1, "new_blocks": stored.new, "present_blocks": present, "refused_blocks": stored.refused}
        self._note(access.source, names, counts, store_s=self._clock.now_s() - begun_s)
        return Stored(stored.new, present, stored.refused)

    def worth_loading(self, tiers: Sequence[str], depth: int, tokens_per_s: float = 0.0) -> int:
        """Returns how many leading blocks of a chain to load, because computing them takes longer. Calls no other process.

        `tiers`: the tier of each block, PEER for other nodes. `depth`: the number of their ancestors. `tokens_per_s`: how fast the
        engine computes a prompt; 0: as `note_prefill` recorded it. Now and then one block more is worth loading, to measure its tier.
        """
        cost = cost_of(tokens_per_s) if tokens_per_s else self._prefills.cost
        if cost is None or _are_in_memory(tiers):
            return len(tiers)
        choice = self._choice_of(tiers, depth, cost)
        if choice.declined and self._costs.may_probe(choice.declined[0][0].source):
            return choice.blocks + 1
        return choice.blocks

    def _choice_of(self, tiers: Sequence[str], depth: int, cost: PrefillCost) -> Choice:
        parts = []
        for label, group in groupby(tiers, lambda tier: IN_MEMORY if tier in _IN_MEMORY else tier):
            blocks = len(list(group))
            parts.append(LoadPart(label, blocks, blocks * self.layout.block_bytes))
        here = PrefillCost(cost.token_s + cost.position_s * depth * self.layout.block_tokens, cost.position_s)
        return choose(parts, here, self.layout.block_tokens, self._costs)

    def declined(self, tiers: Sequence[str]) -> None:
        """Count blocks that the engine computes instead of loading. `tiers`: the tier of each. Calls no other process."""
        for label, blocks in Counter(tiers).items():
            if label not in _IN_MEMORY:
                self._count_declined(self._source, label, SLOWER, blocks * self.layout.block_tokens)

    def estimates(self) -> Estimates:
        """Returns what this client has measured, for a client in another process that makes the choices."""
        return Estimates(self._prefills.cost, self._costs.known())

    def adopt(self, estimates: Estimates) -> None:
        """Use what another client has measured."""
        self._prefills.cost = estimates.prefill
        self._costs.adopt(estimates.loads)

    def missed(self, blocks: int) -> None:
        """Add `blocks` misses to the node's figures: blocks that the engine looked up and did not find. Calls no other process."""
        if blocks > 0:
            self._source.tally(blocks, 0)
            self._note(self._source, self._names, {"asked_blocks": blocks, "missed_blocks": blocks})

    # Loading

    def _fill(self, access: NodeAccess, found: list[FoundBlock], pages: Pages, blocks: Sequence[int], until_s: float) -> int:
        """Copy the found blocks to the engine's pages. Returns how many leading blocks were copied."""
        source, done = access.source, 0

        def expired() -> bool:
            return self._clock.now_s() >= until_s

        while done < len(found):
            raw, end = _is_raw_in_host(found[done]), done + 1
            limit = len(found) if raw else min(len(found), done + max(STAGED_BYTES_MAX // self.layout.block_bytes, 1))
            while end < limit and _is_raw_in_host(found[end]) == raw:
                end += 1
            if raw:
                good = source.read_pages(found[done:end], pages, blocks[done:end])
                if done + good < end:  # the block may have moved meanwhile: look once more
                    again = source.find([found[done + good].key])
                    if again and self._stage(access, again, pages, blocks[done + good : done + good + 1], expired):
                        good += 1
                        end = done + good
            else:
                good = self._stage(access, found[done:end], pages, blocks[done:end], expired)
            done += good
            if done < end:
                break
        return done

    def _stage(
        self, access: NodeAccess, found: Sequence[FoundBlock], pages: Pages, blocks: Sequence[int], expired: Callable[[], bool]
    ) -> int:
        """Read blocks of any tier into a temporary tensor, then copy them to pages. Returns how many leading blocks were copied."""
        staged = torch.empty(self.layout.kv_shape(len(found) * self.layout.block_tokens), dtype=torch.uint8)
        read = len(access.source.read(found, staged, expired, self._meter(None)))
        pages.scatter(staged.view(-1), [number * self.layout.block_bytes for number in range(read)], blocks[:read])
        return read

    # Storing

    def _write(
        self,
        access: NodeAccess,
        session: Session,
        names: Names,
        chain: Chain,
        missing: list[int],
        pages: Pages,
        blocks: Sequence[int],
        wait_s: float,
    ) -> tuple[int, int]:
        """Store as many of the `missing` blocks as get room within `wait_s`. Returns how many were stored, and how many are new."""

        def pack(taken: list[int], offsets: list[int]) -> list[PackedBlock]:
            pages.gather(access.source.memory, offsets, [blocks[number] for number in taken])
            return [
                (chain.keys[number], chain.keys[number - 1] if number else chain.parent, offset, chain.depth + number)
                for number, offset in zip(taken, offsets, strict=True)
            ]

        parent = chain.keys[missing[0] - 1] if missing[0] else chain.parent
        return access.writer.write_packed(session, names.root, chain.keys, missing, parent, wait_s, pack)


_IN_MEMORY = frozenset(tier.label for tier in (Tier.DEVICE, Tier.HOST))


def _are_in_memory(tiers: Sequence[str]) -> bool:
    return all(tier in _IN_MEMORY for tier in tiers)


def _is_raw_in_host(found: FoundBlock) -> bool:
    return found.slot.tier == Tier.HOST and not found.slot.codec
