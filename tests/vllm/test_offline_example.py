"""The offline example of vLLM runs as a reader would run it: in its own process, with a cluster started by `tiered-kv up`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WITHIN_S = 400


def test_the_second_question_loads_what_the_first_has_computed(tmp_path: Path, model: str) -> None:
    hidden = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "VLLM_ENABLE_V1_MULTIPROCESSING")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["TIERED_KV_STATE"] = str(tmp_path / "state")

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    run("-m", "tiered_kv.cluster.commands.cli", "up", "--host", "256MiB")
    try:
        text = run(str(ROOT / "examples" / "vllm_offline.py"), model)
    finally:
        run("-m", "tiered_kv.cluster.commands.cli", "down")
    (first, tokens), (second, _) = re.findall(r"(\d+) of (\d+) prompt tokens were not computed", text)
    assert int(first) == 0
    assert int(second) > int(tokens) // 2
