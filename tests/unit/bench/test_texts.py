"""The prompts of measurements: their sources, how they are cut, and which files are refused."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tools.bench.evaluation import OWN_TEXTS
from tiered_kv.tools.bench.texts import own_texts, prompts_of, texts_from
from tiered_kv.tools.calibrate import corpus


def by_character(text: str, return_tensors: str) -> dict:
    """A tokenizer that makes one token of ten characters."""
    return {"input_ids": torch.arange(len(text) // 10)[None]}


def test_prompts_are_cut_to_size_and_short_texts_are_counted() -> None:
    found = prompts_of(by_character, ["short", "x" * 95, "y" * 79, "z" * 500], 8)
    assert found.skipped == 2
    assert [ids.tolist() for ids in found.ids] == [[list(range(8))]] * 2


def test_no_text_is_read_beyond_the_limit() -> None:
    texts = iter(["short", *["long" * 30] * 3])
    assert prompts_of(by_character, texts, 8, limit=1).skipped == 1
    assert len(list(texts)) == 2


def test_a_text_of_long_tokens_is_read_to_its_end() -> None:
    def tokenizer(text: str, return_tensors: str) -> dict:
        return {"input_ids": torch.arange(len(text) // 100)[None]}

    assert len(prompts_of(tokenizer, ["x" * 1000], 8).ids) == 1


def test_texts_that_are_all_too_short_are_an_error() -> None:
    with pytest.raises(TieredKVError, match=r"--prompts: a text must have 8 tokens .*got 2 shorter texts") as caught:
        prompts_of(by_character, ["short", "brief"], 8)
    assert caught.value.kind is Kind.CONFIG


def test_built_in_texts_exist_and_none_is_used_for_calibration() -> None:
    measured = list(islice(own_texts(), OWN_TEXTS))
    assert "longitude" in "".join(measured[:4]).lower()
    assert "import" in measured[4]
    fitted = {text[:1000] for text in corpus.own_texts()}
    assert not fitted & {text[:1000] for text in measured}


def test_texts_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "one\\u2028line"}\n\n{"text": "two", "more": 1}\n')
    assert texts_from(str(path)) == ["one\u2028line", "two"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "contains no texts"),
        ("\n\n", "contains no texts"),
        ('{"text": "a"}\n{"text"', "line 2: not JSON"),
        ('{"text": "a"}\n\n{"txt": "b"}', 'line 3: must be an object with a string "text"'),
        ('{"text": 5}', 'line 1: must be an object with a string "text"'),
        ('["text"]', 'line 1: must be an object with a string "text"'),
    ],
)
def test_the_error_for_a_bad_prompts_file_names_the_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(TieredKVError, match=r"^--prompts: .*prompts.jsonl") as caught:
        texts_from(str(path))
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", "folder"])
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "prompts.jsonl"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(TieredKVError, match=r"--prompts: cannot read .*prompts\.jsonl"):
        texts_from(str(path))


def test_the_error_names_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"words": "none"}))
    with pytest.raises(TieredKVError, match="--text: "):
        texts_from(str(path), "text")
