"""Prompts for measurements: built-in texts that no calibration uses, or the user's own."""

import json
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiered_kv.errors import Kind, TieredKVError

CHARACTERS_A_TOKEN = 12
"""Only this many characters per wanted token are tokenized first, so that a long text need not be tokenized whole."""


class Prompts(NamedTuple):
    """Prompts as token ids (1, n), all of the same length. `skipped`: the number of texts that were too short."""

    ids: list[torch.Tensor]
    skipped: int


def own_texts() -> Iterator[str]:
    """Yields texts that every machine has: the demo's documents, then the standard library's modules, longest first.

    The documents and the 45 longest modules are never used for calibration (`calibrate.corpus`).
    """
    folder = files("tiered_kv.tools.demo") / "documents"
    yield from (path.read_text("utf-8") for path in sorted(folder.iterdir(), key=lambda path: path.name) if path.name.endswith(".md"))
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    yield from (path.read_text("utf-8") for path in modules)


def texts_from(path: str, setting: str = "prompts") -> list[str]:
    """Returns the texts of a file of JSON lines {"text": …}.

    Raises (kind `config`) naming the flag, the file and the line.
    """
    lines = content_of(path, setting).split("\n")
    texts = [_text(line, f"--{setting}: {path}, line {number}", setting) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise TieredKVError(Kind.CONFIG, f"--{setting}: {path} contains no texts", setting=setting)
    return texts


def content_of(path: str, setting: str) -> str:
    """Returns the content of a text file. Raises (kind `config`) naming the flag and the file."""
    try:
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TieredKVError(Kind.CONFIG, f"--{setting}: cannot read {path}: {error}", setting=setting) from error


def _text(line: str, where: str, setting: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TieredKVError(Kind.CONFIG, f"{where}: not JSON ({error})", setting=setting) from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise TieredKVError(Kind.CONFIG, f'{where}: must be an object with a string "text"', setting=setting)
    return record["text"]


def prompts_of(tokenizer: Any, texts: Iterable[str], tokens: int, limit: int | None = None) -> Prompts:
    """Returns the first `tokens` tokens of each text that is long enough, up to `limit` prompts.

    Raises (kind `config`) if no text is long enough.
    """
    skipped = 0

    def cut() -> Iterator[torch.Tensor]:
        nonlocal skipped
        for text in texts:
            ids = _ids(tokenizer, text, tokens)
            if ids.shape[1] == tokens:
                yield ids
            else:
                skipped += 1

    prompts = list(islice(cut(), limit))
    if not prompts:
        message = f"--prompts: a text must have {tokens} tokens (--prefix-tokens plus --continue-tokens), got {skipped} shorter texts"
        raise TieredKVError(Kind.CONFIG, message, setting="prompts")
    return Prompts(prompts, skipped)


def _ids(tokenizer: Any, text: str, tokens: int) -> torch.Tensor:
    head = text[: CHARACTERS_A_TOKEN * tokens]
    ids = tokenizer(head, return_tensors="pt")["input_ids"]
    if ids.shape[1] < tokens and len(head) < len(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    return ids[:, :tokens].long()
