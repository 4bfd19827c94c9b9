"""A block that lies complete in a reserved extent of host memory, before it is visible."""

from typing import NamedTuple

from tiered_kv.blocks import Location
from tiered_kv.keys import BlockKey


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
