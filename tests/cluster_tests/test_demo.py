"""The demo from the command line, with the default model and short documents: checks its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiered_kv.errors import TieredKVError
from tiered_kv.tools.demo.run import thread_count
from tiered_kv.tools.demo.workload import own_questions, questions_from

DOCUMENTS = [
    "The mill at the river has three stones. The first one grinds wheat, the second rye, and the third, which is the oldest, oats. " * 6,
    "In winter the ferry goes four times a day, at six, at nine, at two and at five. A ticket costs three crowns, for children one. " * 6,
]
QUESTIONS = ["How many stones or trips are there?", "What is the oldest or the cheapest one?"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "nodes"), [("float32", 2), ("bfloat16", 1)])
def test_outputs_are_equal_and_the_second_replica_reuses_every_whole_block(
    dtype: str, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERED_KV_STATE", str(tmp_path / "state"))
    prompts, found = tmp_path / "prompts.jsonl", tmp_path / "found.json"
    prompts.write_text("".join(json.dumps({"document": text, "question": question}) + "\n" for text in DOCUMENTS for question in QUESTIONS))
    command = ["demo", "--dtype", dtype, "--nodes", str(nodes), "--prompts", str(prompts), "--json", str(found), "--new-tokens", "6"]
    command += ["--host", "128MiB", "--block-tokens", "16"]
    ran = subprocess.run(
        [sys.executable, "-m", "tiered_kv.cluster.commands.cli", *command], capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(found.read_text())
    first, second, third, fourth = result["requests"]
    assert [request["replica"] for request in result["requests"]] == ["A", "B", "A", "B"]
    for cold, warm in ((first, second), (third, fourth)):
        assert sum(warm["reused_tokens_by_tier"].values()) == warm["reused_tokens"]
        assert ("peer" if nodes == 2 else "host") in warm["reused_tokens_by_tier"]
        assert warm["reused_tokens"] == _shared_blocks(cold, warm, 16)
        assert warm["reused_tokens"] > 100
    for request in result["requests"]:
        assert request["equal"] is True
        assert len(request["output_ids"]) <= 6
        assert request["output_ids"] == request["reference_ids"]
        assert request["ttft_s"] > 0
        assert request["computed_prompt_tokens"] == request["prompt_tokens"] - request["reused_tokens"]
    assert result["all_equal"] is True
    assert "equal" in ran.stdout
    assert "first token" in ran.stdout


def _shared_blocks(cold: dict, warm: dict, block_tokens: int) -> int:
    """Returns the number of tokens in the whole blocks that two prompts share, computed from their token ids."""
    pairs = zip(cold["prompt_ids"], warm["prompt_ids"], strict=False)
    shared = next((at for at, (one, other) in enumerate(pairs) if one != other), min(cold["prompt_tokens"], warm["prompt_tokens"]))
    return shared // block_tokens * block_tokens


def test_built_in_questions_are_about_long_documents() -> None:
    asked = own_questions(3)
    assert len(asked) == 12
    assert len({question.document for question in asked}) == 4
    assert all(len(question.document.split()) > 800 for question in asked)
    with pytest.raises(TieredKVError, match="--questions"):
        own_questions(6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains no questions"),
        ("{", "line 1: not JSON"),
        ('{"document": "a"}', 'line 1: must be an object with the strings "document" and "question"'),
        ('{"document": "a", "question": "b"}\n[]', 'line 2: must be an object with the strings "document" and "question"'),
        ('{"document": 3, "question": "b"}', 'line 1: must be an object with the strings "document" and "question"'),
    ],
)
def test_the_error_for_a_bad_prompts_file_names_the_line(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(TieredKVError, match=words):
        questions_from(str(path))


def test_documents_are_distinguished_by_their_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"document": "a", "question": "1"}\n\n{"document": "b", "question": "2"}\n{"document": "a", "question": "3"}\n')
    assert [question.title for question in questions_from(str(path))] == ["document 1", "document 2", "document 1"]


@pytest.mark.parametrize(
    ("variable", "threads"), [("1", 1), ("3", 3), ("0", os.cpu_count()), ("4,2", os.cpu_count()), ("", os.cpu_count())]
)
def test_each_model_has_as_many_threads_as_the_environment_asks_for(variable: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, threads of one model that wait for each other take several times as long as one thread."""
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert thread_count() == threads
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert thread_count() == os.cpu_count()
