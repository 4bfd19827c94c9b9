"""A mover that uses dictionaries, and an engine on it. A test can delay or fail each step of the mover."""

import threading

from tests.unit.store.world import IN_MEMORY, key_of, machine_of
from tiered_kv.blocks import Location, Tier
from tiered_kv.clock import SystemClock
from tiered_kv.store import events as ev
from tiered_kv.store.engine import BlockFormat, Engine, FillOutcome, Room

PATIENCE_S = 30.0
NBYTES = 100
DEVICE, HOST, DISK, OBJECTS, CHECKPOINT = Tier


class Index(dict):
    """The index as a dictionary. The next harvest returns `touched`, the deepest block of a chain first."""

    def __init__(self) -> None:
        super().__init__()
        self.touched: list[bytes] = []

    def put(self, key: bytes, location: Location) -> None:
        self[key] = location

    def remove(self, key: bytes) -> None:
        del self[key]

    def harvest(self) -> list[tuple[bytes, int, int]]:
        touched, self.touched = self.touched, []
        return [(key, 1, tick) for tick, key in enumerate(touched)]


class Mover:
    """A mover with `slots` extents of NBYTES in each memory tier, and at most `segments` segments of two blocks in each lower tier."""

    def __init__(self, tiers: list[Tier], slots: int, segments: int) -> None:
        self.free_slots = {tier: list(range(slots)) for tier in tiers if tier in IN_MEMORY}
        self.taken: dict[Tier, set[int]] = {tier: set() for tier in self.free_slots}
        self.segments_max = segments
        self.segments: dict[Tier, dict[int, list[bytes]]] = {tier: {} for tier in tiers if tier not in IN_MEMORY}
        self.append_allowed = {tier: threading.Event() for tier in self.segments}
        self.fill_allowed = threading.Event()
        for event in (self.fill_allowed, *self.append_allowed.values()):
            event.set()
        self.entered = threading.Event()
        self.failure: Exception | None = None
        self.coding_failure: Exception | None = None
        self.coded_bytes = NBYTES // 2
        self.codings: list[bytes] = []
        self.refused = False
        self.outcome: FillOutcome | None = None
        self.ages = False
        self.reinserted: list[bytes] = []
        self.next_segment = 0

    def fits(self, tier: Tier, nbytes: int) -> bool:
        return nbytes <= NBYTES

    def form(self, copy: ev.Copy) -> BlockFormat:
        return BlockFormat(0, NBYTES)

    def coded(self, copy: ev.Copy) -> memoryview:
        self.codings.append(copy.key)
        if self.coding_failure:
            raise self.coding_failure
        return memoryview(bytes(NBYTES if copy.target is not copy.source.tier else self.coded_bytes))

    def keep(self, copy: ev.Copy, coded: memoryview, offset: int) -> Location:
        return Location(copy.target, 1, 0, offset, coded.nbytes, NBYTES)

    def settle_in(self) -> None:
        pass

    def reserve(self, tier: Tier, nbytes: int, count: int, room: Room) -> list[int]:
        assert room in Room
        assert nbytes <= NBYTES
        free = self.free_slots[tier]
        taken, self.free_slots[tier] = free[:count], free[count:]
        self.taken[tier].update(taken)
        return taken

    def free(self, location: Location) -> None:
        if location.tier in self.taken:
            self.taken[location.tier].remove(location.offset)
            self.free_slots[location.tier].append(location.offset)
        elif location.segment in self.segments[location.tier]:
            self.segments[location.tier][location.segment].remove(location.offset.to_bytes(32, "big"))

    def _enter(self, allowed: threading.Event) -> None:
        self.entered.set()
        assert allowed.wait(PATIENCE_S)
        if self.failure:
            raise self.failure

    def batch_bytes(self, tier: Tier) -> int:
        return 2 * NBYTES

    def append(self, tier: Tier, copies: list[ev.Copy], coded: list[memoryview]) -> list[Location | None]:
        assert list(map(len, coded)) == [NBYTES] * len(copies)
        self._enter(self.append_allowed[tier])
        return [None] * len(copies) if self.refused else self._write(tier, [copy.key for copy in copies])

    def _write(self, tier: Tier, keys: list[bytes]) -> list[Location]:
        assert len(self.segments[tier]) <= self.segments_max, "the cap was passed"
        self.next_segment += 1
        self.segments[tier][self.next_segment] = list(keys)
        return [Location(tier, 0, self.next_segment, int.from_bytes(key, "big"), NBYTES, NBYTES) for key in keys]

    def fill(self, copies: list[ev.Copy], locations: list[Location]) -> list[FillOutcome]:
        self._enter(self.fill_allowed)
        return [self.outcome or (FillOutcome.DONE if self._is_there(copy) else FillOutcome.GONE) for copy in copies]

    def _is_there(self, copy: ev.Copy) -> bool:
        tier, _, segment, *_ = copy.source
        return tier in IN_MEMORY or copy.key in self.segments[tier].get(segment, ())

    def segment_to_go(self, tier: Tier, sizes: list[int]) -> int | None:
        return min(self.segments[tier]) if len(self.segments[tier]) >= self.segments_max else None

    def segment_to_age(self, tier: Tier) -> int | None:
        return min(self.segments[tier], default=None) if self.ages else None

    def keys_in(self, tier: Tier, segment: int) -> list[bytes]:
        return list(self.segments[tier][segment])

    def segment_bytes(self, tier: Tier) -> int:
        return 10 * NBYTES

    def reinsert(self, tier: Tier, segment: int, keys: list[bytes]) -> list[tuple[bytes, Location]]:
        self.reinserted += keys
        return list(zip(keys, self._write(tier, keys), strict=True))

    def drop_segment(self, tier: Tier, segment: int) -> None:
        del self.segments[tier][segment]


class Bench:
    """An engine on fakes, with short methods for the steps of a test."""

    def __init__(
        self,
        *tiers: Tier,
        slots: int = 4,
        segments: int = 8,
        io_threads: int = 2,
        queue_bytes: int = 1 << 20,
        shrinks: bool = False,
    ) -> None:
        self.index, self.mover = Index(), Mover(list(tiers), slots, segments)
        machine = machine_of({tier: slots * NBYTES if tier in IN_MEMORY else 100 * NBYTES for tier in tiers}, shrinks=shrinks)
        self.engine = Engine(machine, self.index, self.mover, SystemClock(), io_threads, queue_bytes=queue_bytes)

    def store(self, *numbers: int, wait_s: float = PATIENCE_S) -> list[bool]:
        """Store blocks without parents, one by one. Returns, for each, whether there was room."""
        stored = []
        for number in numbers:
            key = key_of(number)
            offsets = self.engine.reserve(NBYTES, [key], None, wait_s)
            for offset in offsets:
                self.engine.handle([ev.Committed(bytes(32), None, [key], [Location(HOST, 0, 0, offset, NBYTES, NBYTES)], 0.0)])
            stored.append(bool(offsets))
        return stored

    def touch(self, *numbers: int) -> None:
        self.index.touched = [key_of(number) for number in numbers]
        self.engine.drain_touches()
        self.engine.settle()

    def tier(self, number: int) -> Tier | None:
        location = self.index.get(key_of(number))
        return location and location.tier

    def let_go(self) -> None:
        for event in (self.mover.fill_allowed, *self.mover.append_allowed.values()):
            event.set()

    def check(self) -> None:
        machine = self.engine.machine
        self.engine.check()
        assert self.index == {key: block.best for key, block in machine.blocks.items()}
        for tier, taken in self.mover.taken.items():
            held = [block.copies[tier].offset for block in machine.blocks.values() if tier in block.copies]
            assert sorted(held) == sorted(taken), f"an extent of {tier.label} leaked"
