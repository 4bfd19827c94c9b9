"""Each process of a real cluster is killed and stopped while workers go on. `make hostile` causes all faults, `make test` some.

`test_cluster` and `test_fleet` cause the others, one by one.
"""

import os

import pytest

from tests.faults.kills import FAULTS, VICTIM, run_all
from tests.faults.local_cluster import RAYLET

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LATE_MS = 500.0
"""Of a bar of 50 ms, on a machine that is busy. `benchmarks/results` has the true figure."""
CHEAP = tuple(fault for fault in FAULTS if fault.what in (VICTIM, RAYLET) and not fault.is_fatal)
CAUSED = FAULTS if os.environ.get("TIERED_KV_LONG_TESTS") else CHEAP


def test_workers_go_on_while_each_process_is_killed_and_stopped_and_the_cluster_is_whole_again() -> None:
    found = run_all(CAUSED, print)
    print(found["operations"], "operations")
    assert found["wrong"] == []
    assert found["longest_fetch_beyond_its_deadline_ms"] < LATE_MS
