"""CPU time of an eviction, with and without the record of gone blocks and the sketch of the hit ratio's ceiling.

    python -m benchmarks.evictions

No I/O: a store machine with one tier in memory, full of single blocks, gets eight new ones at a time. Prints the median of several
rounds, in µs of CPU time for each evicted block.
"""

import argparse
import os
import statistics
import time

from tiered_kv.blocks import Location, Tier
from tiered_kv.node.insight.ceiling import Ceiling
from tiered_kv.policy import History, create_history, create_policy
from tiered_kv.store import events as ev
from tiered_kv.store.gone import GoneBlocks, GoneObserver
from tiered_kv.store.machine import StoreMachine

BLOCK_BYTES, BLOCKS, AT_ONCE = 1000, 4000, 8


def us_per_eviction(policy: str, observer: GoneObserver | None, stores: int = 1500) -> float:
    """Returns the mean CPU time of an eviction, in µs."""
    history = create_history() if policy == "adaptive" else History()
    capacity = BLOCKS * BLOCK_BYTES
    ranks = create_policy(policy, history, capacity, cost_weight=0.0, block_tokens=64, seed=1)
    machine = StoreMachine({Tier.HOST: capacity}, {Tier.HOST: ranks}, history, observer=observer)
    evicted, seconds = 0, 0.0
    for number in range(stores):
        keys, now_s = [os.urandom(32) for _ in range(AT_ONCE)], number / 100
        before, begun_s = machine.blocks_by_tier[Tier.HOST], time.process_time()
        lacking = machine.bytes_by_tier[Tier.HOST] + AT_ONCE * BLOCK_BYTES - capacity
        if lacking > 0:
            machine.handle(ev.Needed(Tier.HOST, lacking, None, keys, now_s))
            seconds += time.process_time() - begun_s
            evicted += before - machine.blocks_by_tier[Tier.HOST]
        locations = [Location(Tier.HOST, 0, 0, 0, BLOCK_BYTES, BLOCK_BYTES)] * AT_ONCE
        machine.handle(ev.Committed(bytes(32), None, keys, locations, now_s, 0))
    return seconds / evicted * 1e6


def main() -> None:
    """Measure each policy without and with the record, in turns, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for policy in ("adaptive", "lru"):
        without, with_record = [], []
        for _ in range(rounds):
            without.append(us_per_eviction(policy, None))
            record = GoneBlocks(time.monotonic, Ceiling(BLOCKS * BLOCK_BYTES, lambda: (0, 0)))
            with_record.append(us_per_eviction(policy, record))
        print(f"{policy}: {statistics.median(without):.1f} µs an eviction, with the record {statistics.median(with_record):.1f} µs")


if __name__ == "__main__":
    main()
