"""Links between blocks: for any claimed parents and depths, following the links ends, and every tier can evict every block."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store.world import HOST_BYTES, World, key_of, machine_of
from tiered_kv.blocks import BlockInfo, Hint, Tier
from tiered_kv.store import events as ev
from tiered_kv.store.chains import Chains
from tiered_kv.store.movement import Block
from tiered_kv.store.runs import uses_of

ROOT = bytes(32)
HOST, DISK = Tier.HOST, Tier.DISK
A, B, C, D = map(key_of, range(4))
NUMBERS = st.integers(0, 5)
CLAIMS = st.tuples(NUMBERS, st.none() | NUMBERS, st.none() | st.integers(0, 6), st.sampled_from(["commit", "found", "lost", "below"]))


@pytest.fixture
def chains() -> Chains:
    return Chains({})


def linked(chains: Chains) -> dict[bytes, bytes | None]:
    chains.check()
    return {key: block.link for key, block in chains._blocks.items()}


def test_a_chain_is_linked_in_any_order_of_events(chains: Chains) -> None:
    chains.add(C, B, ROOT, 2)
    assert linked(chains) == {C: B}, "the parent may come later"
    chains.add(A, None, ROOT, 0)
    chains.add(B, A, ROOT, 1)
    assert linked(chains) == {A: None, B: A, C: B}
    assert chains.to(C) == {A, B, C}


def test_unknown_depths_follow_once_the_first_block_is_known(chains: Chains) -> None:
    for key, parent in ((D, C), (C, B), (B, A)):
        chains.add(key, parent, ROOT, None)
    assert linked(chains) == dict.fromkeys((D, C, B))
    assert chains.to(D) == {D}
    assert not chains.is_last_block(A)
    chains.add(A, None, ROOT, None)
    assert linked(chains) == {A: None, B: A, C: B, D: C}
    assert [chains._blocks[key].depth for key in (A, B, C, D)] == [0, 1, 2, 3]


def test_a_cycle_of_unknown_depths_is_not_linked(chains: Chains) -> None:
    for key, parent in ((A, B), (B, C), (C, A)):
        chains.add(key, parent, ROOT, None)
    assert linked(chains) == dict.fromkeys((A, B, C))


def test_a_parent_inconsistent_with_its_children_is_not_linked(chains: Chains) -> None:
    chains.add(A, B, ROOT, 5)
    chains.add(B, A, ROOT, 6)
    assert linked(chains) == {A: B, B: None}
    assert chains.to(A) == {A, B}


def test_a_child_with_a_depth_inconsistent_with_parent_or_siblings_is_not_linked(chains: Chains) -> None:
    chains.add(A, None, ROOT, 0)
    chains.add(B, A, ROOT, 0)
    chains.add(C, key_of(9), ROOT, 7)
    chains.add(D, key_of(9), ROOT, 8)
    chains.add(key_of(5), key_of(5), ROOT, 3)
    assert linked(chains) == {A: None, B: None, C: key_of(9), D: None, key_of(5): None}


def test_a_known_parent_stays_when_another_is_claimed(chains: Chains) -> None:
    chains.add(A, None, ROOT, 0)
    chains.add(B, A, ROOT, 1)
    chains.add(A, B, ROOT, 2)
    chains.add(A, C, ROOT, None)
    assert linked(chains) == {A: None, B: A}


def test_a_block_stored_again_is_linked_only_if_consistent_with_its_children(chains: Chains) -> None:
    for key, parent, depth in ((A, None, 0), (B, A, 1), (C, B, 2)):
        chains.add(key, parent, ROOT, depth)
    chains.remove(B, chains._blocks.pop(B))
    chains.add(B, C, ROOT, 3)
    assert linked(chains) == {A: None, B: None, C: B}
    chains.remove(B, chains._blocks.pop(B))
    chains.add(B, A, ROOT, 1)
    assert linked(chains) == {A: None, B: A, C: B}


@pytest.mark.parametrize(
    ("claims", "wrong"),
    [
        ([(A, None, 0), (B, A, 1), (C, B, 2)], None),
        ([(C, B, 2), (B, A, 1)], None),
        ([(C, D, 7)], None),
        ([(A, None, 3)], "no parent"),
        ([(B, A, 0)], "depth 0"),
        ([(A, None, 0), (B, A, 2)], "must be 1, got 2"),
        ([(A, B, 5), (B, A, 6)], "must be 7, got 5"),
        ([(A, None, 0), (A, C, 4)], "at the depths 0 and 4"),
        ([(C, key_of(8), 9)], "must be 5, got 9"),
    ],
)
def test_committed_blocks_must_be_one_deeper_than_their_parents(chains: Chains, claims: list, wrong: str | None) -> None:
    chains._blocks[key_of(8)] = Block(None, ROOT, 4)
    said = chains.misplaced([BlockInfo(key, parent, ROOT, depth) for key, parent, depth in claims])
    assert (said is None) if wrong is None else (wrong in said)


@given(
    known=st.dictionaries(NUMBERS, st.none() | st.integers(0, 3), max_size=3),
    claims=st.lists(st.tuples(NUMBERS, st.none() | NUMBERS, st.integers(0, 4)), max_size=6),
)
def test_the_check_of_a_commit_in_one_pass_equals_the_full_check(known: dict, claims: list) -> None:
    quick, full = (Chains({key_of(number): Block(None, ROOT, depth) for number, depth in known.items()}) for _ in range(2))
    full._are_in_order = lambda *_: False
    committed = [BlockInfo(key_of(number), None if parent is None else key_of(parent), ROOT, depth) for number, parent, depth in claims]
    assert quick.misplaced(committed) == full.misplaced(committed)


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "s3fifo", "sieve", "arc", "gdsf", "adaptive"])
@settings(max_examples=60, deadline=None)
@given(claims=st.lists(CLAIMS, max_size=25))
def test_for_any_claims_nothing_hangs_and_every_block_can_be_evicted(policy: str, claims: list) -> None:
    machine, world = machine_of({HOST: 100 * HOST_BYTES, DISK: 10_000}, policy), World()

    def tell(event: ev.Event) -> None:
        world.carry_out(machine.handle(event))
        machine.check()

    for now_s, (number, parent, depth, what) in enumerate(claims):
        key, above = key_of(number), None if parent is None else key_of(parent)
        if what == "commit":
            tell(ev.Committed(ROOT, above, [key], [world.place(HOST, key)], now_s / 1e4, depth))
        elif what != "lost":
            tell(ev.Recovered(BlockInfo(key, above, ROOT, depth), world.place(HOST if what == "found" else DISK, key)))
        elif key in machine.blocks:
            tell(ev.Lost(key, machine.blocks[key].best))
        touched = [(key_of((number + each) % 6), 1, each) for each in range(6)]
        for use in [*uses_of(touched, machine.blocks, now_s / 1e4), *uses_of(touched[::-1], machine.blocks, now_s / 1e4)]:
            tell(use)
        tell(ev.Hinted(key, Hint(answer_tokens=3, ended=bool(number % 2)), now_s / 1e4))
    machine.shrinking.used(list(machine.blocks))
    while world.copies:
        copy = world.copies.pop()
        tell(ev.CopyFailed(copy.key, copy.target))
    tell(ev.Needed(HOST, 10_000_000, None, (), 1e6, 0))
    assert not machine.blocks_by_tier[HOST], "a cycle of parents keeps its blocks for ever"
