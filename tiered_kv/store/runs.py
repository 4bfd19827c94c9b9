"""Finds out from touches which chains were used. The index counts touches (uses) for each block separately."""

from collections.abc import Iterator, Mapping, Sequence

from tiered_kv.keys import BlockKey
from tiered_kv.store.events import Used
from tiered_kv.store.movement import Block

REPEATS_MAX = 8
"""The most uses of a prefix that are counted since the last harvest, however often it was used."""


def uses_of(touched: Sequence[tuple[BlockKey, int, int]], blocks: Mapping[BlockKey, Block], now_s: float) -> Iterator[Used]:
    """Yields the uses of chains that explain `touched`: the result of `IndexWriter.harvest`, (key, touches, tick of the last touch).

    A reader touches a chain from the deepest block up to the first. So consecutive touches, each of the parent of the previous block,
    are one use of a chain. If the first blocks of the chain were touched more often than the rest, that prefix was also used alone.
    """
    start = 0
    while start < len(touched):
        end = start + 1
        while end < len(touched) and _continues(touched[end - 1], touched[end], blocks):
            end += 1
        run = touched[end - 1 : start - 1 if start else None : -1]
        for times in range(min(max(count for _, count, _ in run), REPEATS_MAX), 0, -1):
            yield Used([key for key, count, _ in run if count >= times], now_s)
        start = end


def _continues(deeper: tuple[BlockKey, int, int], upper: tuple[BlockKey, int, int], blocks: Mapping[BlockKey, Block]) -> bool:
    block = blocks.get(deeper[0])
    return block is not None and block.link == upper[0] and upper[2] == deeper[2] + 1
