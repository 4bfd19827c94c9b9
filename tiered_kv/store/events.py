"""Messages between the store machine and the engine: events report what happened, instructions say what to do. Pure data.

`now_s` is the time of the node's clock. Keys of one chain are ordered from ancestor to descendant.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tiered_kv.blocks import BlockInfo, GoneCause, Hint, Location, Tier
from tiered_kv.keys import BlockKey

IN_MEMORY = (Tier.DEVICE, Tier.HOST)


class Committed(NamedTuple):
    """A worker stored consecutive blocks of one chain in host memory, each key at its location.

    `parent`: the parent of the first block. `depth`: the number of ancestors of the first block, None if unknown.
    """

    root: BlockKey
    parent: BlockKey | None
    keys: Sequence[BlockKey]
    locations: Sequence[Location]
    now_s: float
    depth: int | None = None


class Recovered(NamedTuple):
    """A block was found at `location`, in the files of a former node or in a checkpoint. Report the least recently used block first.

    This is not a use of the block. `uses` is the number of its uses before, of which the store is one.
    """

    info: BlockInfo
    location: Location
    uses: int = 1

    @property
    def key(self) -> BlockKey:
        """The block's key."""
        return self.info.key


class Ranked(NamedTuple):
    """Blocks ordered by how likely they are to be used again, the most likely last. The blocks do not count as used."""

    keys: Sequence[BlockKey]


class Used(NamedTuple):
    """A worker used consecutive blocks of one chain."""

    keys: Sequence[BlockKey]
    now_s: float


class BringRequested(NamedTuple):
    """A worker waits for blocks that it cannot read itself: blocks on a device that it cannot map, in objects, or in a checkpoint."""

    keys: Sequence[BlockKey]


class Needed(NamedTuple):
    """Make room for `nbytes` in `tier`, for the blocks `keys`. `last_block` is a block of their chain; it and its ancestors should stay.

    `queue_bytes`: how many bytes may be queued to be copied to the tier below. Further blocks are dropped, because that tier is
    too slow. `shrink`: whether blocks may be compressed in place before any block is evicted.
    """

    tier: Tier
    nbytes: int
    last_block: BlockKey | None = None
    keys: Sequence[BlockKey] = ()
    now_s: float = 0.0
    queue_bytes: float = float("inf")
    shrink: bool = True


class Limited(NamedTuple):
    """A tenant will exceed its quota in `tier` by `nbytes`: evict blocks of this tenant. `last_block`: as for `Needed`."""

    tenant: str
    tier: Tier
    nbytes: int
    last_block: BlockKey | None = None
    now_s: float = 0.0


class Crowded(NamedTuple):
    """The index lacks `slots` slots for new blocks. `last_block` is a block of their chain; it and its ancestors should stay."""

    slots: int
    last_block: BlockKey | None = None
    now_s: float = 0.0


class Ending(NamedTuple):
    """The node is about to end: copy these blocks from memory to the disk tier, in this order. They also stay in memory."""

    keys: Sequence[BlockKey]


class Unmounted(NamedTuple):
    """Index slots are short: drop the `slots` most recently mounted blocks that exist only in the checkpoint."""

    slots: int


class Copied(NamedTuple):
    """A copy is complete: the block is now also at `location`. If that is in the same tier as the source, it replaces the source."""

    key: BlockKey
    location: Location


class CopyFailed(NamedTuple):
    """A copy to `target` failed. The source is unchanged. `again`: whether the copy may succeed once there is more room."""

    key: BlockKey
    target: Tier
    again: bool = True


class Lost(NamedTuple):
    """The copy of a block at `location` is missing or damaged, or must be dropped for another `cause`."""

    key: BlockKey
    location: Location
    cause: GoneCause = GoneCause.DAMAGED


class Ended(NamedTuple):
    """From now on no block of the hash roots `roots` may become visible.

    Those of the blocks `keys` whose root has ended are dropped in all tiers.
    """

    roots: Sequence[BlockKey] = ()
    keys: Sequence[BlockKey] = ()


class Reopened(NamedTuple):
    """Blocks of these hash roots may become visible again, because a purge has ended."""

    roots: Sequence[BlockKey]


class Aging(NamedTuple):
    """A segment of `tier` with these blocks will soon be removed: copy the blocks to a lower tier now."""

    tier: Tier
    segment: int
    keys: Sequence[BlockKey]


class Moved(NamedTuple):
    """A block was rewritten: it moved from `segment` to `location`, in another segment of the same tier."""

    key: BlockKey
    segment: int
    location: Location


class Emptied(NamedTuple):
    """A segment of `tier` is about to be removed, with the copies of these blocks that are still in it."""

    tier: Tier
    segment: int
    keys: Sequence[BlockKey]


class Hinted(NamedTuple):
    """A worker's hint about the future use of the chain whose deepest block is `last_block`."""

    last_block: BlockKey
    hint: Hint
    now_s: float


class Pinned(NamedTuple):
    """A reader uses a copy of the block in memory. The copy stays until there were as many `Unpinned` as `Pinned` events for it."""

    key: BlockKey


class Unpinned(NamedTuple):
    """One reader that was reported by `Pinned` has finished."""

    key: BlockKey


Event = (
    Committed
    | Recovered
    | Ranked
    | Used
    | BringRequested
    | Needed
    | Limited
    | Crowded
    | Ending
    | Unmounted
    | Copied
    | CopyFailed
    | Lost
    | Ended
    | Reopened
    | Aging
    | Moved
    | Emptied
    | Hinted
    | Pinned
    | Unpinned
)


class Show(NamedTuple):
    """Make readers find the block at `location`, its fastest copy."""

    key: BlockKey
    location: Location


class Hide(NamedTuple):
    """Make readers miss the block: it has no copy left."""

    key: BlockKey


class Free(NamedTuple):
    """Free the bytes at `location`. A `Show` or `Hide` that makes readers no longer find these bytes always precedes it."""

    key: BlockKey
    location: Location


class Copy(NamedTuple):
    """Copy a block from `source` to the tier `target`, then report `Copied` or `CopyFailed`.

    If `target` is the tier of the source, compress the block in place. `is_last_block`: whether the block has no known child.
    `gain`: about how many bytes the copy will free in the source's tier.
    """

    info: BlockInfo
    source: Location
    target: Tier
    is_last_block: bool = False
    gain: int = 0

    @property
    def key(self) -> BlockKey:
        """The block's key."""
        return self.info.key


Instruction = Show | Hide | Free | Copy
