"""The part of a client that counts what it asked for, got and stored, for itself and for the metrics of its node."""

import threading
from collections import Counter

from tiered_kv.client.access import AccessHolder
from tiered_kv.client.calls import Names
from tiered_kv.client.prefill_savings import Savings
from tiered_kv.client.reader import BlockSource
from tiered_kv.clock import Clock
from tiered_kv.layout import Layout


class CountingClient:
    """The base of `NodeClient`, which sets its attributes."""

    layout: Layout
    _clock: Clock
    _counts: Counter[str]
    _holder: AccessHolder
    _lock: threading.Lock
    _savings: Savings
    _noted_retries = 0

    def _note_fetch(self, source: BlockSource, names: Names, asked: int, hits: dict[str, int], begun_s: float) -> None:
        """Add a fetch and the prefill time that it saved to the counts of this client and of its node.

        `asked`: the number of blocks. `hits`: the number of blocks that were read, by tier. `begun_s`: when the fetch began.
        """
        hit, took_s = sum(hits.values()), self._clock.now_s() - begun_s
        tokens = hit * self.layout.block_tokens
        saved_us = int(self._savings.fetched(tokens, took_s) * 1e6)
        source.tally(asked, hit, tokens, saved_us)
        with self._lock:
            retries, self._noted_retries = self._holder.retries - self._noted_retries, self._holder.retries
        counts = {"fetches": 1, "asked_blocks": asked, "missed_blocks": asked - hit}
        counts |= {f"hit_blocks_{tier}": count for tier, count in hits.items()}
        self._count(hit_blocks=hit, **counts)
        counts |= {"prefill_tokens_saved": tokens, "prefill_us_saved": saved_us, "retries": retries}
        source.counts.add(names.root, names.namespace, counts, fetch_s=took_s)

    def _note(
        self,
        source: BlockSource,
        names: Names,
        counts: dict[str, int],
        store_s: float | None = None,
    ) -> None:
        """Add to the counts of this client, and to those that its node exports (`memory.client_page.COUNTS`). About 5 µs, no call.

        `store_s`: the duration of a store, for the node's histogram.
        """
        self._count(**counts)
        source.counts.add(names.root, names.namespace, counts, store_s=store_s)

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count
