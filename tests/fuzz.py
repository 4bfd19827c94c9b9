"""Runs the property tests round after round, each with a fresh seed, for a chosen time: `make fuzz`.

`make test` runs the same properties with the same examples every time. Here each round draws others. The first round that fails
ends the run with exit status 1 and prints the command that replays it; the seed alone decides the examples.

    make fuzz                     ten minutes
    make fuzz MINUTES=60          an hour
    make fuzz SEED=123            replays the round of seed 123, once
    make fuzz FUZZ_ARGS="tests/unit/store"
"""

import argparse
import random
import signal
import subprocess
import sys
import time

INTERRUPTED, NO_TESTS = 2, 5
STOP_WITHIN_S = 60.0


def pytest_command(seed: int, arguments: list[str]) -> list[str]:
    """Returns the command of one round."""
    chosen = [sys.executable, "-m", "pytest", "-m", "hypothesis and not ray", "-x", "-q", "--no-header", "-r", "fE"]
    return [*chosen, "--hypothesis-profile=fuzz", f"--hypothesis-seed={seed}", *arguments]


def run_round(seed: int, arguments: list[str], seconds: float | None) -> int:
    """Returns the exit status of one round, 0 for one that passed or that was ended because its time was over."""
    with subprocess.Popen(pytest_command(seed, arguments)) as pytest:
        try:
            return pytest.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.send_signal(signal.SIGINT)
        try:
            status = pytest.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            pytest.kill()
            status = INTERRUPTED
        return 0 if status == INTERRUPTED else status


def main() -> int:
    """Returns 0 if every round passed, 1 if one failed, 2 if there was nothing to run."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=10.0, help="how long to go on (default: %(default)s)")
    options.add_argument("--seed", type=int, help="run one round with this seed: what a failed round printed")
    options.add_argument("arguments", nargs="*", help="passed to pytest, for example a folder of tests")
    given = options.parse_args()
    end_s = time.monotonic() + given.minutes * 60
    rounds = 0
    while True:
        seed = given.seed if given.seed is not None else random.SystemRandom().randrange(1 << 32)
        print(f"fuzz: round {rounds + 1}, seed {seed}", flush=True)
        status = run_round(seed, given.arguments, None if given.seed is not None else max(end_s - time.monotonic(), 1.0))
        if status == NO_TESTS:
            print("fuzz: these arguments choose no property test", flush=True)
            return 2
        if status:
            print(f"fuzz: failed. Replay it with: make fuzz SEED={seed}", flush=True)
            return 1
        rounds += 1
        if given.seed is not None or time.monotonic() >= end_s:
            print(f"fuzz: {rounds} rounds without a failure", flush=True)
            return 0


if __name__ == "__main__":
    sys.exit(main())
