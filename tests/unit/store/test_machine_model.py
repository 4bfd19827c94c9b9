"""The store machine under random events, its instructions carried out in a world of dictionaries that checks each of them."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.store.world import World, key_of, parent_of
from tiered_kv.blocks import Tier
from tiered_kv.policy import LRUPolicy
from tiered_kv.store import events as ev
from tiered_kv.store.machine import StoreMachine

ROOT = bytes(32)
NUMBERS = st.integers(1, 7)


class MachineModel(RuleBasedStateMachine):
    """`may_end` has the blocks that something happened to which allows to drop them."""

    @initialize(has_disk=st.booleans())
    def begin(self, has_disk: bool) -> None:
        self.has_disk = has_disk
        self.machine = StoreMachine(LRUPolicy(), has_disk)
        self.world = World()
        self.may_end: set[bytes] = set()

    def tell(self, *events: ev.Event) -> None:
        for event in events:
            self.world.carry_out(self.machine.handle(event))

    @rule(number=NUMBERS)
    def commit(self, number: int) -> None:
        key = key_of(number)
        if key not in self.world.shown:
            self.may_end.discard(key)
        self.tell(ev.Committed(key, parent_of(number), ROOT, self.world.place(Tier.HOST, key)))
        assert self.world.shown[key].tier is Tier.HOST

    @rule(number=NUMBERS)
    def commit_chain(self, number: int) -> None:
        while number:
            self.commit(number)
            number //= 2

    @rule(number=NUMBERS)
    def touch(self, number: int) -> None:
        self.tell(ev.Touched(key_of(number)))

    @rule(nbytes=st.integers(0, 600), tail=st.none() | NUMBERS)
    def need(self, nbytes: int, tail: int | None) -> None:
        before = dict(self.world.shown)
        self.tell(ev.Needed(Tier.HOST, nbytes, tail and key_of(tail)))
        gone = before.keys() - self.world.shown.keys()
        if self.has_disk:
            assert gone <= self.may_end, "dropped although there is a disk that never refused it"
        assert not gone & self.chain_to(tail), "the growing chain made room for itself"

    @rule(count=st.integers(0, 3), tail=st.none() | NUMBERS)
    def crowd(self, count: int, tail: int | None) -> None:
        before = self.world.shown.keys() - set()
        self.tell(ev.Crowded(count, tail and key_of(tail)))
        gone = before - self.world.shown.keys()
        assert len(gone) <= count
        assert not gone & self.chain_to(tail)

    @precondition(lambda self: self.world.copies)
    @rule(data=st.data())
    def finish_a_copy(self, data) -> None:
        copy = self.take_a_copy(data)
        if copy.target is Tier.DISK:
            assert self.world.content[copy.source] == copy.key, "the source went while it was copied"
        elif self.world.content.get(copy.source) != copy.key:  # its segment was reclaimed meanwhile: no frame of this key there
            self.tell(ev.CopyFailed(copy.key, copy.target), ev.Lost(copy.key, copy.source))
            return
        self.tell(ev.Copied(copy.key, self.world.place(copy.target, copy.key)))

    @precondition(lambda self: self.world.copies)
    @rule(data=st.data(), damaged=st.booleans())
    def fail_a_copy(self, data, damaged: bool) -> None:
        copy = self.take_a_copy(data)
        shown = dict(self.world.shown)
        self.tell(ev.CopyFailed(copy.key, copy.target))
        assert self.world.shown == shown, "a failed copy changes nothing for readers"
        if copy.target is Tier.DISK:
            self.may_end.add(copy.key)
        elif damaged:
            self.tell(ev.Lost(copy.key, copy.source))

    @rule(number=NUMBERS)
    def lose_a_disk_copy(self, number: int) -> None:
        self.tell(ev.Lost(key_of(number)))
        assert not self.machine.has(key_of(number), Tier.DISK)

    @rule(number=NUMBERS)
    def pin(self, number: int) -> None:
        if key_of(number) in self.world.shown:
            self.tell(ev.Pinned(key_of(number)))
            self.world.pinned.append(key_of(number))

    @precondition(lambda self: self.world.pinned)
    @rule(data=st.data())
    def unpin(self, data) -> None:
        key = data.draw(st.sampled_from(sorted(self.world.pinned)))
        self.world.pinned.remove(key)
        self.tell(ev.Unpinned(key))

    def take_a_copy(self, data) -> ev.Copy:
        return self.world.copies.pop(data.draw(st.integers(0, len(self.world.copies) - 1)))

    def chain_to(self, number: int | None) -> set[bytes]:
        """The block and its ancestors, as far up as they are known without a gap."""
        chain = set()
        while number and key_of(number) in self.machine.blocks:
            chain.add(key_of(number))
            number //= 2
        return chain

    @invariant()
    def readers_see_the_fastest_copy_of_every_block(self) -> None:
        self.machine.check()
        self.world.check_readers()
        assert self.world.shown == {key: block.best for key, block in self.machine.blocks.items()}

    @invariant()
    def every_place_is_accounted_for(self) -> None:
        copies = [location for block in self.machine.blocks.values() for location in block.copies.values()]
        assert Counter(copies) == Counter(self.world.content.keys())
        for tier in (Tier.HOST, Tier.DISK):
            assert self.machine.bytes_by_tier[tier] == sum(location.stored_bytes for location in copies if location.tier is tier)

    @invariant()
    def a_block_is_being_copied_only_while_a_copy_of_it_is_under_way(self) -> None:
        under_way = {(copy.key, copy.target) for copy in self.world.copies}
        assert all(block.copying_to is None or (key, block.copying_to) in under_way for key, block in self.machine.blocks.items())
        assert len(self.world.copies) == len(set(map(id, self.world.copies)))

    def teardown(self) -> None:
        """At the end all blocks can be given up, and nothing is left."""
        for copy in list(self.world.copies):
            self.world.copies.remove(copy)
            self.tell(ev.CopyFailed(copy.key, copy.target))
        for key in list(self.world.pinned):
            self.world.pinned.remove(key)
            self.tell(ev.Unpinned(key))
        self.tell(*[ev.Lost(key) for key in list(self.machine.blocks)], ev.Crowded(len(self.machine.blocks)))
        assert not self.machine.blocks
        assert not self.world.content
        assert not self.world.shown


TestMachineModel = MachineModel.TestCase
TestMachineModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
