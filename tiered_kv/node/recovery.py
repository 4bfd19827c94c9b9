"""Recovery of the blocks, in every tier, that a former node with the same ids left in its files."""

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
"""If fewer than one in `CROWDED_PART` index slots are free, the lowest tier drops a segment."""


class Recovery:
    """Recovers a node's blocks once, at its start.

    The constructor repairs the index, removes the blocks on the device from it, and reads the footers of the lower tiers. It must run
    before the device pool is created, so that no worker takes blocks of the former pool for blocks of the new one. `inherited`:
    whether the files in shared memory existed already. If not, an object store that cannot be reached is an error, because its URL may
    be misspelt. Otherwise its blocks are just not recovered.
    """

    def __init__(self, index: IndexWriter, host: HostTier, logs: Mapping[Tier, LogTier], allowance: Allowance, *, inherited: bool) -> None:
        self._index = index
        self._host = host
        self._logs = logs
        self._allowance = allowance
        self._inherited = inherited
        self._last_use: dict[BlockKey, int] = {}  # tick of each block's last use
        self._on_device: dict[BlockKey, int] = {}  # raw bytes of the blocks that the index showed in the former device pool
        if inherited:
            self._take_over()
        self._below = self._recovered_below()

    def restore(self, free: Callable[[Location], None]) -> list[ev.Recovered]:
        """Returns the blocks that match their index entry and are not too lossy, the least recently used first.

        Calls `free` for the other blocks.
        """
        kept = {(each.key, each.location.tier): each.location for each in self._below}
        lost = [key for key, location in self._index.items() if not self._is_there(key, location, kept)]
        for key in lost:
            self._index.remove(key)
        in_host = [(key, location) for key, location in self._index.items() if location.tier is Tier.HOST]
        if self._inherited:
            in_host += self._hidden_by_device()
            log.info("recovered %d blocks; %d index entries pointed at no block and were removed", len(self._index), len(lost))
        in_host.sort(key=lambda item: self._last_use.get(item[0], 0))
        host = []
        for key, location in in_host:
            info, *_, error = self._host.header(location.offset)
            if self._allowance.admits(key, info.root, location.codec, self._error_of_frame(location) if location.codec else error):
                host.append(ev.Recovered(info, location))
            else:
                self._index.remove(key)
                free(location)
        self._allowance.refuse(Tier.HOST.label, len(in_host) - len(host))
        return self._that_fit({key for key, _ in [*self._index.items(), *in_host]}, free) + host

    def _take_over(self) -> None:
        """Repair the index that the previous node left. Move its entries for blocks on the device to `_on_device`."""
        self._index.rebuild(self._host.describes)
        self._last_use = {key: tick for key, _, tick in self._index.harvest()}
        self._on_device = {key: location.raw_bytes for key, location in self._index.items() if location.tier is Tier.DEVICE}
        for key in self._on_device:
            self._index.remove(key)

    def _recovered_below(self) -> list[ev.Recovered]:
        """Returns the blocks of the lower tiers that workers may read, the lowest tier first.

        The bytes of the other blocks remain until their segment is removed.
        """
        found: list[ev.Recovered] = []
        for tier in sorted(self._logs, reverse=True):
            try:
                recovered = self._logs[tier].recovered()
            except TieredKVError as error:
                if not self._inherited:
                    raise
                log.warning("blocks in %s are not recovered: %s", tier.label, error)
                continue
            look, admits = self._logs[tier].carried, self._allowance.admits  # `look` reads a header
            shown = [
                each
                for each in recovered
                if admits(each.key, each.info.root, each.location.codec, each.error, partial(look, each.location))
            ]
            found += [ev.Recovered(each.info, each.location) for each in shown]
            self._allowance.refuse(tier.label, len(recovered) - len(shown))
        return found

    def _hidden_by_device(self) -> list[tuple[BlockKey, Location]]:
        """Returns the host copies of blocks whose index entry pointed at the former device pool. Erases all other stale headers."""
        found = []
        for offset, header in list(self._host.orphans()):
            if header is not None and self._on_device.get(header.info.key) == header.raw_bytes and header.nbytes:
                location = Location(Tier.HOST, header.codec, 0, offset, header.nbytes, header.raw_bytes)
                if self._claim(header.info.key, location):
                    del self._on_device[header.info.key]
                    found.append((header.info.key, location))
                    continue
            self._host.disown(offset)
        return found

    def _that_fit(self, known: set[BlockKey], free: Callable[[Location], None]) -> list[ev.Recovered]:
        """Returns the blocks of lower tiers that have an index entry, and the newest others that the index has room for.

        Calls `free` for the rest.
        """
        room = self._index.capacity_blocks - self._index.capacity_blocks // CROWDED_PART - len(known)
        newest = list(dict.fromkeys(each.key for each in reversed(self._below) if each.key not in known))
        keep = known.union(newest[: max(room, 0)])
        for each in self._below:
            if each.key not in keep:
                free(each.location)
        return [each for each in self._below if each.key in keep]

    def _is_there(self, key: BlockKey, location: Location, kept: Mapping[tuple[BlockKey, Tier], Location]) -> bool:
        """Returns whether the block is stored where its index entry says. Claims its extent if that is in host memory."""
        if location.tier is Tier.HOST:
            return self._claim(key, location)
        return kept.get((key, location.tier)) == location

    def _claim(self, key: BlockKey, location: Location) -> bool:
        """Claim the extent if its header confirms that it holds this key; else free it. Returns whether it was claimed."""
        try:
            self._host.claim(location.offset, location.stored_bytes)
        except TieredKVError:
            return False
        ours = self._host.describes(key, location)
        if not ours:
            self._host.free(location.offset)
        return ours

    def _error_of_frame(self, location: Location) -> float | None:
        """Returns the lossy error that a frame in host memory names for its block. The frame is not verified."""
        return carried_error(self._host.payload(location.offset, location.stored_bytes))
