"""The words between the machine and the engine: what happened (events), what to do (instructions). Pure data."""

from typing import NamedTuple

from tiered_kv.blocks import Location, Tier
from tiered_kv.keys import BlockKey


class Committed(NamedTuple):
    """A block lies complete at `location`. Of one chain, report the deepest block first."""

    key: BlockKey
    parent: BlockKey | None
    root: BlockKey | None
    location: Location


class Touched(NamedTuple):
    """A worker used a block. Of one chain, report the deepest block first."""

    key: BlockKey


class Needed(NamedTuple):
    """`nbytes` more are needed in `tier`, for a chain that grows at `tail` (whose ancestors should stay)."""

    tier: Tier
    nbytes: int
    tail: BlockKey | None = None


class Crowded(NamedTuple):
    """The index has no slots left for `count` more blocks of a chain that grows at `tail` (whose ancestors should stay)."""

    count: int
    tail: BlockKey | None = None


class Copied(NamedTuple):
    """A demotion or promotion is complete: the block lies at `location` as well."""

    key: BlockKey
    location: Location


class CopyFailed(NamedTuple):
    """A demotion or promotion to `target` did not succeed; the source is as it was."""

    key: BlockKey
    target: Tier


class Lost(NamedTuple):
    """The copy of a block on disk is gone or not to be trusted: the one at `location`, or whichever is there."""

    key: BlockKey
    location: Location | None = None


class Pinned(NamedTuple):
    """Somebody reads the block's host copy; it stays until `Unpinned`, which must follow. A block may be pinned several times."""

    key: BlockKey


class Unpinned(NamedTuple):
    """The reader of a `Pinned` is done."""

    key: BlockKey


Event = Committed | Touched | Needed | Crowded | Copied | CopyFailed | Lost | Pinned | Unpinned


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
    """Copy a block from `source` to the tier `target`, then report `Copied` or `CopyFailed`."""

    key: BlockKey
    root: BlockKey | None
    parent: BlockKey | None
    source: Location
    target: Tier


Instruction = Show | Hide | Free | Copy
