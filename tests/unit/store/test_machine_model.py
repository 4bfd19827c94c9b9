"""The store machine under random events, for every combination of tiers.

A world of dictionaries, as small as the caps, carries out and checks each instruction."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.store.world import CODED_BYTES, FRAME_BYTES, HOST_BYTES, IN_MEMORY, World, depth_of, key_of, machine_of, parent_of
from tiered_kv.blocks import Hint, Location, Tier
from tiered_kv.store import events as ev

ROOT = bytes(32)
NUMBERS = st.integers(1, 7)
OPTIONAL = (Tier.DEVICE, Tier.DISK, Tier.OBJECTS)
COMBINATIONS = [(Tier.HOST, *(tier for at, tier in enumerate(OPTIONAL) if chosen >> at & 1)) for chosen in range(1 << len(OPTIONAL))]
BLOCKS = {Tier.DEVICE: 2, Tier.HOST: 5, Tier.DISK: 6, Tier.OBJECTS: 8}


class MachineModel(RuleBasedStateMachine):
    """The state machine of the test. `may_end` has the blocks that the machine may drop, because of an earlier event."""

    @initialize(
        tiers=st.sampled_from(COMBINATIONS), policy=st.sampled_from(["lru", "gdsf", "s3fifo", "arc", "adaptive"]), shrinks=st.booleans()
    )
    def begin(self, tiers: tuple[Tier, ...], policy: str, shrinks: bool) -> None:
        self.room = {tier: BLOCKS[tier] * (HOST_BYTES if tier in IN_MEMORY else FRAME_BYTES) for tier in tiers}
        self.machine = machine_of(self.room, policy, shrinks=shrinks)
        self.world = World()
        self.may_end: set[bytes] = set()
        self.now_s = 0.0
        self.lower = min((tier for tier in tiers if tier not in IN_MEMORY), default=None)

    def tell(self, *events: ev.Event) -> None:
        for event in events:
            self.world.carry_out(self.machine.handle(event))

    def place(self, tier: Tier, key: bytes, coded: bool = False) -> Location | None:
        """Returns a new location, or None if the tier is full."""
        nbytes = CODED_BYTES if coded else HOST_BYTES if tier in IN_MEMORY else FRAME_BYTES
        return self.world.place(tier, key, coded) if self.world.bytes_in(tier) + nbytes <= self.room[tier] else None

    @rule(number=NUMBERS)
    def commit(self, number: int) -> None:
        self.commit_run([number])

    @rule(number=NUMBERS)
    def commit_chain(self, number: int) -> None:
        chain = [number]
        while chain[0] > 1:
            chain.insert(0, chain[0] // 2)
        self.commit_run(chain)

    def commit_run(self, numbers: list[int]) -> None:
        keys, locations = [], []
        for number in numbers:
            location = self.place(Tier.HOST, key_of(number))
            if location is None:
                break
            if key_of(number) not in self.world.shown:
                self.may_end.discard(key_of(number))
            keys.append(key_of(number))
            locations.append(location)
        if keys:
            self.tell(ev.Committed(ROOT, parent_of(numbers[0]), keys, locations, self.now_s, depth_of(numbers[0])))
            assert all(self.world.shown[key].tier <= Tier.HOST for key in keys)

    @rule(number=NUMBERS)
    def use(self, number: int) -> None:
        self.now_s += 1
        chain = []
        while number:
            chain.insert(0, key_of(number))
            number //= 2
        self.tell(ev.Used(chain, self.now_s))

    @rule(numbers=st.lists(NUMBERS))
    def want(self, numbers: list[int]) -> None:
        self.tell(ev.BringRequested([key_of(number) for number in numbers]))

    @rule(number=NUMBERS, pinned_s=st.sampled_from([None, 2.0]), ended=st.booleans())
    def hint(self, number: int, pinned_s: float | None, ended: bool) -> None:
        self.tell(ev.Hinted(key_of(number), Hint(pinned_s=pinned_s, ended=ended), self.now_s))

    @rule(nbytes=st.integers(0, 600), last_block=st.none() | NUMBERS, slow=st.booleans(), device=st.booleans())
    def need(self, nbytes: int, last_block: int | None, slow: bool, device: bool) -> None:
        tier = Tier.DEVICE if device and Tier.DEVICE in self.room else Tier.HOST
        held = {key for key in self.machine.blocks if self.machine.held(key)}
        before = dict(self.world.shown)
        queue_bytes = HOST_BYTES if slow else float("inf")
        event = ev.Needed(tier, nbytes, last_block and key_of(last_block), (), self.now_s, queue_bytes)
        roomy = self.lower and self.world.bytes_in(self.lower) < self.room[self.lower] * 7 / 8
        self.tell(event)
        gone = before.keys() - self.world.shown.keys()
        if tier is Tier.DEVICE or (roomy and not slow):
            assert gone <= self.may_end, "dropped although there is a place below that never refused it"
        assert not gone & self.chain_to(last_block), "the growing chain made room for itself"
        assert not gone & {key for key in held if self.machine.held(key)}

    @rule(count=st.integers(0, 3), last_block=st.none() | NUMBERS)
    def crowd(self, count: int, last_block: int | None) -> None:
        before = self.world.shown.keys() - set()
        self.tell(ev.Crowded(count, last_block and key_of(last_block)))
        gone = before - self.world.shown.keys()
        assert len(gone) <= count
        assert not gone & self.chain_to(last_block)

    @rule(numbers=st.lists(NUMBERS, max_size=4))
    def end_soon(self, numbers: list[int]) -> None:
        shown = dict(self.world.shown)
        self.tell(ev.Ending([key_of(number) for number in numbers]))
        assert self.world.shown == shown, "blocks stay where they are"

    @precondition(lambda self: self.world.copies)
    @rule(data=st.data())
    def finish_a_copy(self, data) -> None:
        copy = self.take_a_copy(data)
        if copy.source.tier in IN_MEMORY:
            assert self.world.content[copy.source] == copy.key, "the source went while it was copied"
        elif self.world.content.get(copy.source) != copy.key:  # its segment was reclaimed meanwhile: no frame of this key there
            self.tell(ev.CopyFailed(copy.key, copy.target), ev.Lost(copy.key, copy.source))
            return
        is_shrinking = copy.target is copy.source.tier
        assert not is_shrinking or copy.source.codec == 0, "coded twice"
        location = self.place(copy.target, copy.key, coded=is_shrinking)
        if is_shrinking and location is None:
            self.tell(ev.CopyFailed(copy.key, copy.target))
            return
        self.tell(ev.Copied(copy.key, location) if location else ev.CopyFailed(copy.key, copy.target))
        if location is None:
            self.may_end.add(copy.key)

    @precondition(lambda self: self.world.copies)
    @rule(data=st.data(), damaged=st.booleans(), again=st.booleans())
    def fail_a_copy(self, data, damaged: bool, again: bool) -> None:
        copy = self.take_a_copy(data)
        shown = dict(self.world.shown)
        self.tell(ev.CopyFailed(copy.key, copy.target, again))
        assert self.world.shown == shown, "a failed copy changes nothing for readers"
        self.may_end.add(copy.key)
        if damaged and copy.source.tier not in IN_MEMORY:
            self.tell(ev.Lost(copy.key, copy.source))

    @precondition(lambda self: any(self.world.segments(tier) for tier in self.room if tier > Tier.HOST))
    @rule(data=st.data(), early=st.booleans(), again=st.booleans())
    def empty_a_segment(self, data, early: bool, again: bool) -> None:
        tier = data.draw(st.sampled_from([tier for tier in sorted(self.room) if tier > Tier.HOST and self.world.segments(tier)]))
        segment, keys = data.draw(st.sampled_from(sorted(self.world.segments(tier).items())))
        if early and tier is Tier.DISK and Tier.OBJECTS in self.room:
            self.tell(ev.Aging(tier, segment, keys))
            return
        for key in self.machine.wanted_in(tier, segment, keys, FRAME_BYTES) if again else []:
            old = self.machine.blocks[key].copies[tier]
            location = self.place(tier, key)
            if location and location.segment != segment:
                self.tell(ev.Moved(key, segment, location))
                assert self.machine.blocks[key].copies[tier] == location
                del self.world.content[old]
            elif location:
                del self.world.content[location]
        self.tell(ev.Emptied(tier, segment, keys))
        assert segment not in self.world.segments(tier)

    @rule(number=NUMBERS, tier=st.sampled_from([Tier.DISK, Tier.OBJECTS]))
    def lose_a_copy_below(self, number: int, tier: Tier) -> None:
        if self.machine.has(key_of(number), tier):
            self.tell(ev.Lost(key_of(number), self.machine.blocks[key_of(number)].copies[tier]))
            assert not self.machine.has(key_of(number), tier)

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
        """Returns the block and its ancestors, up to the first unknown one."""
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
    def every_place_is_accounted_for_and_caps_hold(self) -> None:
        copies = [location for block in self.machine.blocks.values() for location in block.copies.values()]
        assert Counter(copies) == Counter(self.world.content.keys())
        for tier, capacity_bytes in self.room.items():
            assert self.machine.bytes_by_tier[tier] == self.world.bytes_in(tier) <= capacity_bytes

    @invariant()
    def a_block_is_being_copied_only_while_a_copy_of_it_is_under_way(self) -> None:
        under_way = {(copy.key, copy.target) for copy in self.world.copies}
        assert all(block.copying_to is None or (key, block.copying_to) in under_way for key, block in self.machine.blocks.items())
        assert all(block.leaving is None or block.copying_to is not None for block in self.machine.blocks.values())

    def teardown(self) -> None:
        """Evict all blocks at the end, and assert that none is left."""
        for copy in list(self.world.copies):
            self.world.copies.remove(copy)
            self.tell(ev.CopyFailed(copy.key, copy.target))
        for key in list(self.world.pinned):
            self.world.pinned.remove(key)
            self.tell(ev.Unpinned(key))
        for tier in self.room:
            for segment, keys in self.world.segments(tier).items() if tier > Tier.HOST else ():
                self.tell(ev.Emptied(tier, segment, keys))
        for tier in (Tier.DEVICE, Tier.HOST) * 2:  # what is on the device alone has to be refused by memory first
            if tier in self.room:
                self.tell(ev.Needed(tier, 10_000, None, (), self.now_s + 1000, 0, shrink=False))
                for copy in list(self.world.copies):
                    self.world.copies.remove(copy)
                    self.tell(ev.CopyFailed(copy.key, copy.target))
        assert not self.machine.blocks
        assert not self.world.content
        assert not self.world.shown


TestMachineModel = MachineModel.TestCase
TestMachineModel.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
