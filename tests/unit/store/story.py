"""A store machine in its world, with short methods for events."""

from tests.unit.store.world import FRAME_BYTES, HOST_BYTES, World, depth_of, key_of, machine_of, parent_of
from tiered_kv.blocks import Tier
from tiered_kv.store import events as ev

ROOT = bytes(32)
ROOMY = 100
DEVICE, HOST, DISK, OBJECTS, CHECKPOINT = Tier


class Story:
    """A machine and its world. `tell` passes events to the machine, carries out its instructions, and returns them."""

    def __init__(self, *tiers: Tier, **blocks: int) -> None:
        """`blocks`: the capacity of a tier in blocks, if it is not ROOMY."""
        sizes = {tier: blocks.get(tier.label, ROOMY) * (FRAME_BYTES if tier > HOST else HOST_BYTES) for tier in tiers}
        self.machine = machine_of(sizes)
        self.world = World()

    def tell(self, *events: ev.Event) -> list[ev.Instruction]:
        said = []
        for event in events:
            instructions = self.machine.handle(event)
            self.world.carry_out(instructions)
            said += instructions
        self.machine.check()
        return said

    def commit(self, *numbers: int) -> None:
        for number in numbers:
            key = key_of(number)
            self.tell(ev.Committed(ROOT, parent_of(number), [key], [self.world.place(HOST, key)], 0.0, depth_of(number)))

    def use(self, *numbers: int, now_s: float = 0.0) -> None:
        self.tell(ev.Used([key_of(number) for number in numbers], now_s))

    def need(self, nbytes: int = 1, tier: Tier = HOST, **more) -> list[ev.Instruction]:
        return self.tell(ev.Needed(tier, nbytes, **more))

    def finish(self, number: int, target: Tier) -> list[ev.Instruction]:
        """Finish the last requested copy, which must be this one."""
        copy = self.world.copies.pop()
        assert (copy.key, copy.target) == (key_of(number), target)
        return self.tell(ev.Copied(copy.key, self.world.place(target, copy.key)))

    def demote(self, number: int, target: Tier = DISK) -> None:
        """Demote the oldest leaf in host memory, which must be `number`."""
        self.need()
        self.finish(number, target)

    def lose(self, number: int, tier: Tier = DISK) -> None:
        self.tell(ev.Lost(key_of(number), self.machine.blocks[key_of(number)].copies[tier]))

    def tiers(self, number: int) -> set[Tier]:
        block = self.machine.blocks.get(key_of(number))
        return set(block.copies) if block else set()

    def segment(self, number: int, tier: Tier = DISK) -> int:
        return self.machine.blocks[key_of(number)].copies[tier].segment
