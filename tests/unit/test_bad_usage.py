"""Commands with arguments that cannot be used: each says so within seconds, and needs no cluster."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = (sys.executable, "-m", "tiered_kv.cluster.commands.cli")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["up", "--host", "0", "--name", "bad"], 2, "host"),
        (["up", "--host", "much", "--name", "bad"], 2, "must be a size"),
        (["up", "--disk", "1KiB", "--name", "bad"], 2, "disk"),
        (["up", "--nodes", "0", "--name", "bad"], 2, "nodes"),
        (["up", "--address", "127.0.0.1:1", "--name", "bad"], 1, "--address"),
        (["up", "--address", "nonsense", "--name", "bad"], 1, "--address"),
        (["down", "--name", "never-was"], 1, "never-was"),
        (["status", "--name", "never-was"], 1, "never-was"),
        (["record", "--name", "never-was", "--out", "x-b64.jsonl"], 1, "never-was"),
        (["record", "--seconds", "0", "--out", "x-b64.jsonl"], 2, "--seconds"),
        (["record"], 2, "--out"),
        (["demo", "--replicas", "0"], 2, "--replicas"),
        (["demo", "--prompts", "/nonexistent.jsonl"], 2, "--prompts"),
        (["nothing"], 2, "invalid choice"),
    ],
)
def test_bad_usage_is_reported_within_seconds(
    arguments: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ran = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == status, ran.stdout + ran.stderr
    assert words in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr
