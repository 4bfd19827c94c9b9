"""Models and settings that need an engine of their own: two tensor-parallel ranks, and layers with a sliding window."""

import json
import os
import subprocess
import sys

import pytest

from tests.sources import ROOT


def run(cluster: str, folder, kind: str, ranks: int) -> dict:
    command = [sys.executable, "-m", "tests.vllm.small_engine", cluster, folder, kind, str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=ROOT, env=os.environ)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(lines[0])


def assert_reloaded(result: dict, loaded_blocks: int) -> None:
    """Fail unless the reload came from us, and equals the cold answer to the last bit."""
    cold, reload = result["answers"]["cold"], result["answers"]["reload"]
    assert (reload["tokens"], reload["logprobs"]) == (cold["tokens"], cold["logprobs"])
    assert result["answers"]["repeat"]["cached"] == reload["cached"] == 640
    assert result["counts"]["vllm:tiered_kv_loaded_blocks"] == loaded_blocks
    assert result["counts"]["vllm:tiered_kv_failed_blocks"] == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core")
def test_two_tensor_parallel_ranks(node, cluster, tmp_path) -> None:
    """A hit is what both ranks have: five blocks of 128 tokens, each of two halves."""
    assert_reloaded(run(cluster, tmp_path, "llama", 2), 10)


def test_layers_with_a_sliding_window(node, cluster, tmp_path) -> None:
    """vLLM keeps all blocks of such layers when a connector without hybrid groups is used, so they are as good as others."""
    assert_reloaded(run(cluster, tmp_path, "gemma", 1), 5)
