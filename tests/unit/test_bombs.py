"""Bombs of length, nesting and compression are refused by every decoder, and cost little memory."""

import json
import subprocess
import sys

import pytest

from tests.sources import ROOT

GROWN_BYTES_MAX = 400 << 20


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("bombs")
    folder.chmod(0o700)
    command = [sys.executable, "-m", "tests.unit.bombs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "kind", ["frame", "payload", "roots", "probes", "record", "manifest", "pack", "calibration", "node", "worker", "unpacked"]
)
def test_bombs_are_refused(result, kind) -> None:
    outcomes = {name: outcome for name, outcome in result["outcomes"].items() if name.startswith(kind)}
    assert outcomes
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "refused"} == {}


def test_bombs_take_little_memory_and_the_node_goes_on(result) -> None:
    assert result["grown_bytes"] < GROWN_BYTES_MAX
    assert result["outcomes"]["a fetch afterwards"] == "a hit"
