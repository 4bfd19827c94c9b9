"""Exact hit counts of every policy on two committed traces (made by tests/data/sim/generate.py).

After a change that is meant to change the counts, run `python -m tests.unit.simulate.test_golden` to write new ones.
"""

import json

import pytest

from tests.unit.simulate.traces import DATA
from tiered_kv.tools.simulate.cells import ALL_NAMES
from tiered_kv.tools.simulate.replay import replay
from tiered_kv.tools.simulate.trace import read_trace

GOLDEN = DATA / "golden.json"
TRACES = ["chat-b64.jsonl.zst", "documents-b64.jsonl.zst"]
CAPACITIES = [0.02, 0.1, 0.3]


def counts(trace_name: str, policy: str) -> dict[str, list[int]]:
    """Returns hit blocks and evictions by capacity."""
    trace = read_trace(DATA / trace_name)
    results = [replay(trace, policy, capacity) for capacity in CAPACITIES]
    return {str(result.capacity): [result.hit_blocks, result.evictions] for result in results}


@pytest.mark.parametrize("policy", ALL_NAMES)
@pytest.mark.parametrize("trace", TRACES)
def test_hits_and_evictions_equal_the_committed_counts(trace, policy):
    assert counts(trace, policy) == json.loads(GOLDEN.read_text())[trace][policy]


def test_every_committed_policy_exists():
    golden = json.loads(GOLDEN.read_text())
    assert {name: set(of_trace) for name, of_trace in golden.items()} == {name: set(ALL_NAMES) for name in TRACES}


def test_the_optimum_has_the_most_hits_everywhere():
    for of_trace in json.loads(GOLDEN.read_text()).values():
        for capacity in map(str, CAPACITIES):
            hits = {policy: found[capacity][0] for policy, found in of_trace.items()}
            assert max(hits, key=hits.__getitem__) == "belady"


if __name__ == "__main__":
    found = {trace: {policy: counts(trace, policy) for policy in ALL_NAMES} for trace in TRACES}
    lines = [f' "{trace}": {{\n' + ",\n".join(f'  "{p}": {json.dumps(c)}' for p, c in of.items()) + "\n }" for trace, of in found.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
