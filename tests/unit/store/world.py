"""A world of dictionaries in which the machine's instructions come true, or break what readers rely on."""

from tiered_kv.blocks import Location, Tier
from tiered_kv.store import events as ev

HOST_BYTES = 100
FRAME_BYTES = 110


def key_of(number: int) -> bytes:
    return number.to_bytes(32, "big")


def parent_of(number: int) -> bytes | None:
    """Blocks 1, 2, … as one binary tree."""
    return key_of(number // 2) if number > 1 else None


class World:
    """Places by location, what readers are shown, and copies that were asked for and are not done.

    Every instruction is checked against what it may do at that moment.
    """

    def __init__(self) -> None:
        self.content: dict[Location, bytes] = {}
        self.shown: dict[bytes, Location] = {}
        self.copies: list[ev.Copy] = []
        self.pinned: list[bytes] = []
        self._next_offset = 0

    def place(self, tier: Tier, key: bytes) -> Location:
        """A new place in a tier, with the block in it."""
        self._next_offset += 1
        location = Location(tier, 0, 0, self._next_offset, HOST_BYTES if tier is Tier.HOST else FRAME_BYTES, HOST_BYTES)
        self.content[location] = key
        return location

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
                    assert self.content[instruction.source] == instruction.key
                    self.copies.append(instruction)
            self.check_readers()

    def _free(self, key: bytes, location: Location) -> None:
        assert self.shown.get(key) != location, "freed while readers are shown it"
        assert all(copy.source != location for copy in self.copies if location.tier is Tier.HOST), "freed while it is copied"
        assert location.tier is not Tier.HOST or key not in self.pinned or self.content_elsewhere(key, location), "freed while it is read"
        assert self.content.pop(location) == key

    def content_elsewhere(self, key: bytes, location: Location) -> bool:
        """Whether another host place holds the block: this one is a surplus copy that nobody ever saw."""
        return any(other != location and other.tier is Tier.HOST and held == key for other, held in self.content.items())

    def check_readers(self) -> None:
        assert all(self.content[location] == key for key, location in self.shown.items())
