"""Rules of demotion and promotion: blocks move down when their room is needed, up when they are used. The machine keeps the state.

Tiers from fast to slow: device, host, disk, objects, a mounted checkpoint. All but host are optional; nothing is copied to a checkpoint.
Blocks are written to a lower tier once: that copy stays when the block is promoted, so dropping the faster copy later costs nothing.
(Moving instead of copying writes up to 21 times more on coding sessions: `docs/design`.)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from tiered_kv.blocks import Location, Tier
from tiered_kv.keys import BlockKey
from tiered_kv.policy import History

USES_FOR_DEVICE = 2  # the store is the first use, so 2 is the smallest number that means reuse
USES_FOR_FULL_TIER = 2
CHANCE_FOR_FULL_TIER = 0.05
PROMOTED_SHARE = 1 / 2  # of a tier in memory; of a chain larger than this, only the first blocks are promoted
ROOMY_SHARE = 7 / 8  # below this share of its cap a lower tier admits everything
REFUSED_KEPT = 1 << 16
REINSERT_SHARE = 0.2  # of a segment; so at most 1 / (1 - 0.2) = 1.25 times the demoted bytes are written

RESTORE_FACTOR = {Tier.HOST: 0.1, Tier.DISK: 0.25, Tier.OBJECTS: 0.5, Tier.CHECKPOINT: 0.5}
"""Cost of restoring a block from a lower tier, as a share of the cost of computing it again."""


class Fate(StrEnum):
    """What happens to a copy of a block when its room is needed. The value is the name of the counter for this outcome."""

    FREED = "freed"  # another copy exists
    LEAVES = "leaves"  # it is first copied to a lower tier
    DROPPED = "dropped"  # there is no lower tier, or it refused this block
    NOT_ADMITTED = "not_admitted"  # the lower tier is full, and nothing suggests that the block will be used again
    UNDER_PRESSURE = "dropped_under_pressure"  # the lower tier is too slow


@dataclass(slots=True)
class Block:
    """The machine's record of one block: its place in the chain, its copies, and its uses.

    `copying_to`: the tier to which the block is being copied. `leaving`: the tier from which the block is dropped once this copy is
    complete. `refused`: the last attempt to copy the block to a lower tier failed. `used_below`: the block was used since it was
    written to a lower tier. `depth`: the number of its ancestors, None if unknown. `linked`: whether its depth fits the depth of
    `parent`; until then `parent` is only a claim (see `chains`). `tenant`: the tenant of its root, "" if unknown.
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
    tenant: str = ""

    @property
    def link(self) -> BlockKey | None:
        """The parent if it is linked, else None. Following links always ends."""
        return self.parent if self.linked else None

    @property
    def best(self) -> Location:
        """The copy in the fastest tier."""
        return self.copies[min(self.copies)]

    def restore_factor(self, tier: Tier) -> float:
        """Returns the cost of restoring the block's copy in `tier` if it were lost, as a share of the cost of computing it again.

        The share is 1 if no lower tier has the block.
        """
        return min((RESTORE_FACTOR[other] for other in self.copies if other > tier), default=1.0)


class Movement:
    """The rules of demotion and promotion. `bytes_by_tier`: the bytes in each tier now; the machine updates it in place."""

    def __init__(self, capacities: Mapping[Tier, int], bytes_by_tier: Mapping[Tier, int], history: History) -> None:
        self._capacities = capacities
        self._bytes = bytes_by_tier
        self._history = history
        self._refused: dict[BlockKey, None] = {}
        self._present = sorted(capacities)

    def target(self, key: BlockKey, block: Block, tier: Tier) -> Tier | None:
        """Returns the tier that should receive the block from `tier`: host from the device, else the next lower tier that admits it.

        Returns None if no lower tier admits it.
        """
        lower = [other for other in self._present if other > tier]
        if tier is Tier.DEVICE:
            return lower[0]
        return next((other for other in lower if self.admits(other, key, block)), None)

    def fate(self, key: BlockKey, block: Block, tier: Tier, queue_bytes: float) -> Fate:
        """Returns what would happen to the block's copy in `tier`, a tier in memory, if it were evicted. Changes nothing.

        A block whose only other copy is on the device is still copied to a lower tier if it is worth a write: then it can
        later leave the device at no cost.
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
        """Returns whether a block may be written to `tier`: the tier has room, or the block is likely to be used again.

        A use is likely in three cases. The block was used before. Or it was refused before: the keys of the last REFUSED_KEPT refused
        blocks are remembered (a doorkeeper: Einziger et al., TinyLFU, 2017). Or similar blocks are likely to be used during their stay
        in the tier. The stay is estimated as the block's age (how long the faster tiers kept it) times the ratio of this tier's size
        to theirs.
        """
        if self._bytes[tier] < ROOMY_SHARE * self._capacities[tier]:
            return True
        if block.uses >= USES_FOR_FULL_TIER or key in self._refused or self._history.uses(key) >= USES_FOR_FULL_TIER:
            return True
        faster_bytes = sum(nbytes for other, nbytes in self._capacities.items() if other < tier)
        return self._history.chance(key, self._capacities[tier] / faster_bytes) >= CHANCE_FOR_FULL_TIER

    def not_admitted(self, key: BlockKey) -> None:
        """Remember that no lower tier admitted the block, because nothing suggested another use, and that it was dropped."""
        self._refused[key] = None
        if len(self._refused) > REFUSED_KEPT:
            del self._refused[next(iter(self._refused))]

    def promotions(self, used: Iterable[tuple[BlockKey, Block]]) -> Iterator[tuple[BlockKey, Block, Tier]]:
        """Yields the blocks to promote, with their target tiers. `used`: the blocks of a chain just used, ancestors first."""
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
        """Returns the blocks of a segment about to be removed that are worth rewriting, of at most `budget_bytes` in all.

        These are the blocks that were used since they were written, the most used first. Returns [] for objects, because
        the blocks would have to be fetched first.
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
        """Assert that at most REFUSED_KEPT refused keys are remembered, and that every tier is within its cap."""
        assert len(self._refused) <= REFUSED_KEPT
        for tier, capacity_bytes in self._capacities.items():
            assert 0 <= self._bytes[tier] <= capacity_bytes, f"{self._bytes[tier]} bytes in {tier.label}, {capacity_bytes} allowed"
