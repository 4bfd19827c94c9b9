"""The prompts of measurements: where they come from, how they are cut, and what is refused."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from tiered_kv.bench.evaluation import OWN_TEXTS
from tiered_kv.bench.texts import own_texts, prompts_of, texts_from
from tiered_kv.calibrate import corpus
from tiered_kv.errors import Kind, TieredKVError


def by_character(text: str, return_tensors: str) -> dict:
    """A tokenizer for which ten characters are a token."""
    return {"input_ids": torch.arange(len(text) // 10)[None]}


def test_prompts_are_cut_to_size_and_short_texts_are_counted() -> None:
    found = prompts_of(by_character, ["short", "x" * 95, "y" * 79, "z" * 500], 8)
    assert found.skipped == 2
    assert [ids.tolist() for ids in found.ids] == [[list(range(8))]] * 2


def test_a_limit_ends_the_reading() -> None:
    texts = iter(["short", *["long" * 30] * 3])
    assert prompts_of(by_character, texts, 8, limit=1).skipped == 1
    assert len(list(texts)) == 2


def test_a_text_of_long_tokens_is_read_to_its_end() -> None:
    def tokenizer(text: str, return_tensors: str) -> dict:
        return {"input_ids": torch.arange(len(text) // 100)[None]}

    assert len(prompts_of(tokenizer, ["x" * 1000], 8).ids) == 1


def test_without_a_prompt_that_is_long_enough_it_says_so() -> None:
    with pytest.raises(TieredKVError, match="--prompts: none of 2 texts has the 8 tokens") as caught:
        prompts_of(by_character, ["short", "brief"], 8)
    assert caught.value.kind is Kind.CONFIG


def test_there_are_texts_on_every_machine_and_none_is_calibrated_on() -> None:
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
        ("", "has no text"),
        ("\n\n", "has no text"),
        ('{"text": "a"}\n{"text"', "line 2: not JSON"),
        ('{"text": "a"}\n\n{"txt": "b"}', 'line 3: needs the text "text"'),
        ('{"text": 5}', "line 1: needs the text"),
        ('["text"]', "line 1: needs the text"),
    ],
)
def test_files_that_are_no_prompts_are_refused_by_line(tmp_path: Path, content: str, said: str) -> None:
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


def test_what_the_flag_is_called_is_said(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"words": "none"}))
    with pytest.raises(TieredKVError, match="--text: "):
        texts_from(str(path), "text")
