"""Every example runs as a reader would run it: in its own process, with a cluster started by `tiered-kv up`."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.sources import ROOT

IN_VLLMS_ENVIRONMENT = ("vllm_offline.py", "ray_serve_llm.py")
"""Examples that need vLLM: tests/vllm runs the first, and docs/vllm.md says how the second was run."""
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.name not in IN_VLLMS_ENVIRONMENT)
WITHIN_S = 300


def run(*command: str, environment: dict[str, str]) -> str:
    """Run a command. Returns its output. Fails if the command fails."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a cluster with its own state folder. Yields the environment in which processes find it."""
    ray_settings = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    environment = {key: value for key, value in os.environ.items() if key not in ray_settings}
    environment["TIERED_KV_STATE"] = str(tmp_path_factory.mktemp("state"))
    cli = ("-m", "tiered_kv.cluster.commands.cli")
    run(*cli, "up", "--host", "128MiB", environment=environment)
    try:
        yield environment
    finally:
        run(*cli, "down", environment=environment)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_an_example_runs(example, running_cluster):
    assert run(str(example), environment=running_cluster).strip(), "an example must print something"


LIBRARY_EXAMPLES = [path for path in sorted((ROOT / "examples" / "library").glob("*.py")) if path.stem != "tiny"]


@pytest.mark.parametrize("example", LIBRARY_EXAMPLES, ids=[path.stem for path in LIBRARY_EXAMPLES])
def test_an_example_of_the_library_runs(example, tmp_path, monkeypatch, capsys):
    """Runs in this process, which saves the time for importing torch.

    The folder of the example is on the path, as when Python runs a script, because examples import `tiny`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(example.parent))
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip(), "an example must print something"
