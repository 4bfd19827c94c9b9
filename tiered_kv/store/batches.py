"""Data of the engine: reservations that must evict blocks, and batches of copies, with the events to report if a batch fails."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tiered_kv.blocks import Tier
from tiered_kv.keys import BlockKey
from tiered_kv.store import events as ev


class Reservation(NamedTuple):
    """A reservation that must evict blocks: `nbytes` in `tier` for each of the new blocks `keys`, until `deadline_s`.

    `last_block`, `is_coded`: as for `Engine.reserve`.
    """

    tier: Tier
    nbytes: int
    keys: Sequence[BlockKey]
    last_block: BlockKey | None
    is_coded: bool
    deadline_s: float


def batches(copies: Sequence[ev.Copy], batch_bytes: int) -> Iterator[list[ev.Copy]]:
    """Yields the copies in batches of about `batch_bytes`: large enough for one write, small enough to free room early."""
    batch: list[ev.Copy] = []
    nbytes = 0
    for copy in copies:
        batch.append(copy)
        nbytes += copy.source.stored_bytes
        if nbytes >= batch_bytes:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch


def failures(batch: Sequence[ev.Copy]) -> list[ev.CopyFailed]:
    """Returns the events that report a whole batch of copies as failed. These copies will not be tried again."""
    return [ev.CopyFailed(copy.key, copy.target, again=False) for copy in batch]


def gain_bytes(batch: Sequence[ev.Copy]) -> int:
    """Returns about how many bytes the batch of copies will free in the tier that it copies from."""
    return sum(copy.gain for copy in batch)
