"""Making room ends with the wait of the store that needs it."""

import pytest

from tests.unit.store.bench import DISK
from tiered_kv.clock import ManualClock
from tiered_kv.store.engine import GIVING_UP_S


@pytest.mark.parametrize("is_disk_slow", [True, False])
def test_evicting_blocks_one_by_one_ends_with_the_wait(make, is_disk_slow: bool) -> None:
    """If the free room is fragmented, evictions may never free one whole extent, and each takes a while to choose."""
    bench = make(*([DISK] if is_disk_slow else []), slots=40)
    bench.store(*range(40))
    clock, tries = ManualClock(), []
    bench.engine._clock = clock

    def in_pieces(*_: object) -> list[int]:
        tries.append(clock.now_s())
        clock.advance(0.004)
        return []

    if is_disk_slow:
        bench.mover.append_allowed[DISK].clear()
        assert not bench.store(40, wait_s=0)[0]
        clock.advance(1.0)  # the disk has taken nothing for longer than the wait
    begun_s = clock.now_s()
    bench.mover.reserve = in_pieces
    assert not bench.store(41, wait_s=0.02)[0]
    assert clock.now_s() - begun_s < 0.02 + GIVING_UP_S + 0.02
    assert len(tries) < 20
    del bench.mover.reserve
