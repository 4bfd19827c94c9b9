"""Adds up the counts that clients keep in shared memory, those of ended clients included."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tiered_kv.memory.client_page import TIERS, ClientFigures, create_folder, pages_in, read_page
from tiered_kv.memory.histogram import HistogramCounts
from tiered_kv.node.monitoring.labels import OTHER, BoundedLabels

TIDY_EVERY_S = 5.0
"""How often the pages of ended clients are added up and deleted, if nobody reads the counts."""

Names = tuple[str, str]
"""The short name of a namespace, and a tenant."""


class ClientSums(NamedTuple):
    """The sums over all clients of one namespace and tenant. `counts` has numbers of blocks, of tokens and of bytes."""

    counts: Counter[str]
    fetch: HistogramCounts
    store: HistogramCounts

    @classmethod
    def empty(cls) -> "ClientSums":
        """Returns the sums over no client."""
        return cls(Counter(), HistogramCounts.empty(), HistogramCounts.empty())

    def plus(self, other: "ClientSums") -> "ClientSums":
        """Returns the sums over the clients of both."""
        return ClientSums(self.counts + other.counts, self.fetch.plus(other.fetch), self.store.plus(other.store))

    def minus(self, other: "ClientSums") -> "ClientSums":
        """Returns what was counted since an earlier reading of the same clients."""
        return ClientSums(self.counts - other.counts, self.fetch.minus(other.fetch), self.store.minus(other.store))


IN_TOKENS = ("asked", "missed", *(f"hit_{tier}" for tier in TIERS))
IN_BYTES = ("new", *(f"hit_{tier}" for tier in TIERS))


def sums_of(figures: ClientFigures) -> ClientSums:
    """Returns the sums over one client: its counts, with those of blocks also in tokens and in bytes."""
    counts = Counter(figures.counts)
    for name in {*IN_TOKENS, *IN_BYTES}:
        tier = name.removeprefix("hit_")
        blocks = counts[f"hit_blocks_{tier}" if tier != name else f"{name}_blocks"]
        counts[f"{name}_tokens"] = blocks * figures.block_tokens
        counts[f"{name}_bytes"] = blocks * figures.block_bytes
    return ClientSums(counts, figures.fetch, figures.store)


class ClientCounts:
    """The counts of all clients that this node has had since it started. Thread-safe.

    Clients that were attached to a former node with the same files count from the moment at which this node started.
    """

    def __init__(self, directory: Path, now_s: Callable[[], float]) -> None:
        self._directory = directory
        self._now_s = now_s
        self._labels = BoundedLabels((OTHER, OTHER))
        self._ended: dict[Names, ClientSums] = {}
        self._before: dict[str, ClientSums] = {}  # by page: the counts for a former node
        self._tidy_at_s = now_s() + TIDY_EVERY_S
        self._lock = threading.Lock()
        create_folder(directory)
        for path in pages_in(directory):
            if (found := read_page(path)) is not None:
                self._before[path.name] = sums_of(found[0])

    def read(self) -> dict[Names, ClientSums]:
        """Returns the sums by namespace and tenant. Deletes the pages of ended clients. About 30 µs for each client."""
        with self._lock:
            live: dict[Names, ClientSums] = {}
            for path in pages_in(self._directory):
                found = read_page(path)
                if found is None:
                    continue
                figures, has_ended = found
                names = self._labels.label((figures.namespace, figures.tenant))
                sums = sums_of(figures)
                if path.name in self._before:
                    sums = sums.minus(self._before[path.name])
                place = self._ended if has_ended else live
                place[names] = place[names].plus(sums) if names in place else sums
                if has_ended:
                    path.unlink(missing_ok=True)
                    self._before.pop(path.name, None)
            self._tidy_at_s = self._now_s() + TIDY_EVERY_S
            return {
                names: self._ended.get(names, ClientSums.empty()).plus(live.get(names, ClientSums.empty()))
                for names in sorted({*self._ended, *live})
            }

    def beat(self) -> None:
        """Delete the pages of ended clients now and then, so that their number stays small."""
        if self._now_s() >= self._tidy_at_s:
            self.read()

    def check(self) -> None:
        """Assert that each block that was asked for is a hit of one tier or a miss."""
        for sums in self.read().values():
            counts = sums.counts
            assert counts["asked_blocks"] == counts["missed_blocks"] + sum(counts[f"hit_blocks_{tier}"] for tier in TIERS)
