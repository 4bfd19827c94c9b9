"""The invariants of a `StoreMachine`: conditions that hold between two events."""

from typing import TYPE_CHECKING

from tiered_kv.blocks import Tier

if TYPE_CHECKING:
    from tiered_kv.store.machine import StoreMachine


def check_machine(machine: "StoreMachine") -> None:
    """Assert that every counter and every cross-reference of a machine is right. It must have reported its commits (`report_commits`)."""
    for tier in Tier:
        copies = [block.copies[tier] for block in machine.blocks.values() if tier in block.copies]
        assert not copies or tier in (*machine.tiers, Tier.CHECKPOINT)
        assert machine.bytes_by_tier[tier] == sum(location.stored_bytes for location in copies)
        assert machine.blocks_by_tier[tier] == len(copies)
        assert all(location.tier is tier for location in copies)
    assert all(block.copies for block in machine.blocks.values())
    assert machine._mounted.keys() == {key for key, block in machine.blocks.items() if Tier.CHECKPOINT in block.copies}
    assert all(count > 0 for count in machine._pins.values())
    for tier, policy in machine._policies.items():
        here = [key for key, block in machine.blocks.items() if tier in block.copies]
        assert len(policy) == len(here)
        assert all(key in policy for key in here)
        policy.check()
    machine._movement.check()
    machine._holds.check()
    machine.chains.check()
    in_host = {key: block.copies[Tier.HOST] for key, block in machine.blocks.items() if Tier.HOST in block.copies}
    machine.shrinking.check({key: each.stored_bytes for key, each in in_host.items() if each.stored_bytes == each.raw_bytes})
    assert all(machine.blocks[key].copying_to is Tier.HOST for key in machine.shrinking.under_way)
    assert all(machine.has(key, Tier.HOST) for key in machine.blocks if machine.held(key))
    machine.quotas.check(machine.blocks)
