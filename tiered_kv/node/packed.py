"""Blocks that are complete in a reserved extent of host memory but not visible yet."""

from collections.abc import Sequence
from typing import NamedTuple

from tiered_kv.blocks import BlockInfo, Location
from tiered_kv.keys import BlockKey
from tiered_kv.store import events as ev


class Packed(NamedTuple):
    """A block that is complete in an extent but not visible yet. `error`: the lossy error of its raw bytes.

    `digest`: the digest of its bytes (`ExtentHeaders.digest`); None if they have not been hashed yet.
    """

    info: BlockInfo
    location: Location
    error: float = 0.0
    digest: int | None = None


def runs_of_packed(packed: Sequence[Packed], now_s: float) -> list[ev.Committed]:
    """Returns the blocks as runs in which each block is the parent of the next. In `packed`, parents must be before their children."""
    runs: list[ev.Committed] = []
    keys: list[BlockKey] = []
    locations: list[Location] = []
    for (key, parent, root, depth), location, *_ in packed:
        if not keys or keys[-1] != parent:
            assert root is not None, "a block that is committed has a root"
            keys, locations = [], []
            runs.append(ev.Committed(root, parent, keys, locations, now_s, depth))
        keys.append(key)
        locations.append(location)
    return runs
