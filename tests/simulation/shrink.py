"""Makes the plan of a failing simulation smaller, and reports the smallest one."""

import traceback

from tests.simulation.plan import Plan
from tests.simulation.simulation import Outcome, simulate

TRIES_MAX = 150
"""Limit: simulations run to make one plan smaller."""
LINES_MAX = 120


def shrunk(failed: Outcome, tries: int = TRIES_MAX) -> Outcome:
    """Returns a failure of the same kind with as few steps as `tries` simulations can find. Drops ever smaller parts of the plan.

    This is the minimizing of Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input" (2002), without its complements.
    """
    best, size = failed, max(len(failed.plan.steps) // 2, 1)
    while tries > 0:
        smaller = None
        for start in range(0, len(best.plan.steps), size):
            if tries <= 0:
                break
            tries -= 1
            smaller = _still_failing(best, start, size)
            if smaller is not None:
                best = smaller
                break
        if smaller is None:
            if size == 1:
                break
            size //= 2
    return best


def _still_failing(best: Outcome, start: int, size: int) -> Outcome | None:
    """Returns the outcome without some steps if it is the same failure."""
    plan: Plan = best.plan.without(set(range(start, start + size)))
    outcome = simulate(plan)
    return outcome if outcome.kind == best.kind else None


def report(failed: Outcome, smallest: Outcome) -> str:
    """Returns what a person needs who looks for the cause: what failed, the shortest history, and how to run it again."""
    plan = smallest.plan
    lines = [
        f"seed {plan.seed}: {failed.kind}: {failed.failure}",
        f"replay it with: make sim-cluster SEED={plan.seed}    or: pytest tests/simulation --sim-seed {plan.seed}",
        f"settings: {plan.settings}, {plan.nodes} nodes, {plan.workers} workers, switch_share {plan.switch_share}",
        f"the shortest history found has {len(plan.steps)} of the {len(failed.plan.steps)} steps ({smallest.failure}):",
        *smallest.log[-LINES_MAX:],
    ]
    cause = smallest.failure.__cause__ if smallest.failure is not None else None
    if cause is not None:
        lines += ["cause:", *traceback.format_exception(cause)]
    return "\n".join(lines)
