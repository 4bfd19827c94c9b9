"""The engine compresses blocks: after stores, during demotions, and with failures."""

import pytest

from tests.unit.store.bench import NBYTES
from tests.unit.store.world import key_of
from tiered_kv.blocks import Tier

HOST, DISK = Tier.HOST, Tier.DISK


def test_blocks_are_compressed_after_the_store_that_fills_memory(make) -> None:
    bench = make(slots=8, io_threads=1, shrinks=True)
    assert all(bench.store(*range(1, 8)))
    bench.engine.settle()
    coded = [number for number in range(1, 8) if bench.index[key_of(number)].codec]
    assert coded == [1, 2, 3]
    assert bench.engine.machine.bytes_by_tier[HOST] == 4 * NBYTES + 3 * NBYTES // 2


@pytest.mark.parametrize("why", ["it fails", "it gains nothing"])
def test_a_block_that_cannot_be_compressed_stays_unchanged_and_is_tried_once(make, why: str) -> None:
    bench = make(slots=8, shrinks=True)
    bench.mover.coding_failure = ValueError("a codec with a fault") if why == "it fails" else None
    bench.mover.coded_bytes = NBYTES
    for number in range(1, 9):
        bench.store(number)
        bench.engine.settle()
    assert all(bench.tier(number) is HOST and not bench.index[key_of(number)].codec for number in range(1, 9))
    assert len(bench.mover.codings) == len(set(bench.mover.codings)) > 2


def test_a_block_that_cannot_be_compressed_can_still_be_evicted(make) -> None:
    bench = make(slots=4, shrinks=True)
    bench.mover.coding_failure = ValueError("a codec with a fault")
    assert all(bench.store(*range(1, 9)))
    assert sum(bench.tier(number) is HOST for number in range(1, 9)) == 4


def test_a_block_whose_demotion_cannot_be_encoded_stays_and_is_not_written(make) -> None:
    bench = make(DISK, slots=1)
    bench.store(1)
    bench.mover.coding_failure = ValueError("a codec with a fault")
    bench.store(2, wait_s=0)
    bench.engine.settle()
    assert bench.tier(1) is HOST
    bench.mover.coding_failure = None
    assert bench.store(2) == [True]
