"""What a node finds in its files when it starts: the blocks that a former node of the same ids has left, in every tier."""

import logging
from collections.abc import Callable, Mapping
from functools import partial

from tiered_kv.blocks import Location, Tier
from tiered_kv.codecs.frame import carried_error
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.memory.index import IndexWriter
from tiered_kv.node.allowance import Allowance
from tiered_kv.store import events as ev
from tiered_kv.tiers.host import HostTier
from tiered_kv.tiers.log import LogTier

log = logging.getLogger(__name__)

CROWDED_PART = 10
"""With less than one in so many slots of the index free, the lowest tier gives up a segment."""


class Recovery:
    """Used once: made before the device pool, so that no worker takes blocks of the former pool for blocks of the new one.

    `inherited`: whether the files in shared memory were there already. Making it puts the index in order, hides the blocks on the
    device, and reads the footers of the lower tiers; raises for a store that a first start cannot reach: it may be misspelt.
    """

    def __init__(self, index: IndexWriter, host: HostTier, logs: Mapping[Tier, LogTier], allowance: Allowance, *, inherited: bool) -> None:
        self._index = index
        self._host = host
        self._logs = logs
        self._allowance = allowance
        self._inherited = inherited
        self._last_use: dict[BlockKey, int] = {}  # the tick of each block's last use
        self._on_device: dict[BlockKey, int] = {}  # the bytes of blocks that the index showed on the former device pool
        if inherited:
            self._take_over()
        self._below = self._recovered_below()

    def restore(self, free: Callable[[Location], None]) -> list[ev.Recovered]:
        """Returns the blocks that are where the index says and may be shown, the least recently used first; `free`s the others."""
        kept = {(each.key, each.location.tier): each.location for each in self._below}
        lost = [key for key, location in self._index.items() if not self._is_there(key, location, kept)]
        for key in lost:
            self._index.remove(key)
        in_host = [(key, location) for key, location in self._index.items() if location.tier is Tier.HOST]
        if self._inherited:
            in_host += self._hidden_by_device()
            log.info("took over %d blocks; %d were not where the index said", len(self._index), len(lost))
        in_host.sort(key=lambda item: self._last_use.get(item[0], 0))
        host = []
        for key, location in in_host:
            _, parent, root, depth, *_, error = self._host.lineage(location.offset)
            if self._allowance.admits(key, root, location.codec, self._error_of_frame(location) if location.codec else error):
                host.append(ev.Recovered(key, parent, root, location, depth))
            else:
                self._index.remove(key)
                free(location)
        self._allowance.refuse(Tier.HOST.label, len(in_host) - len(host))
        return self._that_fit({key for key, _ in [*self._index.items(), *in_host]}, free) + host

    def _take_over(self) -> None:
        """Put the former node's index in order, and hide the blocks that it shows on the device."""
        self._index.rebuild(self._host.describes)
        self._last_use = {key: tick for key, _, tick in self._index.harvest()}
        self._on_device = {key: location.raw_bytes for key, location in self._index.items() if location.tier is Tier.DEVICE}
        for key in self._on_device:
            self._index.remove(key)

    def _recovered_below(self) -> list[ev.Recovered]:
        """Returns the blocks of the lower tiers that may be shown, the lowest tier first; the others stay until their segment goes."""
        found: list[ev.Recovered] = []
        for tier in sorted(self._logs, reverse=True):
            try:
                there = self._logs[tier].recovered()
            except TieredKVError as error:
                if not self._inherited:
                    raise
                log.warning("what lies in %s is not used: %s", tier.label, error)
                continue
            look, admits = self._logs[tier].carried, self._allowance.admits
            shown = [each for each in there if admits(each.key, each.root, each.location.codec, each.error, partial(look, each.location))]
            found += [ev.Recovered(each.key, each.parent, each.root, each.location) for each in shown]
            self._allowance.refuse(tier.label, len(there) - len(shown))
        return found

    def _hidden_by_device(self) -> list[tuple[BlockKey, Location]]:
        """Returns host copies of blocks whose index entry pointed at the former device pool; erases all other stale headers."""
        found = []
        for offset, lineage in list(self._host.orphans()):
            if lineage is not None and self._on_device.get(lineage.key) == lineage.raw_bytes and lineage.nbytes:
                location = Location(Tier.HOST, lineage.codec, 0, offset, lineage.nbytes, lineage.raw_bytes)
                if self._claim(lineage.key, location):
                    del self._on_device[lineage.key]
                    found.append((lineage.key, location))
                    continue
            self._host.disown(offset)
        return found

    def _that_fit(self, known: set[BlockKey], free: Callable[[Location], None]) -> list[ev.Recovered]:
        """Returns the lower blocks that the index knows, and of the others the newest that it has room for; `free`s the rest."""
        room = self._index.capacity_blocks - self._index.capacity_blocks // CROWDED_PART - len(known)
        newest = list(dict.fromkeys(each.key for each in reversed(self._below) if each.key not in known))
        keep = known.union(newest[: max(room, 0)])
        for each in self._below:
            if each.key not in keep:
                free(each.location)
        return [each for each in self._below if each.key in keep]

    def _is_there(self, key: BlockKey, location: Location, kept: Mapping[tuple[BlockKey, Tier], Location]) -> bool:
        """Whether the block is where its index entry says."""
        if location.tier is Tier.HOST:
            return self._claim(key, location)
        return kept.get((key, location.tier)) == location

    def _claim(self, key: BlockKey, location: Location) -> bool:
        """Take the extent of an index entry; returns whether its header confirms that it holds this key. Else it is freed again."""
        try:
            self._host.claim(location.offset, location.stored_bytes)
        except TieredKVError:
            return False
        ours = self._host.describes(key, location)
        if not ours:
            self._host.free(location.offset)
        return ours

    def _error_of_frame(self, location: Location) -> float | None:
        """Returns the error that a frame in host memory says its block carries; the frame is not verified."""
        return carried_error(self._host.payload(location.offset, location.stored_bytes))
