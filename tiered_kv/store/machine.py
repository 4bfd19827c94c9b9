"""The store machine decides in which tiers blocks are: events in, instructions out. Pure: no I/O, no threads, no clock, no torch.

Invariants, which `check` asserts: a known block has at least one copy; a tier never holds more than its cap; the bytes of a copy
are freed only after readers were shown another copy or none; a block that is being copied, or read by a peer, keeps its source;
links between blocks never form a cycle (`chains`).
"""

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, cast

from tiered_kv.blocks import AWAY, BlockInfo, GoneCause, Location, Tier
from tiered_kv.keys import BlockKey
from tiered_kv.policy import EvictionPolicy, History
from tiered_kv.store import events as ev
from tiered_kv.store.chains import Chains
from tiered_kv.store.endings import Endings
from tiered_kv.store.eviction import limited, needed, within_quotas
from tiered_kv.store.gone import UNKNOWN, GoneObserver, UnobservedGone
from tiered_kv.store.holds import HOLD_SHARE, Holds
from tiered_kv.store.invariants import check_machine
from tiered_kv.store.movement import Block, Fate, Movement
from tiered_kv.store.protected import Protected
from tiered_kv.store.quotas import Quotas
from tiered_kv.store.shrinking import Shrinking

UNREPORTED_MAX = 8
"""From this number of unreported commits on, they are reported soon. Reporting several at once delays the next store less."""


class StoreMachine:
    """Decides admission, promotion, demotion and dropping for the tiers of one node.

    `capacities`: the cap in bytes of every tier of the node, host always included. `policies`: eviction policies of the tiers in
    memory (device, host); the other tiers remove whole segments. `history`: the history of all uses, shared with the policies.
    `shrinks`: whether uncompressed blocks in host memory can be compressed in place. `quotas`: the tenants' quotas, without blocks yet.
    `observer`: notes each block whose last copy is removed.
    """

    def __init__(
        self,
        capacities: Mapping[Tier, int],
        policies: Mapping[Tier, EvictionPolicy],
        history: History,
        *,
        shrinks: bool = False,
        quotas: Quotas | None = None,
        observer: GoneObserver | None = None,
    ) -> None:
        self.blocks: dict[BlockKey, Block] = {}
        self.bytes_by_tier: Counter[Tier] = Counter()
        self.blocks_by_tier: Counter[Tier] = Counter()
        self.counts: Counter[str] = Counter()
        self.used_bytes = 0  # raw bytes of all uses
        self.moved_bytes: Counter[tuple[Tier, Tier]] = Counter()  # by source and target of complete copies
        self.tiers = frozenset(capacities)
        self._movement = Movement(capacities, self.bytes_by_tier, history)
        self._policies = dict(policies)
        self._history = history
        self._holds = Holds(capacities[Tier.HOST] * HOLD_SHARE)
        self.shrinking = Shrinking(capacities[Tier.HOST] if shrinks else 0)
        self.chains = Chains(self.blocks)
        self.endings = Endings()
        self.quotas = quotas or Quotas()
        self._observer = observer or UnobservedGone()
        self._unreported: list[tuple[list[BlockKey], BlockKey | None, int, float]] = []
        """Runs committed but not yet reported to history and policy: keys, parent, bytes a block, time."""
        self._mounted: dict[BlockKey, None] = {}  # blocks with a copy in a checkpoint, in the order of mounting
        self._pins: Counter[BlockKey] = Counter()  # readers by block; not in `Block`, because a block may be removed while it is read
        self._handlers: dict[type[ev.Event], Callable[[Any], list[ev.Instruction]]] = {
            ev.Committed: self._committed,
            ev.Recovered: self._recovered,
            ev.Ranked: self._ranked,
            ev.Used: self._used,
            ev.BringRequested: self._bring_requested,
            ev.Needed: partial(needed, self),
            ev.Crowded: self._crowded,
            ev.Limited: partial(limited, self),
            ev.Ending: self._ending,
            ev.Unmounted: self._unmounted,
            ev.Copied: self._copied,
            ev.CopyFailed: self._copy_failed,
            ev.Lost: self._lost,
            ev.Ended: self._ended,
            ev.Reopened: self._reopened,
            ev.Aging: self._aging,
            ev.Moved: self._moved,
            ev.Emptied: self._emptied,
            ev.Hinted: self._hinted,
            ev.Pinned: self._pinned,
            ev.Unpinned: self._unpinned,
        }

    def handle(self, event: ev.Event) -> list[ev.Instruction]:
        """Update the state as `event` says. Returns the instructions to carry out, in this order."""
        if self._unreported and type(event) is not ev.Committed:
            self.report_commits()
        instructions = self._handlers[type(event)](event)
        if self.quotas.limits and isinstance(event, ev.Committed | ev.Recovered | ev.Copied | ev.CopyFailed):
            self.report_commits()
            instructions = [*instructions, *within_quotas(self)]
        if self.endings and isinstance(event, ev.Copied | ev.CopyFailed | ev.Unpinned):
            if type(event) is not ev.Unpinned:
                self.endings.copied(event.key)
            instructions = [*instructions, *self.endings.released(event.key, self.pinned(event.key))]
        return instructions

    def has(self, key: BlockKey, tier: Tier) -> bool:
        """Returns whether the block has a copy in the tier."""
        block = self.blocks.get(key)
        return block is not None and tier in block.copies

    def held(self, key: BlockKey) -> bool:
        """Returns whether a worker's hold keeps this block in memory (`Hint.pinned_s`), as of the last clock value seen."""
        return key in self._holds

    def pinned(self, key: BlockKey) -> bool:
        """Returns whether a reader uses the block in memory now."""
        return key in self._pins

    def wanted_in(self, tier: Tier, segment: int, keys: Sequence[BlockKey], budget_bytes: float) -> list[BlockKey]:
        """Returns the blocks of a segment about to be removed that are worth rewriting, of at most `budget_bytes` in all."""
        return self._movement.wanted(tier, self._in_segment(tier, segment, keys), budget_bytes)

    # Events of workers

    def _committed(self, event: ev.Committed) -> list[ev.Instruction]:
        if event.root in self.endings.roots:
            return [ev.Free(key, location) for key, location in zip(event.keys, event.locations, strict=True)]
        instructions: list[ev.Instruction] = []
        run: list[BlockKey] = []
        run_parent: BlockKey | None = None
        parent = event.parent
        for number, (key, location) in enumerate(zip(event.keys, event.locations, strict=True)):
            block = self.chains.add(key, parent, event.root, None if event.depth is None else event.depth + number)
            if not run or block.link != run[-1]:
                self._add_run(run, run_parent, event)
                run, run_parent = [], block.link
            if Tier.HOST in block.copies:  # another worker was faster; the first copy stays
                self.counts["duplicate"] += 1
                instructions.append(ev.Free(key, location))
                self._add_run(run, run_parent, event)
                run = []
            else:
                run.append(key)
                instructions += self._place(key, block, location)
            parent = key
        self._add_run(run, run_parent, event)
        self.shrinking.used(event.keys)
        return instructions + self._shrink()

    def _add_run(self, run: list[BlockKey], parent: BlockKey | None, event: ev.Committed) -> None:
        if run:
            self.counts["committed"] += len(run)
            self._unreported.append((run, parent, event.locations[0].stored_bytes, event.now_s))

    @property
    def has_many_unreported_commits(self) -> bool:
        """Whether there are so many unreported commits that `report_commits` should not wait for the next event."""
        return len(self._unreported) >= UNREPORTED_MAX

    def report_commits(self) -> None:
        """Report the blocks committed since the last call to history and policy. Runs before every event that is not a commit.

        The event `Committed` does not report its own blocks, so that a worker's store returns as soon as its blocks are visible. The
        next store does not wait for the report either.
        """
        unreported, self._unreported = self._unreported, []
        for run, parent, nbytes, now_s in unreported:
            self._history.seen(run, parent, now_s)
            self._policies[Tier.HOST].add(run, parent, nbytes)
            for key in run:
                if len(self.blocks[key].copies) > 1:
                    self._weigh(key, self.blocks[key])

    def _recovered(self, event: ev.Recovered) -> list[ev.Instruction]:
        if event.info.root in self.endings.roots:
            return [ev.Free(event.info.key, event.location)]
        block = self.chains.add(*event.info)
        block.uses = max(block.uses, event.uses)
        if event.location.tier in block.copies:
            return [ev.Free(event.key, event.location)]
        return self._add_copy(event.key, block, event.location)

    def _ranked(self, event: ev.Ranked) -> list[ev.Instruction]:
        for tier, policy in self._policies.items():
            if here := [key for key in event.keys if self.has(key, tier)]:
                policy.use(here)
        return []

    def _used(self, event: ev.Used) -> list[ev.Instruction]:
        known = [(key, self.blocks[key]) for key in event.keys if key in self.blocks]
        if not known:
            return []
        self._history.seen([key for key, _ in known], known[0][1].link, event.now_s)
        for _, block in known:
            block.uses += 1
            block.used_below = True
            self.used_bytes += next(iter(block.copies.values())).raw_bytes
        for tier, policy in self._policies.items():
            if here := [key for key, block in known if tier in block.copies]:
                policy.use(here)
        self.shrinking.used([key for key, _ in known])
        self.quotas.used(known)
        return self._promoted(known)

    def _bring_requested(self, event: ev.BringRequested) -> list[ev.Instruction]:
        known = [(key, self.blocks[key]) for key in event.keys if key in self.blocks]
        instructions = self._promoted([(key, block) for key, block in known if min(block.copies) in AWAY])
        for key, block in known:
            if Tier.DEVICE in block.copies and block.copying_to is None and not self.pinned(key):
                instructions += self._off_device(key, block)
        return instructions

    def _off_device(self, key: BlockKey, block: Block) -> list[ev.Instruction]:
        self.counts["off_device"] += 1
        if Tier.HOST in block.copies:
            return self._drop_copy(key, block, Tier.DEVICE)
        self.quotas.leaves(block, Tier.DEVICE)
        return [self._copy(key, block, block.copies[Tier.DEVICE], Tier.HOST)]

    def _promoted(self, used: Sequence[tuple[BlockKey, Block]]) -> list[ev.Instruction]:
        return [self._copy(key, block, block.best, target) for key, block, target in self._movement.promotions(used)]

    def _hinted(self, event: ev.Hinted) -> list[ev.Instruction]:
        last_block, hint, now_s = event
        if hint.foretells:
            self._history.hint(last_block, now_s, answer_tokens=hint.answer_tokens, reuse_within_s=hint.reuse_within_s, ended=hint.ended)
        chain = self.chains.to(last_block)
        if hint.ended:
            for key in chain:
                if self.blocks[key].uses <= self.blocks[last_block].uses:  # the others are shared with other sessions
                    self._holds.release(key)
        elif hint.pinned_s:
            self._holds.expire(now_s)
            in_host = {key: self.blocks[key].copies[Tier.HOST].stored_bytes for key in chain if self.has(key, Tier.HOST)}
            if not self._holds.hold(in_host, now_s + hint.pinned_s):
                self.counts["pins_refused"] += 1
        return []

    def _pinned(self, event: ev.Pinned) -> list[ev.Instruction]:
        self._pins[event.key] += 1
        return []

    def _unpinned(self, event: ev.Unpinned) -> list[ev.Instruction]:
        self._pins[event.key] -= 1
        if not self._pins[event.key]:
            del self._pins[event.key]
        return []

    # Room

    def _victims(
        self, tier: Tier, nbytes: int, protected: Container[BlockKey], now_s: float, incoming: Sequence[BlockKey] = ()
    ) -> list[BlockKey]:
        """Returns the blocks that the tier's policy would evict for `nbytes`. The cast is needed because policies accept any keys."""
        return cast("list[BlockKey]", self._policies[tier].victims(nbytes, protected, now_s, incoming))

    def _protected(self, tier: Tier, chain: Container[BlockKey]) -> "Protected":
        return Protected(chain, self._holds if tier is Tier.HOST else (), self._pins, self.blocks)

    def _crowded(self, event: ev.Crowded) -> list[ev.Instruction]:
        chain, room = self.chains.to(event.last_block), len(self.blocks)
        instructions = self._unmount(event.slots, chain)
        room -= len(self.blocks)
        protected = self._protected(Tier.HOST, chain)
        for _ in range(event.slots - room):
            for key in self._victims(Tier.HOST, 1, protected, event.now_s):
                self.counts[Fate.DROPPED.value] += 1
                for tier in sorted(self.blocks[key].copies):
                    instructions += self._drop_copy(key, self.blocks[key], tier, GoneCause.INDEX_FULL)
        return instructions

    def ranked(self, tier: Tier, now_s: float) -> list[BlockKey]:
        """Returns the blocks of a tier in memory, as `EvictionPolicy.ranked`."""
        self.report_commits()
        return cast("list[BlockKey]", self._policies[tier].ranked(now_s)) if tier in self._policies else []

    def _ending(self, event: ev.Ending) -> list[ev.Instruction]:
        known = [(key, self.blocks[key]) for key in event.keys if key in self.blocks and Tier.DISK in self.tiers]
        unsaved = [(key, block) for key, block in known if Tier.DISK not in block.copies and block.copying_to is None]
        return [self._copy(key, block, block.best, Tier.DISK, 0) for key, block in unsaved if min(block.copies) in self._policies]

    def _unmounted(self, event: ev.Unmounted) -> list[ev.Instruction]:
        return self._unmount(event.slots, frozenset())

    def _unmount(self, count: int, chain: Container[BlockKey]) -> list[ev.Instruction]:
        """Drop copies in mounted checkpoints, the most recently mounted first, until `count` blocks have no copy left.

        Stops at the first block of `chain`.
        """
        instructions: list[ev.Instruction] = []
        while count > 0 and self._mounted and (key := next(reversed(self._mounted))) not in chain:
            block = self.blocks[key]
            count -= len(block.copies) == 1
            self.counts["unmounted"] += 1
            instructions += self._drop_copy(key, block, Tier.CHECKPOINT, GoneCause.UNMOUNTED)
        return instructions

    # Copies

    def _copy(self, key: BlockKey, block: Block, source: Location, target: Tier, gain: int | None = None) -> ev.Copy:
        block.copying_to = target
        if gain is None:
            gain = source.stored_bytes if target > source.tier else 0
        return ev.Copy(BlockInfo(key, block.parent, block.root, block.depth), source, target, self.chains.is_last_block(key), gain)

    def _shrink(self, nbytes: int = 0) -> list[ev.Instruction]:
        """Compress blocks in host memory in place, so that at least `nbytes` become free if that is possible."""
        over_bytes = self.shrinking.over(self.bytes_by_tier[Tier.HOST], nbytes)
        if over_bytes <= 0:
            return []
        chosen = self.shrinking.choose(over_bytes, lambda key: self.blocks[key].copying_to is not None)
        return [self._copy(key, self.blocks[key], self.blocks[key].copies[Tier.HOST], Tier.HOST, gain) for key, gain in chosen]

    def _shrunk(self, key: BlockKey, block: Block, location: Location) -> list[ev.Instruction]:
        """Replace the host copy of a block by its compressed copy at `location`, unless a reader uses it."""
        block.copying_to = None
        if self.pinned(key):
            self.shrinking.failed(key, again=True)
            return [ev.Free(key, location)]
        before, block.copies[Tier.HOST] = block.copies[Tier.HOST], location
        self.shrinking.done(key, location.stored_bytes)
        self.bytes_by_tier[Tier.HOST] += location.stored_bytes - before.stored_bytes
        self.quotas.resized(key, block, before, location)
        self._policies[Tier.HOST].resize(key, location.stored_bytes)
        self.counts["shrunk"] += 1
        return [*([ev.Show(key, location)] if block.best is location else []), ev.Free(key, before)]

    def _copied(self, event: ev.Copied) -> list[ev.Instruction]:
        key, location = event
        block, tier = self.blocks.get(key), location.tier
        if block is not None and tier is Tier.HOST and key in self.shrinking.under_way:
            return self._shrunk(key, block, location)
        if block is None or block.copying_to is not tier:
            return [ev.Free(key, location)]  # the block was lost or committed again during the copy
        leaving, block.copying_to = block.leaving, None
        self.quotas.leaves(block, None)
        if tier in block.copies:
            return [ev.Free(key, location)]
        source = min(block.copies)
        self.counts["demoted" if tier > source else "promoted"] += 1
        self.moved_bytes[source, tier] += location.stored_bytes
        instructions = self._add_copy(key, block, location)
        if leaving in block.copies and not self.pinned(key):
            instructions += self._drop_copy(key, block, leaving)
        return instructions + (self._shrink() if tier is Tier.HOST else [])

    def _copy_failed(self, event: ev.CopyFailed) -> list[ev.Instruction]:
        block = self.blocks.get(event.key)
        if block is not None and event.target is Tier.HOST and event.key in self.shrinking.under_way:
            block.copying_to = None
            self.shrinking.failed(event.key, event.again)
        elif block is not None and block.copying_to is event.target:
            if event.target > min(block.copies):
                self.counts["demote_failed"] += 1
                block.refused = True  # when its room is needed again it is dropped instead
            block.copying_to = None
            self.quotas.leaves(block, None)
        return []

    def _lost(self, event: ev.Lost) -> list[ev.Instruction]:
        block = self.blocks.get(event.key)
        if block is None or block.copies.get(event.location.tier) != event.location:
            return []
        self.counts["lost"] += 1
        return self._drop_copy(event.key, block, event.location.tier, event.cause)

    def _ended(self, event: ev.Ended) -> list[ev.Instruction]:
        self.endings.roots.update(event.roots)
        instructions: list[ev.Instruction] = []
        for key in reversed(event.keys):
            block = self.blocks.get(key)
            if block is None or block.root not in self.endings.roots:
                continue
            self.counts["ended"] += 1
            is_copying, dropping = block.copying_to is not None, list[ev.Instruction]()
            for tier in sorted(block.copies, reverse=True):  # the fastest copy last, so that readers are shown no other
                dropping += self._drop_copy(key, block, tier, GoneCause.ENDED)
            in_use = is_copying or self.pinned(key)
            instructions += self.endings.deferred(key, is_copying, dropping) if in_use else dropping
        return instructions

    def _reopened(self, event: ev.Reopened) -> list[ev.Instruction]:
        self.endings.roots.difference_update(event.roots)
        return []

    # Segments of the lower tiers

    def _aging(self, event: ev.Aging) -> list[ev.Instruction]:
        instructions: list[ev.Instruction] = []
        for key, block in self._in_segment(event.tier, event.segment, event.keys):
            alone = len(block.copies) == 1 and block.copying_to is None and not block.refused
            target = self._movement.target(key, block, event.tier) if alone else None
            if target is not None:
                instructions.append(self._copy(key, block, block.best, target))
        return instructions

    def _moved(self, event: ev.Moved) -> list[ev.Instruction]:
        block, tier = self.blocks.get(event.key), event.location.tier
        there = block.copies.get(tier) if block else None
        if block is None or there is None or there.segment != event.segment:
            return [ev.Free(event.key, event.location)]  # its copy was dropped while it was rewritten
        self.counts["reinserted"] += 1
        self.bytes_by_tier[tier] += event.location.stored_bytes - there.stored_bytes
        self.quotas.resized(event.key, block, there, event.location)
        block.copies[tier] = event.location
        block.used_below = False
        return [ev.Show(event.key, event.location)] if block.best is event.location else []

    def _emptied(self, event: ev.Emptied) -> list[ev.Instruction]:
        instructions: list[ev.Instruction] = []
        for key, block in list(self._in_segment(event.tier, event.segment, event.keys)):
            is_leaving = block.copying_to is not None and block.copying_to > event.tier
            if len(block.copies) == 1:
                self.counts["lost"] += 1
                self.counts[Fate.UNDER_PRESSURE.value] += is_leaving
            cause = GoneCause.UNDER_PRESSURE if is_leaving else GoneCause.RECLAIMED
            instructions += self._drop_copy(key, block, event.tier, cause)
        return instructions

    def _in_segment(self, tier: Tier, segment: int, keys: Sequence[BlockKey]) -> list[tuple[BlockKey, Block]]:
        found = ((key, self.blocks.get(key)) for key in keys)
        return [(key, block) for key, block in found if block and tier in block.copies and block.copies[tier].segment == segment]

    # Copies and counters

    def _add_copy(self, key: BlockKey, block: Block, location: Location) -> list[ev.Instruction]:
        """Record a new copy of one block, and report it to the policy of the copy's tier."""
        instructions = self._place(key, block, location)
        if location.tier in self._policies:
            self._policies[location.tier].add([key], block.link, location.stored_bytes)
        self._weigh(key, block)
        return instructions

    def _place(self, key: BlockKey, block: Block, location: Location) -> list[ev.Instruction]:
        tier = location.tier
        if not block.copies:
            block.tenant = self.quotas.tenant_of(block.root)
        block.copies[tier] = location
        self.quotas.placed(key, block, location)
        block.refused = False
        if tier is Tier.CHECKPOINT:
            self._mounted[key] = None
        if tier not in self._policies:
            block.used_below = False
        elif tier is Tier.HOST and location.stored_bytes == location.raw_bytes:
            self.shrinking.add(key, location.stored_bytes)
        self.bytes_by_tier[tier] += location.stored_bytes
        self.blocks_by_tier[tier] += 1
        return [ev.Show(key, location)] if block.best is location else []

    def _drop_copy(self, key: BlockKey, block: Block, tier: Tier, cause: GoneCause = GoneCause.DROPPED) -> list[ev.Instruction]:
        """Forget the block's copy in `tier`. While another copy remains, readers must find the block at any moment.

        So a demoted block gets its new copy before its old one is dropped (`_copied`). The `Show` of the remaining copy, or the `Hide`
        if none remains, always comes before the `Free` of the old bytes.
        """
        was_best = min(block.copies) is tier
        if block.leaving is tier:
            self.quotas.leaves(block, None)
        location = block.copies.pop(tier)
        self.quotas.dropped(key, block, location)
        self.bytes_by_tier[tier] -= location.stored_bytes
        self.blocks_by_tier[tier] -= 1
        if not block.copies:
            standing = self._policies[tier].standing(key) if tier in self._policies else UNKNOWN
            self._observer.gone(key, location, cause, block.uses, standing)
        if tier in self._policies:
            self._policies[tier].remove(key)
        if tier is Tier.HOST:
            self._holds.release(key)
            self.shrinking.remove(key)
        elif tier is Tier.CHECKPOINT:
            del self._mounted[key]
        instructions: list[ev.Instruction] = []
        if not block.copies:
            del self.blocks[key]
            self.chains.remove(key, block)
            instructions.append(ev.Hide(key))
        else:
            self._weigh(key, block)
            if was_best:
                instructions.append(ev.Show(key, block.best))
        return [*instructions, ev.Free(key, location)]

    def _weigh(self, key: BlockKey, block: Block) -> None:
        for tier, policy in self._policies.items():
            if tier in block.copies:
                policy.weigh(key, block.restore_factor(tier))

    def check(self) -> None:
        """Assert that every counter and every cross-reference agrees with the blocks."""
        self.report_commits()
        check_machine(self)
