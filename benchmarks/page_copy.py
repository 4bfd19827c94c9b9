"""What it costs to fill an engine's pages from the arena: 11 blocks of 30 pages of 96 KiB (31 MiB), alone and beside a busy thread.

    .venv/bin/python -m benchmarks.page_copy

Prints medians and minima in ms, out of the processor's caches, on one core; the busy thread has another core. The ways take turns:
`usual` is what clients do, `call` one system call for all pages, `each` one memmove for each page, `memcpy` one copy of as many bytes.
"""

import ctypes
import mmap
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable

import torch

from tiered_kv.client import page_copy

LAYERS, BLOCKS, PAGE_BYTES, COUNT = 30, 380, 98_304, 11
BLOCK_BYTES = LAYERS * PAGE_BYTES
ROUNDS = 30


def ways(pages: page_copy.HostPages, memory: torch.Tensor) -> dict[str, Callable[[list[int], list[int]], object]]:
    """Returns the ways to copy, by name. Each gets offsets and block numbers."""
    target = torch.zeros(COUNT * BLOCK_BYTES, dtype=torch.uint8)

    def each(offsets: list[int], blocks: list[int]) -> None:
        for page, payload, nbytes in zip(*(part.tolist() for part in pages._pieces(memory, offsets, blocks)), strict=True):
            ctypes.memmove(page, payload, nbytes)

    return {
        "usual": lambda offsets, blocks: pages.scatter(memory, offsets, blocks),
        "call": lambda offsets, blocks: page_copy._copied(*pages._pieces(memory, offsets, blocks)),
        "each": each,
        "memcpy": lambda offsets, blocks: target.copy_(memory[: len(target)]),
    }


def measured(pages: page_copy.HostPages, memory: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    source, found, others = random.Random(1), dict[str, list[float]](), torch.zeros(64 << 20, dtype=torch.uint8)
    for _ in range(rounds):
        for name, copy in ways(pages, memory).items():
            blocks = source.sample(range(BLOCKS), COUNT)
            offsets = [place * (BLOCK_BYTES + 128) + 128 for place in source.sample(range(80), COUNT)]
            others.add_(1)  # the copies begin out of cache
            begun = time.perf_counter()
            copy(offsets, blocks)
            found.setdefault(name, []).append((time.perf_counter() - begun) * 1e3)
    return found


def main() -> int:
    torch.set_num_threads(1)
    pages = page_copy.HostPages([torch.zeros(BLOCKS, PAGE_BYTES, dtype=torch.uint8) for _ in range(LAYERS)])
    mapped = mmap.mmap(-1, 256 << 20, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8).fill_(3)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[-1]})
    print("load", os.getloadavg()[0])
    for name, taken in measured(pages, memory, ROUNDS).items():
        print(f"alone  {name:7} {statistics.median(taken):8.2f} ms, at least {min(taken):.2f}")
    os.sched_setaffinity(0, set(cores))
    stop = threading.Event()

    def spin() -> None:
        count = 0
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        for name, taken in measured(pages, memory, 5).items():
            print(f"beside {name:7} {statistics.median(taken):8.2f} ms, at least {min(taken):.2f}")
    finally:
        stop.set()
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
