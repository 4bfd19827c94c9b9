"""A world of dictionaries that carries out the machine's instructions, and asserts that readers can rely on its state."""

from collections.abc import Mapping
from hashlib import blake2b

from tiered_kv.blocks import Location, Tier
from tiered_kv.policy import History, create_history, create_policy
from tiered_kv.store import events as ev
from tiered_kv.store.machine import StoreMachine

HOST_BYTES = 100
FRAME_BYTES = 110
CODED_BYTES = 60
IN_MEMORY = (Tier.DEVICE, Tier.HOST)


def key_of(number: int) -> bytes:
    return blake2b(str(number).encode(), digest_size=32).digest()


def parent_of(number: int) -> bytes | None:
    """Returns the parent of a block. Blocks 1, 2, … form one binary tree."""
    return key_of(number // 2) if number > 1 else None


def depth_of(number: int) -> int:
    """Returns how many ancestors a block of the tree has."""
    return number.bit_length() - 1


def machine_of(
    capacities: Mapping[Tier, int], policy: str = "lru", history: History | None = None, *, shrinks: bool = False
) -> StoreMachine:
    """Returns a machine for these tiers."""
    history = history or (create_history() if policy == "adaptive" else History())
    policies = {tier: create_policy(policy, history, nbytes) for tier, nbytes in capacities.items() if tier in IN_MEMORY}
    return StoreMachine(capacities, policies, history, shrinks=shrinks)


class World:
    """The blocks by location, the locations shown to readers, and the requested copies that are not done.

    Every instruction is checked against what it may do at that moment. Lower tiers have segments of two blocks.
    """

    def __init__(self) -> None:
        self.content: dict[Location, bytes] = {}
        self.shown: dict[bytes, Location] = {}
        self.copies: list[ev.Copy] = []
        self.pinned: list[bytes] = []
        self._next = 0

    def place(self, tier: Tier, key: bytes, coded: bool = False) -> Location:
        """Store a block, or its `coded` form, at a new location in a tier. Returns the location."""
        self._next += 1
        nbytes, segment = (HOST_BYTES, 0) if tier in IN_MEMORY else (FRAME_BYTES, self._next // 2)
        location = Location(tier, int(coded), segment, self._next, CODED_BYTES if coded else nbytes, HOST_BYTES)
        self.content[location] = key
        return location

    def bytes_in(self, tier: Tier) -> int:
        return sum(location.stored_bytes for location in self.content if location.tier is tier)

    def segments(self, tier: Tier) -> dict[int, list[bytes]]:
        """Returns the blocks of each segment of a lower tier."""
        found: dict[int, list[bytes]] = {}
        for location, key in self.content.items():
            if location.tier is tier:
                found.setdefault(location.segment, []).append(key)
        return found

    def carry_out(self, instructions: list[ev.Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case ev.Show(key, location):
                    assert self.content[location] == key, "readers are shown a place that does not hold the block"
                    self.shown[key] = location
                case ev.Hide(key):
                    del self.shown[key]
                case ev.Free(key, location):
                    self._free(key, location)
                case ev.Copy():
                    self._copy(instruction)
            self.check_readers()

    def _copy(self, copy: ev.Copy) -> None:
        assert self.content[copy.source] == copy.key
        held = [location.tier for location, key in self.content.items() if key == copy.key]
        assert copy.target not in held or copy.target in IN_MEMORY, "written twice"
        self.copies.append(copy)

    def _free(self, key: bytes, location: Location) -> None:
        assert self.shown.get(key) != location, "freed while readers are shown it"
        in_memory = location.tier in IN_MEMORY
        assert not (in_memory and any(copy.source == location for copy in self.copies)), "freed while it is copied"
        assert not (in_memory and key in self.pinned) or self.is_elsewhere(key, location), "freed while it is read"
        assert self.content.pop(location) == key

    def is_elsewhere(self, key: bytes, location: Location) -> bool:
        """Returns whether another location in memory has the block, so that readers do not use this one."""
        return any(other != location and other.tier in IN_MEMORY and held == key for other, held in self.content.items())

    def check_readers(self) -> None:
        assert all(self.content[location] == key for key, location in self.shown.items())
