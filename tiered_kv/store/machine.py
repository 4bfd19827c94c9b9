"""The store machine: events in, instructions out. Pure: no I/O, no threads, no clock, no torch.

Invariants, which `check` asserts: a known block has at least one copy; a copy's bytes are given up only after readers
were shown another copy or none; a block that is being copied, or read by a peer, keeps its source.
"""

from collections import Counter
from dataclasses import dataclass, field

from tiered_kv.blocks import Location, Tier
from tiered_kv.keys import BlockKey
from tiered_kv.policy.base import EvictionPolicy
from tiered_kv.store import events as ev


@dataclass(slots=True)
class Block:
    """What the machine knows of one block: its place in the chain and its copies."""

    parent: BlockKey | None
    root: BlockKey | None
    copies: dict[Tier, Location] = field(default_factory=dict)
    copying_to: Tier | None = None
    not_to_disk: bool = False

    @property
    def best(self) -> Location:
        """The copy in the fastest tier."""
        return self.copies[min(self.copies)]


class StoreMachine:
    """Decides admission, demotion, promotion and dropping for the tiers host and (optionally) disk of one node.

    Write once: a block promoted from disk keeps its disk copy, so that giving up its host copy again costs nothing.
    """

    def __init__(self, host_policy: EvictionPolicy, has_disk: bool) -> None:
        self.blocks: dict[BlockKey, Block] = {}
        self.bytes_by_tier: Counter[Tier] = Counter()
        self.blocks_by_tier: Counter[Tier] = Counter()
        self.counts: Counter[str] = Counter()
        self._pins: Counter[BlockKey] = Counter()  # not part of a block: a block on disk may go while it is being read
        self._host_policy = host_policy
        self._has_disk = has_disk
        self._handlers = {
            ev.Committed: self._committed,
            ev.Touched: self._touched,
            ev.Needed: self._needed,
            ev.Crowded: self._crowded,
            ev.Copied: self._copied,
            ev.CopyFailed: self._copy_failed,
            ev.Lost: self._lost,
            ev.Pinned: self._pinned,
            ev.Unpinned: self._unpinned,
        }

    def handle(self, event: ev.Event) -> list[ev.Instruction]:
        """What is to be done about `event`, in this order."""
        return self._handlers[type(event)](event)

    def has(self, key: BlockKey, tier: Tier) -> bool:
        """Whether the block has a copy in the tier."""
        block = self.blocks.get(key)
        return block is not None and tier in block.copies

    def pinned(self, key: BlockKey) -> bool:
        """Whether somebody reads the block now."""
        return key in self._pins

    def _committed(self, event: ev.Committed) -> list[ev.Instruction]:
        block = self.blocks.get(event.key)
        if block is None:
            block = self.blocks[event.key] = Block(event.parent, event.root)
        elif block.parent is None:  # what a restarted node found on disk has no past
            block.parent, block.root = event.parent, event.root
        tier = event.location.tier
        if tier in block.copies:  # somebody else was faster; the first copy stays
            self.counts["duplicate"] += 1
            return [ev.Free(event.key, event.location)]
        self.counts["committed"] += 1
        return self._add_copy(event.key, block, event.location)

    def _touched(self, event: ev.Touched) -> list[ev.Instruction]:
        block = self.blocks.get(event.key)
        if block is None:
            return []
        if Tier.HOST in block.copies:
            self._host_policy.touch(event.key)
            return []
        if block.copying_to is not None:
            return []
        block.copying_to = Tier.HOST
        return [ev.Copy(event.key, block.root, block.parent, block.best, Tier.HOST)]

    def _needed(self, event: ev.Needed) -> list[ev.Instruction]:
        assert event.tier is Tier.HOST  # the disk tier makes room by whole segments
        stays = frozenset(key for key in self._chain_to(event.tail) if self._would_drop(self.blocks[key]))
        instructions: list[ev.Instruction] = []
        for key in self._host_policy.victims(event.nbytes, _Protected(self, stays)):
            block = self.blocks[key]
            if Tier.DISK in block.copies or self._would_drop(block):
                self.counts["host_freed" if Tier.DISK in block.copies else "dropped"] += 1
                instructions += self._drop_copy(key, block, Tier.HOST)
            else:
                block.copying_to = Tier.DISK
                instructions.append(ev.Copy(key, block.root, block.parent, block.copies[Tier.HOST], Tier.DISK))
        return instructions

    def _crowded(self, event: ev.Crowded) -> list[ev.Instruction]:
        instructions: list[ev.Instruction] = []
        protected = _Protected(self, self._chain_to(event.tail))
        for _ in range(event.count):
            for key in self._host_policy.victims(1, protected):
                self.counts["dropped"] += 1
                for tier in sorted(self.blocks[key].copies):
                    instructions += self._drop_copy(key, self.blocks[key], tier)
        return instructions

    def _copied(self, event: ev.Copied) -> list[ev.Instruction]:
        block = self.blocks.get(event.key)
        tier = event.location.tier
        if block is None or block.copying_to is not tier:
            return [ev.Free(event.key, event.location)]  # lost or committed anew meanwhile
        block.copying_to = None
        if tier in block.copies:
            return [ev.Free(event.key, event.location)]
        self.counts["promoted" if tier is Tier.HOST else "demoted"] += 1
        instructions = self._add_copy(event.key, block, event.location)
        if tier is Tier.DISK and Tier.HOST in block.copies and not self.pinned(event.key):
            instructions += self._drop_copy(event.key, block, Tier.HOST)
        return instructions

    def _copy_failed(self, event: ev.CopyFailed) -> list[ev.Instruction]:
        block = self.blocks.get(event.key)
        if block is not None and block.copying_to is event.target:
            block.copying_to = None
            if event.target is Tier.DISK:
                self.counts["demote_failed"] += 1
                block.not_to_disk = True  # the next time its room is needed it is dropped instead
        return []

    def _lost(self, event: ev.Lost) -> list[ev.Instruction]:
        block = self.blocks.get(event.key)
        there = block.copies.get(Tier.DISK) if block else None
        if there is None or event.location not in (None, there):
            return []
        self.counts["lost"] += 1
        return self._drop_copy(event.key, block, Tier.DISK)

    def _pinned(self, event: ev.Pinned) -> list[ev.Instruction]:
        self._pins[event.key] += 1
        return []

    def _unpinned(self, event: ev.Unpinned) -> list[ev.Instruction]:
        self._pins[event.key] -= 1
        if not self._pins[event.key]:
            del self._pins[event.key]
        return []

    def _add_copy(self, key: BlockKey, block: Block, location: Location) -> list[ev.Instruction]:
        block.copies[location.tier] = location
        self.bytes_by_tier[location.tier] += location.stored_bytes
        self.blocks_by_tier[location.tier] += 1
        if location.tier is Tier.HOST:
            self._host_policy.add(key, block.parent, location.stored_bytes)
        return [ev.Show(key, location)] if block.best is location else []

    def _drop_copy(self, key: BlockKey, block: Block, tier: Tier) -> list[ev.Instruction]:
        was_best = min(block.copies) is tier
        location = block.copies.pop(tier)
        self.bytes_by_tier[tier] -= location.stored_bytes
        self.blocks_by_tier[tier] -= 1
        if tier is Tier.HOST:
            self._host_policy.remove(key)
        instructions: list[ev.Instruction] = []
        if not block.copies:
            del self.blocks[key]
            instructions.append(ev.Hide(key))
        elif was_best:
            instructions.append(ev.Show(key, block.best))
        return [*instructions, ev.Free(key, location)]

    def _would_drop(self, block: Block) -> bool:
        """Whether giving up the block's only copy, in the host tier, would be the end of it."""
        return Tier.DISK not in block.copies and (not self._has_disk or block.not_to_disk)

    def _chain_to(self, tail: BlockKey | None) -> frozenset[BlockKey]:
        chain = set()
        while tail is not None and tail in self.blocks and tail not in chain:
            chain.add(tail)
            tail = self.blocks[tail].parent
        return frozenset(chain)

    def check(self) -> None:
        """Recompute everything that is kept in two places, and compare."""
        for tier in Tier:
            copies = [block.copies[tier] for block in self.blocks.values() if tier in block.copies]
            assert self.bytes_by_tier[tier] == sum(location.stored_bytes for location in copies)
            assert self.blocks_by_tier[tier] == len(copies)
            assert all(location.tier is tier for location in copies)
        in_host = {key for key, block in self.blocks.items() if Tier.HOST in block.copies}
        assert len(self._host_policy) == len(in_host)
        assert all(key in self._host_policy for key in in_host)
        assert all(block.copies for block in self.blocks.values())
        assert all(count > 0 for count in self._pins.values())
        self._host_policy.check()


class _Protected:
    """Blocks that must not be given up now: those of the growing chain, those being copied, those being read."""

    def __init__(self, machine: StoreMachine, chain: frozenset[BlockKey]) -> None:
        self._machine = machine
        self._chain = chain

    def __contains__(self, key: object) -> bool:
        block = self._machine.blocks[key]  # type: ignore[index]
        return key in self._chain or block.copying_to is not None or self._machine.pinned(key)  # type: ignore[arg-type]
