"""Quotas in the pure machine: after every event no tenant is above its own, and nobody else's block has left for it."""

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.store.world import HOST_BYTES, key_of
from tiered_kv.blocks import Location, Tier
from tiered_kv.policy import History, LRUPolicy
from tiered_kv.store import events as ev
from tiered_kv.store.machine import StoreMachine
from tiered_kv.store.quotas import Quotas

ROOTS = {bytes([number]) * 32: f"t{number}" for number in range(3)}
LIMITS = {"t0": {Tier.HOST: 4 * HOST_BYTES}, "t1": {Tier.HOST: 7 * HOST_BYTES}}
STORES = st.lists(st.tuples(st.sampled_from(sorted(ROOTS)), st.integers(0, 5), st.integers(1, 6)), max_size=30)


@given(STORES)
def test_a_tenant_above_its_quota_loses_its_own_blocks_leaf_before_parent(stores):
    quotas = Quotas(LIMITS, lambda root: ROOTS.get(root, ""))
    machine = StoreMachine({Tier.HOST: 10**6}, {Tier.HOST: LRUPolicy()}, History(), quotas=quotas)
    owner = {}
    for offset, (root, chain, blocks) in enumerate(stores, 1):
        keys = [key_of(1000 * root[0] + 10 * chain + depth) for depth in range(blocks)]
        owner |= dict.fromkeys(keys, ROOTS[root])
        places = [Location(Tier.HOST, 0, 0, 64 * (100 * offset + number), HOST_BYTES, HOST_BYTES) for number in range(blocks)]
        before = {key for key in machine.blocks if owner[key] != ROOTS[root]}
        machine.handle(ev.Committed(root, None, keys, places, float(offset), 0))
        assert before <= machine.blocks.keys(), "another tenant's block has left"
        for tenant, limits in LIMITS.items():
            assert quotas.bytes[tenant, Tier.HOST] <= limits[Tier.HOST]
        present = machine.blocks.keys()
        for key, block in machine.blocks.items():
            assert block.parent is None or block.parent in present, f"{key.hex()} has outlived its parent"
        machine.check()


def test_ended_blocks_leave_at_once_and_their_bytes_when_nobody_reads_them():
    root = next(iter(ROOTS))
    machine = StoreMachine({Tier.HOST: 10**6}, {Tier.HOST: LRUPolicy()}, History())
    place = Location(Tier.HOST, 0, 0, 64, HOST_BYTES, HOST_BYTES)
    machine.handle(ev.Committed(root, None, [key_of(1)], [place], 0.0, 0))
    machine.handle(ev.Pinned(key_of(1)))
    assert machine.handle(ev.Ended([root], [key_of(1)])) == [ev.Hide(key_of(1))]
    assert machine.endings.offsets() == [64]
    assert machine.handle(ev.Committed(root, None, [key_of(2)], [place], 0.0, 0)) == [ev.Free(key_of(2), place)], (
        "nothing is added below it"
    )
    assert machine.handle(ev.Unpinned(key_of(1))) == [ev.Free(key_of(1), place)]
    assert not machine.endings
    machine.handle(ev.Reopened([root]))
    assert ev.Show(key_of(3), place) in machine.handle(ev.Committed(root, None, [key_of(3)], [place], 0.0, 0))
    machine.check()
