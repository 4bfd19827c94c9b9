"""From touches, which the index has for each block by itself, to the uses of chains that they stand for."""

from collections.abc import Iterator, Mapping, Sequence

from tiered_kv.keys import BlockKey
from tiered_kv.store.events import Used
from tiered_kv.store.movement import Block

REPEATS_MAX = 8
"""A prefix that was used more often than this since the last harvest counts as used so often."""


def uses_of(touched: Sequence[tuple[BlockKey, int, int]], blocks: Mapping[BlockKey, Block], now_s: float) -> Iterator[Used]:
    """The uses behind touches (key, how many since the last time, tick of the last) in ascending order of ticks.

    A reader touches a chain deepest block first. So consecutive touches, each of the parent of the one before, are one
    run; where its upper part was touched more often than the rest, that part was used by itself as well.
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
