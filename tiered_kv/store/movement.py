"""Which way a block goes: down when its room is needed, up when it is used. Rules only; the machine keeps the books.

Tiers from fast to slow: device, host, disk, objects, a mounted checkpoint, to which nothing is copied; all but host are
optional. Written once: a copy in a lower tier stays when the block is promoted, so that giving up the faster copy again costs
nothing. (Moving instead of copying writes up to 21 times more on coding sessions: `docs/design`.)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tiered_kv.blocks import Location, Tier
from tiered_kv.keys import BlockKey
from tiered_kv.policy import History

USES_FOR_DEVICE = 2  # stored once and used once: the least that can be called reuse
USES_FOR_FULL_TIER = 2
CHANCE_FOR_FULL_TIER = 0.05
PROMOTED_SHARE = 1 / 2  # of a tier in memory: a chain larger than that comes up with its beginning
ROOMY_SHARE = 7 / 8  # up to this share of its cap a lower tier takes everything
REFUSED_KEPT = 1 << 16
REINSERT_SHARE = 0.2  # of a segment; writes then are at most 1 / (1 - 0.2) = 1.25 times what was demoted

RESTORE_FACTOR = {Tier.HOST: 0.1, Tier.DISK: 0.25, Tier.OBJECTS: 0.5, Tier.CHECKPOINT: 0.5}
"""What getting a block back from a lower tier costs, as a share of computing it again."""


class Fate(StrEnum):
    """What becomes of a copy whose room is needed; the value is the name under which it is counted."""

    FREED = "freed"  # another copy is there
    LEAVES = "leaves"  # it is copied to a lower tier first
    DROPPED = "dropped"  # no lower tier, or it refused this block
    NOT_ADMITTED = "not_admitted"  # the lower tier is full, and nothing says that the block will be used again
    UNDER_PRESSURE = "dropped_under_pressure"  # the lower tier is too slow


@dataclass(slots=True)
class Block:
    """What the machine knows of one block: its place in the chain, its copies, and its use.

    `copying_to`: where a copy of it is under way. `leaving`: the tier that it leaves once that copy is there.
    `refused`: the last try to copy it down failed. `used_below`: it was used since it was written to a lower tier.
    `depth`: how many blocks are before it in its chain, None if nobody has said. `linked`: its depth fits that of `parent`, which is a
    claim until then (see `chains`).
    """

    parent: BlockKey | None
    root: BlockKey | None
    depth: int | None = None
    linked: bool = False
    copies: dict[Tier, Location] = field(default_factory=dict)
    uses: int = 1
    copying_to: Tier | None = None
    leaving: Tier | None = None
    refused: bool = False
    used_below: bool = False

    @property
    def link(self) -> BlockKey | None:
        """The parent, if it is more than a claim: following links always ends."""
        return self.parent if self.linked else None

    @property
    def best(self) -> Location:
        """The copy in the fastest tier."""
        return self.copies[min(self.copies)]

    def restore_factor(self, tier: Tier) -> float:
        """What getting it back into `tier` would cost if that copy were gone; 1: computing it again."""
        return min((RESTORE_FACTOR[other] for other in self.copies if other > tier), default=1.0)


class Movement:
    """The rules, for the tiers that there are and the bytes that are in them (`bytes_by_tier`, kept by the machine)."""

    def __init__(self, capacities: Mapping[Tier, int], bytes_by_tier: Mapping[Tier, int], history: History) -> None:
        self._capacities = capacities
        self._bytes = bytes_by_tier
        self._history = history
        self._refused: dict[BlockKey, None] = {}
        self._present = sorted(capacities)

    def target(self, key: BlockKey, block: Block, tier: Tier) -> Tier | None:
        """The nearest tier below that should take the block: of the device tier host, of host the first that admits it."""
        lower = [other for other in self._present if other > tier]
        if tier is Tier.DEVICE:
            return lower[0]
        return next((other for other in lower if self.admits(other, key, block)), None)

    def fate(self, key: BlockKey, block: Block, tier: Tier, queue_bytes: float) -> Fate:
        """What becomes of the block's copy in `tier`, a tier in memory; changes nothing.

        A block whose other copy is on the device gets one below all the same, if it is worth a write: then it can leave
        the device for nothing.
        """
        alone = len(block.copies) == 1
        if not alone and max(block.copies) > tier:
            return Fate.FREED
        if self._present[-1] is tier or block.refused:
            fate = Fate.DROPPED
        elif block.copies[tier].stored_bytes > queue_bytes:
            fate = Fate.UNDER_PRESSURE
        else:
            fate = Fate.LEAVES if self.target(key, block, tier) else Fate.NOT_ADMITTED
        return fate if alone or fate is Fate.LEAVES else Fate.FREED

    def admits(self, tier: Tier, key: BlockKey, block: Block) -> bool:
        """Whether a block may be written to `tier`: there is room, or something says that it will be used again.

        That is: it was; or it comes a second time, for the keys of REFUSED_KEPT refused blocks are remembered (a
        doorkeeper: Einziger et al., TinyLFU, 2017); or blocks of its kind are likely to be used while they lie there. How
        long that is: as many times its age, which is how long memory kept it, as the tier is larger than memory.
        """
        if self._bytes[tier] < ROOMY_SHARE * self._capacities[tier]:
            return True
        if block.uses >= USES_FOR_FULL_TIER or key in self._refused or self._history.uses(key) >= USES_FOR_FULL_TIER:
            return True
        faster_bytes = sum(nbytes for other, nbytes in self._capacities.items() if other < tier)
        return self._history.chance(key, self._capacities[tier] / faster_bytes) >= CHANCE_FOR_FULL_TIER

    def not_admitted(self, key: BlockKey) -> None:
        """Remember that the block was given up for lack of evidence."""
        self._refused[key] = None
        if len(self._refused) > REFUSED_KEPT:
            del self._refused[next(iter(self._refused))]

    def promotions(self, used: Iterable[tuple[BlockKey, Block]]) -> Iterator[tuple[BlockKey, Block, Tier]]:
        """Which of the blocks of a chain that was just used, root first, should be copied to which faster tier."""
        room = {tier: nbytes * PROMOTED_SHARE for tier, nbytes in self._capacities.items()}
        for key, block in used:
            target = self._promotion(block)
            if target is not None:
                room[target] -= block.best.raw_bytes
                if room[target] >= 0:
                    yield key, block, target

    def _promotion(self, block: Block) -> Tier | None:
        if block.copying_to is not None or Tier.DEVICE in block.copies:
            return None
        if Tier.HOST not in block.copies:
            return Tier.HOST
        return Tier.DEVICE if Tier.DEVICE in self._capacities and block.uses >= USES_FOR_DEVICE else None

    def wanted(self, tier: Tier, blocks: Iterable[tuple[BlockKey, Block]], budget_bytes: float) -> list[BlockKey]:
        """Of the blocks of a segment that goes, those to write again: used since they were written, the most used first.

        Of objects none: they would have to be fetched for it.
        """
        if tier is not Tier.DISK:
            return []
        candidates = [(key, block) for key, block in blocks if block.used_below and min(block.copies) is tier]
        candidates.sort(key=lambda each: each[1].uses, reverse=True)
        chosen = []
        for key, block in candidates:
            budget_bytes -= block.copies[tier].stored_bytes
            if budget_bytes < 0:
                break
            chosen.append(key)
        return chosen

    def check(self) -> None:
        """Assert that memory is bounded and every tier is within its cap."""
        assert len(self._refused) <= REFUSED_KEPT
        for tier, capacity_bytes in self._capacities.items():
            assert 0 <= self._bytes[tier] <= capacity_bytes, f"{self._bytes[tier]} bytes in {tier.label}, {capacity_bytes} allowed"
