"""`make sim-cluster`: runs simulations of many seeds."""

import argparse
import sys
import time

from tests.simulation.plan import plan_of
from tests.simulation.simulation import simulate


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=100)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--seed", type=int)
    given = options.parse_args()
    seeds = [given.seed] if given.seed is not None else range(given.first, given.first + given.seeds)
    import gc
    gc.collect(); gc.freeze()
    begun = time.time()
    failed = {}
    steps = 0
    for seed in seeds:
        outcome = simulate(plan_of(seed))
        steps += outcome.steps
        if given.seed is not None:
            print(*outcome.log, sep="\n")
        if outcome.failure is not None:
            failed.setdefault(outcome.kind, []).append(seed)
            if len(failed[outcome.kind]) == 1:
                print(seed, outcome.kind, outcome.failure, flush=True)
                import traceback
                traceback.print_exception(outcome.failure)
    n = len(seeds)
    print(f"{n} seeds, {(time.time() - begun) / n * 1000:.1f} ms each, {steps / n:.0f} steps", outcome.digest)
    for kind, which in sorted(failed.items(), key=lambda each: -len(each[1])):
        print(len(which), kind, which[:8])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
