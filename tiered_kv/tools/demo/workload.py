"""The demo's workload: questions about long documents. Each prompt starts with the document."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tiered_kv.errors import Kind, TieredKVError


@dataclass(frozen=True)
class Question:
    """One question about one document. `title` names the document in the table."""

    title: str
    document: str
    question: str


def own_questions(per_document: int) -> list[Question]:
    """Returns the first `per_document` questions about each built-in document, document by document."""
    folder = files("tiered_kv.tools.demo") / "documents"
    asked: dict[str, list[Question]] = {}
    for line in (folder / "questions.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        name = record["document"]
        text = asked[name][0].document if name in asked else (folder / name).read_text("utf-8")
        asked.setdefault(name, []).append(Question(name.removesuffix(".md"), text, record["question"]))
    least = min(len(questions) for questions in asked.values())
    if not 1 <= per_document <= least:
        raise TieredKVError(Kind.CONFIG, f"--questions: must be 1 to {least}, got {per_document}", setting="questions")
    return [question for questions in asked.values() for question in questions[:per_document]]


def questions_from(path: str) -> list[Question]:
    """Returns the questions in a file of JSON lines {"document": text, "question": text}, in their order.

    Raises (kind `config`) naming the bad line.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TieredKVError(Kind.CONFIG, f"--prompts: cannot read {path}: {error}", setting="prompts") from error
    titles: dict[str, str] = {}
    asked = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _record(line, f"--prompts: {path}, line {number}")
        title = titles.setdefault(record["document"], f"document {len(titles) + 1}")
        asked.append(Question(title, record["document"], record["question"]))
    if not asked:
        raise TieredKVError(Kind.CONFIG, f"--prompts: {path} contains no questions", setting="prompts")
    return asked


def _record(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise TieredKVError(Kind.CONFIG, f"{where}: not JSON ({error})", setting="prompts") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(field), str) for field in ("document", "question")):
        raise TieredKVError(Kind.CONFIG, f'{where}: must be an object with the strings "document" and "question"', setting="prompts")
    return record


def prompt_ids(tokenizer: Any, question: Question) -> list[int]:
    """Returns the token ids of a prompt: the document, then the question, in the model's chat template if it has one."""
    text = f"{question.document.strip()}\n\nAnswer in one short sentence. {question.question}"
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer(f"{text}\nAnswer:")["input_ids"]
