"""A few hundred simulated clusters keep all invariants; bugs that are planted are found; and a seed decides everything."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.simulation.carriers import Greenlets, Threads
from tests.simulation.plan import plan_of
from tests.simulation.planted import PLANTED, planted
from tests.simulation.shrink import report, shrunk
from tests.simulation.simulation import Outcome, simulate
from tests.sources import ROOT

SEEDS = int(os.environ.get("TIERED_KV_SIM_SEEDS", "150"))
BUDGET = 400
"""Seeds within which each planted bug must be found: far fewer than `make sim-cluster` runs."""
COMPARED = [3, 17, 91]
"""Seeds with several nodes, crashes, and faults of disk and network."""


def test_no_seed_breaks_an_invariant(request: pytest.FixtureRequest) -> None:
    chosen = request.config.getoption("--sim-seed")
    for seed in range(SEEDS) if chosen is None else [chosen]:
        outcome = simulate(plan_of(seed))
        if outcome.kind is not None:
            pytest.fail(report(outcome, shrunk(outcome)), pytrace=False)


def first_failure() -> Outcome:
    """Returns the first failing outcome within the budget."""
    for seed in range(BUDGET):
        outcome = simulate(plan_of(seed))
        if outcome.kind is not None:
            return outcome
    pytest.fail(f"the planted bug was not found with {BUDGET} seeds")


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_and_gone_without_it(bug: str, record_property) -> None:
    with planted(bug):
        found = first_failure()
    record_property("seed", found.plan.seed)
    assert simulate(found.plan).kind is None


def test_a_failure_is_made_smaller_and_says_how_to_replay_it() -> None:
    with planted("freed early"):
        found = first_failure()
        smallest = shrunk(found, tries=40)
        again = simulate(smallest.plan)
    assert smallest.kind == found.kind
    assert len(smallest.plan.steps) < len(found.plan.steps)
    assert (again.digest, again.kind) == (smallest.digest, smallest.kind)
    text = report(found, smallest)
    assert f"make sim-cluster SEED={found.plan.seed}" in text
    assert f"--sim-seed {found.plan.seed}" in text
    assert smallest.log[-1] in text


PRINT_DIGESTS = """
import json, sys
from tests.simulation.plan import plan_of
from tests.simulation.simulation import simulate
print(json.dumps([simulate(plan_of(seed)).digest for seed in json.loads(sys.argv[1])]))
"""


@pytest.mark.parametrize("hash_seed", ["0", "7"])
def test_a_seed_has_the_same_history_in_every_process(hash_seed: str) -> None:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", PRINT_DIGESTS, json.dumps(COMPARED)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
    assert json.loads(ran.stdout) == [simulate(plan_of(seed)).digest for seed in COMPARED]


@pytest.mark.skipif(find_spec("greenlet") is None, reason="greenlet is not installed")
def test_greenlets_and_threads_give_the_same_history() -> None:
    for seed in COMPARED:
        plan = plan_of(seed)
        assert simulate(plan, Greenlets()).digest == simulate(plan, Threads()).digest


def test_seeds_differ() -> None:
    assert len({simulate(plan_of(seed)).digest for seed in range(5)}) == 5
