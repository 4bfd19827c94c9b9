"""Ended roots, whose blocks are dropped and may not be added again: their weight epoch has ended, or they are being purged.

To purge is to drop all blocks of a model or tenant on all nodes. A copy or a reader may still use the bytes of a dropped block.
"""

from collections.abc import Iterable

from tiered_kv.blocks import Location
from tiered_kv.keys import BlockKey
from tiered_kv.store import events as ev


class Late:
    """The bytes in memory of a dropped block that a copy or a reader still uses. `is_copying`: whether a copy is still running."""

    def __init__(self, is_copying: bool) -> None:
        self.is_copying = is_copying
        self.locations: list[Location] = []


class Endings:
    """The ended `roots` (see above). The bytes of a dropped block are freed once no copy reads them and no reader has pinned the block."""

    def __init__(self) -> None:
        self.roots: set[BlockKey] = set()
        self._late: dict[BlockKey, Late] = {}

    def __bool__(self) -> bool:
        """Returns whether bytes of dropped blocks are still in use."""
        return bool(self._late)

    def deferred(self, key: BlockKey, is_copying: bool, dropping: Iterable[ev.Instruction]) -> list[ev.Instruction]:
        """Returns the instructions `dropping` without those that free the block's memory, because it is in use.

        `released` returns these later.
        """
        late = self._late.setdefault(key, Late(is_copying))
        now: list[ev.Instruction] = []
        for each in dropping:
            if isinstance(each, ev.Free) and each.location.tier in ev.IN_MEMORY:
                late.locations.append(each.location)
            else:
                now.append(each)
        return now

    def copied(self, key: BlockKey) -> None:
        """Note that the copy of a dropped block has ended."""
        if key in self._late:
            self._late[key].is_copying = False

    def released(self, key: BlockKey, is_pinned: bool) -> list[ev.Instruction]:
        """Returns the instructions that free a dropped block's bytes, [] while a copy or a reader still uses them."""
        late = self._late.get(key)
        if late is None or late.is_copying or is_pinned:
            return []
        del self._late[key]
        return [ev.Free(key, location) for location in late.locations]

    def offsets(self) -> list[int]:
        """Returns the offsets in host memory of the bytes that are still in use."""
        return [each.offset for late in self._late.values() for each in late.locations if each.tier is ev.IN_MEMORY[-1]]
