"""Simulates clusters for many seeds, or one seed again: `make sim-cluster`.

    make sim-cluster                    some thousand seeds, each another than in earlier runs
    make sim-cluster SEEDS=10000        more of them
    make sim-cluster SEED=123           one seed, with its whole history

The first failing seed ends the run with exit status 1, its shortest history, and the command that replays it. With `--go-on`, further
kinds of failures are looked for, and each is listed with its seeds.
"""

import argparse
import gc
import random
import sys
import time

from tests.simulation.plan import plan_of
from tests.simulation.shrink import report, shrunk
from tests.simulation.simulation import Outcome, simulate

SEEDS = 3000
TELL_EVERY_S = 30.0


def run_seeds(first: int, count: int, go_on: bool) -> dict[str, list[int]]:
    """Simulate `count` seeds. Prints the progress and the first failure of each kind. Returns the failing seeds by kind."""
    failed: dict[str, list[int]] = {}
    steps, begun_s = 0, time.monotonic()
    told_s = begun_s
    for done, seed in enumerate(range(first, first + count), 1):
        outcome = simulate(plan_of(seed))
        steps += outcome.steps
        if outcome.kind is not None:
            failed.setdefault(outcome.kind, []).append(seed)
            if len(failed[outcome.kind]) == 1:
                print(report(outcome, shrunk(outcome)), flush=True)
            if not go_on:
                break
        now_s = time.monotonic()
        if now_s - told_s > TELL_EVERY_S or done == count:
            told_s = now_s
            rate = done / (now_s - begun_s)
            print(f"sim-cluster: {done} seeds, {steps:,} switch points, {rate:.1f} seeds/s, failed: {failed or 'none'}", flush=True)
    return failed


def replay(seed: int) -> Outcome:
    """Simulate one seed. Prints its history."""
    outcome = simulate(plan_of(seed))
    print(*outcome.plan.steps, "", *outcome.log, sep="\n")
    print(f"hash of the history: {outcome.digest}")
    if outcome.kind is not None:
        print(report(outcome, shrunk(outcome)))
    return outcome


def main() -> int:
    """Returns 0 if no seed failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=SEEDS, help="how many (default: %(default)s)")
    options.add_argument("--first", type=int, help="the first seed (default: a random one)")
    options.add_argument("--seed", type=int, help="simulate this seed alone, and print its history")
    options.add_argument("--go-on", action="store_true", help="after a failure, look for other kinds of failures")
    given = options.parse_args()
    gc.collect()
    gc.freeze()  # what was imported stays: it need not be looked at again and again
    if given.seed is not None:
        return 1 if replay(given.seed).kind is not None else 0
    first = random.SystemRandom().randrange(1 << 32) if given.first is None else given.first
    return 1 if run_seeds(first, given.seeds, given.go_on) else 0


if __name__ == "__main__":
    sys.exit(main())
