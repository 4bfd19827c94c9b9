"""A block that lies complete in a reserved extent of host memory, before it is visible."""

from collections.abc import Sequence
from typing import NamedTuple

from tiered_kv.blocks import Location
from tiered_kv.keys import BlockKey
from tiered_kv.store import events as ev


class Packed(NamedTuple):
    """`depth`: how many blocks stand before it in its chain. `error`: what raw bytes carry of it.

    `digest`: of its bytes (`ExtentHeaders.digest`); None if they were not hashed yet.
    """

    key: BlockKey
    parent: BlockKey | None
    location: Location
    depth: int
    error: float = 0.0
    digest: int | None = None


def runs_of_packed(root: BlockKey, packed: Sequence[Packed], now_s: float) -> list[ev.Committed]:
    """Returns blocks, root first, as runs in which each block is the parent of the next."""
    runs: list[ev.Committed] = []
    keys: list[BlockKey] = []
    for key, parent, location, depth, *_ in packed:
        if not keys or keys[-1] != parent:
            keys = []
            runs.append(ev.Committed(root, parent, keys, [], now_s, depth))
        keys.append(key)
        runs[-1].locations.append(location)
    return runs
