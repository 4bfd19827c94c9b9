"""Measures the wasted share of an arena while blocks of many sizes are allocated and evicted.

Waste is 1 - payload bytes in use / capacity, so it includes rounding and all free bytes. It is sampled directly after each
allocation that had to evict, and averaged over the last three quarters of the operations. An operation is one allocation or one
eviction. Victims are the oldest blocks or random ones, one at a time until the new block fits. The arena is that of the default
settings, 1 GiB.
"""

import random

import pytest

from tiered_kv.memory.extents import ExtentAllocator

CAPACITY_BYTES = 1 << 30
KIB = 1024
OPERATIONS = 100_000


def uniform(rng: random.Random) -> int:
    """Sizes of compressed blocks of any size."""
    return rng.randint(64 * KIB, 3072 * KIB)


def log_uniform(rng: random.Random) -> int:
    """Sizes of many small blocks and few large ones."""
    return int(64 * KIB * 48 ** rng.random())


def fixed_sizes(rng: random.Random) -> int:
    """Sizes of three models' raw blocks, which do not divide each other."""
    return rng.choice((500 * KIB + 128, 850 * KIB + 128, 1450 * KIB + 128))


def powers_of_four(rng: random.Random) -> int:
    """Sizes of raw blocks of small and large models, with a header."""
    return rng.choice((64, 256, 1024, 3072)) * KIB + 128


def around_one_ratio(rng: random.Random) -> int:
    """Sizes of one model's blocks with a codec whose ratio varies slightly."""
    return max(64 * KIB, int(rng.gauss(900, 150) * KIB))


class Churn:
    """Blocks in an allocator that is always full."""

    def __init__(self, victim: str, seed: int):
        self.allocator = ExtentAllocator(CAPACITY_BYTES)
        self.rng = random.Random(seed)
        self.victim = victim
        self.bytes_by_offset: dict[int, int] = {}  # oldest first
        self.offsets: list[int] = []
        self.live_bytes = 0

    def add(self, nbytes: int) -> int:
        """Store one block; returns how many were evicted for it."""
        evicted = 0
        while (offset := self.allocator.allocate(nbytes)) is None:
            self._evict()
            evicted += 1
        self.bytes_by_offset[offset] = nbytes
        self.offsets.append(offset)
        self.live_bytes += nbytes
        return evicted

    def _evict(self) -> None:
        if self.victim == "oldest":
            offset = next(iter(self.bytes_by_offset))
        else:
            at = self.rng.randrange(len(self.offsets))
            offset, self.offsets[at] = self.offsets[at], self.offsets[-1]
            self.offsets.pop()
        self.allocator.free(offset)
        self.live_bytes -= self.bytes_by_offset.pop(offset)


@pytest.mark.parametrize("victim", ["oldest", "random"])
@pytest.mark.parametrize("sizes", [uniform, log_uniform, fixed_sizes, powers_of_four, around_one_ratio])
def test_less_than_a_tenth_of_the_arena_is_wasted(sizes, victim, record_property):
    churn = Churn(victim, seed=7)
    operations, samples = 0, []
    while operations < OPERATIONS:
        evicted = churn.add(sizes(churn.rng))
        operations += 1 + evicted
        if evicted and operations > OPERATIONS // 4:
            samples.append(1 - churn.live_bytes / CAPACITY_BYTES)
    churn.allocator.check()
    waste = sum(samples) / len(samples)
    record_property("waste", waste)
    assert len(samples) > 1000
    assert waste < 0.1


def test_chains_stored_as_runs_waste_less_than_a_tenth():
    rng = random.Random(3)
    allocator = ExtentAllocator(CAPACITY_BYTES)
    live: list[tuple[int, int]] = []
    live_bytes, samples = 0, []
    for chain in range(4000):
        nbytes, missing = fixed_sizes(rng), rng.randint(1, 32)
        while missing:
            run = allocator.allocate_run(nbytes, missing)
            live += [(offset, nbytes) for offset in run]
            live_bytes += nbytes * len(run)
            missing -= len(run)
            if missing:
                at = rng.randrange(len(live))
                (offset, freed), live[at] = live[at], live[-1]
                live.pop()
                allocator.free(offset)
                live_bytes -= freed
        if chain > 1000:
            samples.append(1 - live_bytes / CAPACITY_BYTES)
    allocator.check()
    assert sum(samples) / len(samples) < 0.1
