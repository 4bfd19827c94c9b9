"""Eviction in the store machine: makes room in a tier, and evicts blocks of tenants above their quota. The machine has the state."""

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from tiered_kv.blocks import GoneCause, Tier
from tiered_kv.keys import BlockKey
from tiered_kv.store import events as ev
from tiered_kv.store.movement import Fate
from tiered_kv.store.quotas import Share

if TYPE_CHECKING:
    from tiered_kv.store.machine import StoreMachine

CAUSES = {
    Fate.FREED: GoneCause.DROPPED,  # another copy remains, so nothing is gone
    Fate.DROPPED: GoneCause.DROPPED,
    Fate.NOT_ADMITTED: GoneCause.NOT_ADMITTED,
    Fate.UNDER_PRESSURE: GoneCause.UNDER_PRESSURE,
}
"""The cause that is noted for a block without a copy left, by the fate of its last copy."""


def needed(machine: "StoreMachine", event: ev.Needed) -> list[ev.Instruction]:
    """Evict blocks to free `nbytes`, in two passes. The first pass spares the chain of `last_block`, which is being stored.

    If that frees too little, the second pass evicts blocks of that chain too, except those that would have no copy left.
    """
    tier, nbytes, queue_bytes = event.tier, event.nbytes, event.queue_bytes
    machine._holds.expire(event.now_s)
    chain = machine.chains.to(event.last_block)
    instructions: list[ev.Instruction] = []
    if tier is Tier.HOST and event.shrink:
        instructions += machine._shrink(nbytes)
        if machine.shrinking.under_way:  # each compressed block will ask for its own, smaller room, and free more than that
            return instructions
    for is_second_pass in (False, True):
        if nbytes <= 0:
            break
        spared = _would_be_lost(machine, chain, tier, queue_bytes) if is_second_pass else chain
        victims = machine._victims(tier, nbytes, machine._protected(tier, spared), event.now_s, event.keys)
        nbytes -= sum(machine.blocks[key].copies[tier].stored_bytes for key in victims)
        evicted, queue_bytes = _evict(machine, victims, tier, queue_bytes, chain)
        instructions += evicted
    return instructions


def _evict(
    machine: "StoreMachine",
    victims: Sequence[BlockKey],
    tier: Tier,
    queue_bytes: float,
    spared: Container[BlockKey] = (),
    cause: GoneCause | None = None,
) -> tuple[list[ev.Instruction], float]:
    """Remove `victims` from a tier in memory. A block without a copy in a lower tier is first copied to one if that is worth it.

    A block in `spared` stays if it would be lost. `cause`: noted for the blocks that are gone, instead of the cause of their fate.
    Returns the instructions, and how much of `queue_bytes` is left.
    """
    instructions: list[ev.Instruction] = []
    for key in victims:
        block = machine.blocks[key]
        location, fate = block.copies[tier], machine._movement.fate(key, block, tier, queue_bytes)
        if fate is Fate.LEAVES:
            queue_bytes -= location.stored_bytes
            machine.quotas.leaves(block, tier)
            target = machine._movement.target(key, block, tier)
            assert target is not None, "a block leaves for a tier that admits it"
            instructions.append(machine._copy(key, block, location, target))
        elif fate is Fate.FREED or key not in spared:
            machine.counts[f"{tier.label}_freed" if fate is Fate.FREED else fate.value] += 1
            if fate is Fate.NOT_ADMITTED:
                machine._movement.not_admitted(key)
            instructions += machine._drop_copy(key, block, tier, cause or CAUSES[fate])
    return instructions, queue_bytes


def limited(machine: "StoreMachine", event: ev.Limited) -> list[ev.Instruction]:
    """Evict blocks of a tenant that is about to exceed its quota."""
    return _evict_own(machine, (event.tenant, event.tier), event.nbytes, machine.chains.to(event.last_block), event.now_s)


def within_quotas(machine: "StoreMachine") -> list[ev.Instruction]:
    """Evict blocks of each tenant that is above a quota. Blocks of other tenants stay."""
    instructions: list[ev.Instruction] = []
    for share in machine.quotas.exceeded():
        instructions += _evict_own(machine, share, -(machine.quotas.room(*share) or 0), (), 0.0)
    return instructions


def _evict_own(machine: "StoreMachine", share: Share, nbytes: int, chain: Container[BlockKey], now_s: float) -> list[ev.Instruction]:
    tier = share[1]
    victims = machine.quotas.victims(share, nbytes, machine._protected(tier, chain), now_s)
    machine.counts["over_quota"] += len(victims)
    if tier in machine._policies:
        return _evict(machine, victims, tier, machine.quotas.queue_bytes(share), chain, GoneCause.OVER_QUOTA)[0]
    return [each for key in victims for each in machine._drop_copy(key, machine.blocks[key], tier, GoneCause.OVER_QUOTA)]


def _would_be_lost(machine: "StoreMachine", chain: frozenset[BlockKey], tier: Tier, queue_bytes: float) -> frozenset[BlockKey]:
    """Returns the blocks of a chain in `tier` that have no other copy, and would not be copied to a lower tier if evicted."""
    here = ((key, machine.blocks[key]) for key in chain if machine.has(key, tier))
    survives = (Fate.FREED, Fate.LEAVES)
    return frozenset(key for key, block in here if machine._movement.fate(key, block, tier, queue_bytes) not in survives)
