"""A short hostile run. `make hostile MINUTES=20` makes long ones."""

import json
import os

import pytest

from tests.hostile.run import faults_of, hostile_run

SECONDS = float(os.environ.get("TIERED_KV_HOSTILE_S", "15"))


@pytest.mark.slow
def test_workers_read_no_wrong_block_while_their_node_is_killed_stopped_and_its_files_deleted(record_property, capsys) -> None:
    result = hostile_run(SECONDS, seed=1)
    record_property("result", result)
    with capsys.disabled():
        print(f"\n  {json.dumps(result)}")
    assert faults_of(result) == []
