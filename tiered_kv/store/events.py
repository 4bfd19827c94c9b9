"""The words between the machine and the engine: what happened (events), what to do (instructions). Pure data.

`now_s` is the node's clock. Keys of one chain come root first.
"""

from collections.abc import Sequence
from typing import NamedTuple

from tiered_kv.blocks import Hint, Location, Tier
from tiered_kv.keys import BlockKey


class Committed(NamedTuple):
    """A run of one chain lies complete in host memory: each key at its location, the first one behind `parent`.

    `depth`: how many blocks stand before the first one; None: not known.
    """

    root: BlockKey
    parent: BlockKey | None
    keys: Sequence[BlockKey]
    locations: Sequence[Location]
    now_s: float
    depth: int | None = None


class Recovered(NamedTuple):
    """A block was found at `location`, in what a former node or a checkpoint left; the least recently used is told first.

    Nobody used it now; it had `uses` before, its store among them.
    """

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey | None
    location: Location
    depth: int | None = None
    uses: int = 1


class Ranked(NamedTuple):
    """Of these blocks the later ones are the more likely to be used again. Nobody used them now."""

    keys: Sequence[BlockKey]


class Used(NamedTuple):
    """A worker used a run of one chain."""

    keys: Sequence[BlockKey]
    now_s: float


class Wanted(NamedTuple):
    """A worker waits for these blocks, which it cannot read where they are: on a device that it does not see, or in objects."""

    keys: Sequence[BlockKey]


class Needed(NamedTuple):
    """`nbytes` more are needed in `tier` for the blocks `keys` of a chain that grows at `tail`, whose ancestors should stay.

    `queue_bytes`: how much may be sent to the tier below now; beyond it the tier below is too slow. `shrink`: whether blocks that
    could take fewer bytes where they are may be asked to, before any goes.
    """

    tier: Tier
    nbytes: int
    tail: BlockKey | None = None
    keys: Sequence[BlockKey] = ()
    now_s: float = 0.0
    queue_bytes: float = float("inf")
    shrink: bool = True


class Crowded(NamedTuple):
    """The index has no slots left for `count` more blocks of a chain that grows at `tail` (whose ancestors should stay)."""

    count: int
    tail: BlockKey | None = None
    now_s: float = 0.0


class Unmounted(NamedTuple):
    """Blocks of which there is nothing but what a mounted checkpoint has take too many slots: the last `count` shall go."""

    count: int


class Copied(NamedTuple):
    """A copy is complete: the block lies at `location` as well, or instead where that is in the source's own tier."""

    key: BlockKey
    location: Location


class CopyFailed(NamedTuple):
    """A copy to `target` did not succeed; the source is as it was. `again`: another try may, when there is more room."""

    key: BlockKey
    target: Tier
    again: bool = True


class Lost(NamedTuple):
    """The copy of a block at `location` is gone or not to be trusted."""

    key: BlockKey
    location: Location


class Aging(NamedTuple):
    """A segment of `tier`, with these blocks, is among the next to go: now is the time to copy them down."""

    tier: Tier
    segment: int
    keys: Sequence[BlockKey]


class Moved(NamedTuple):
    """A block that was in `segment` lies at `location`, in another segment of the same tier, instead."""

    key: BlockKey
    segment: int
    location: Location


class Emptied(NamedTuple):
    """A segment of `tier` goes now, and with it the copies of these blocks that are still in it."""

    tier: Tier
    segment: int
    keys: Sequence[BlockKey]


class Hinted(NamedTuple):
    """What a worker knows of the future of the chain whose deepest block is `tail`."""

    tail: BlockKey
    hint: Hint
    now_s: float


class Pinned(NamedTuple):
    """Somebody reads a copy of the block in memory; it stays until `Unpinned`, which must follow. May be said several times."""

    key: BlockKey


class Unpinned(NamedTuple):
    """The reader of a `Pinned` is done."""

    key: BlockKey


Event = (
    Committed
    | Recovered
    | Ranked
    | Used
    | Wanted
    | Needed
    | Crowded
    | Unmounted
    | Copied
    | CopyFailed
    | Lost
    | Aging
    | Moved
    | Emptied
    | Hinted
    | Pinned
    | Unpinned
)


class Show(NamedTuple):
    """Readers shall find the block at `location` (its fastest copy)."""

    key: BlockKey
    location: Location


class Hide(NamedTuple):
    """Readers shall not find the block any more: it has no copy left."""

    key: BlockKey


class Free(NamedTuple):
    """The bytes at `location` are not needed any more. Comes after the `Show` or `Hide` that ends their use."""

    key: BlockKey
    location: Location


class Copy(NamedTuple):
    """Copy a block from `source` to the tier `target`, then report `Copied` or `CopyFailed`.

    Where `target` is the source's own tier, the copy is to take fewer bytes. `depth`: how many blocks stand before it in its chain,
    None if that is not known; `is_tail`: no block behind it is known. `gain`: bytes that its tier has more room for afterwards, about.
    """

    key: BlockKey
    root: BlockKey | None
    parent: BlockKey | None
    source: Location
    target: Tier
    depth: int | None = None
    is_tail: bool = False
    gain: int = 0


Instruction = Show | Hide | Free | Copy
