"""Texts for calibration: texts found on this machine, or the user's own, cut into prompts.

Texts that are reserved for measurements are never used: the demo's documents, and the standard library's longest modules.
"""

import importlib.metadata
import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from tiered_kv.errors import Kind, TieredKVError

TOKENS_MIN = 10_000
PROMPT_TOKENS_MIN = 64
TEXT_CHARACTERS_MAX = 24_000
KEPT_FOR_MEASUREMENTS = 45
"""The number of the standard library's longest modules that are reserved for measurements."""
_SEED = 20


def own_texts() -> list[str]:
    """Returns texts found on this machine, one of each kind in turn.

    The kinds are Python, the language reference, READMEs, prose, licences, notes, data and C headers. The same machine gives
    the same list. Other installed packages change the list, but hardly the fitted tables.
    """
    kinds = [_modules(), _topics(), _readmes(), _prose(), _licences(), _packages(), _notes(), _readmes(skip=1), _data(), _headers()]
    in_turn = chain.from_iterable(zip_longest(*kinds))
    texts = dict.fromkeys(text for text in in_turn if text)
    return list(texts)


def prompts_of(tokenizer: Any, texts: Sequence[str], tokens: int, prompt_tokens: int, least: int = TOKENS_MIN) -> list[torch.Tensor]:
    """Cut texts into prompts (1, n) of at most `prompt_tokens` tokens: the first of each text, then the second of each, and so on.

    Returns prompts with at least `tokens` tokens in total, or all there are if the texts have fewer. Each prompt starts with the
    tokenizer's own start tokens. Raises (kind `config`) if there are fewer than `least` tokens.
    """
    head = list(tokenizer("")["input_ids"])
    found: list[torch.Tensor] = []
    count = 0
    waiting: list[Iterator[list[int]]] = [_cut(tokenizer, text, head, prompt_tokens) for text in texts]
    while waiting and count < tokens:
        left = []
        for pieces in waiting:
            piece = next(pieces, None)
            if piece is None or count >= tokens:
                continue
            found.append(torch.tensor([piece]))
            count += len(piece)
            left.append(pieces)
        waiting = left
    if count < least:
        message = f"--text: must have at least {least} tokens, better 50000 or more, got {count}"
        raise TieredKVError(Kind.CONFIG, message, setting="text", tokens=count)
    return found


def _cut(tokenizer: Any, text: str, head: list[int], prompt_tokens: int) -> Iterator[list[int]]:
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    step = prompt_tokens - len(head)
    for start in range(0, len(ids), step):
        piece = head + ids[start : start + step]
        if len(piece) >= min(PROMPT_TOKENS_MIN, prompt_tokens):
            yield piece


def _read(paths: Sequence[Path], least: int = 3000) -> Iterator[str]:
    """Yields the texts of files of at least `least` characters, in a seeded order.

    Every second text, if it is long, starts at a random line.
    """
    paths = sorted(paths)
    generator = random.Random(_SEED)
    generator.shuffle(paths)
    for number, path in enumerate(paths):
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= least:
            yield _part(text, generator if number % 2 else None)


def _part(text: str, generator: random.Random | None) -> str:
    """Returns at most TEXT_CHARACTERS_MAX characters of a text: from its start, or from a random line if `generator` is given."""
    if generator and len(text) > 2 * TEXT_CHARACTERS_MAX:
        start = generator.randrange(len(text) - TEXT_CHARACTERS_MAX)
        text = text[text.find("\n", start) + 1 :]
    return text[:TEXT_CHARACTERS_MAX]


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules() -> Iterator[str]:
    by_size = sorted(_library().glob("*.py"), key=lambda path: (-path.stat().st_size, path.name))
    return _read(by_size[KEPT_FOR_MEASUREMENTS:])


def _packages() -> Iterator[str]:
    folders = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "urllib", "xml", "concurrent")
    return _read([path for folder in folders for path in (_library() / folder).rglob("*.py")])


def _topics() -> Iterator[str]:
    """Yields chapters of the Python language reference in a seeded order."""
    from pydoc_data.topics import topics

    names = sorted(name for name, text in topics.items() if len(text) >= 6000)
    generator = random.Random(_SEED)
    generator.shuffle(names)
    return (_part(topics[name], generator) for name in names)


def _readmes(skip: int = 0) -> Iterator[str]:
    """Yields the description of every second installed package, without its metadata fields."""
    found = {dist.name or "": dist for dist in importlib.metadata.distributions()}
    for name in sorted(found)[skip::2]:
        text = (found[name].read_text("METADATA") or "").partition("\n\n")[2]
        if len(text) >= 3000:
            yield text[:TEXT_CHARACTERS_MAX]


def _licences() -> Iterator[str]:
    """Yields the distinct licences of installed packages and of the system."""
    system = Path("/usr/share/common-licenses")
    paths = [path for path in system.glob("*") if path.is_file()] if system.is_dir() else []
    for dist in importlib.metadata.distributions():
        names = [file for file in dist.files or [] if any(word in file.name.upper() for word in ("LICENSE", "COPYING", "NOTICE"))]
        paths += [Path(str(file.locate())) for file in names if file.suffix in ("", ".txt", ".md", ".rst")]
    seen = set()
    for text in _read(paths, least=5000):
        opening = " ".join(text[:3000].split())[:300]
        if opening not in seen:
            seen.add(opening)
            yield text


def _notes() -> Iterator[str]:
    """Yields notes, help pages and changelogs from the standard library and the system."""
    places = [(_library() / "idlelib", "*.txt"), (_library() / "idlelib", "*.html"), (Path("/usr/share/doc"), "*/README*")]
    paths = [path for folder, pattern in places if folder.is_dir() for path in folder.glob(pattern) if path.suffix != ".gz"]
    return _read(paths)


def _prose() -> Iterator[str]:
    """Yields stories, news, letters and answers from `prose.md`, which was written because machines have no such texts."""
    text = (files("tiered_kv.tools.calibrate") / "prose.md").read_text("utf-8")
    paragraphs = text.split("\n\n")
    third = -(-len(paragraphs) // 3)
    for first in range(0, len(paragraphs), third):
        yield "\n\n".join(paragraphs[first : first + third])


def _headers() -> Iterator[str]:
    folder = Path(sysconfig.get_path("include"))
    return _read(list(folder.glob("*.h"))) if folder.is_dir() else iter(())


def _data() -> Iterator[str]:
    """Yields generated data: records as JSON, and a table of numbers."""
    generator = random.Random(_SEED)
    words = ("north", "river", "invoice", "engine", "status", "pending", "delivered", "temperature", "Anna", "Karl", "Lagos", "Lima")
    rows = [
        {"id": number, "name": generator.choice(words), "value": round(generator.gauss(100, 30), 3), "tags": generator.sample(words, 2)}
        for number in range(120)
    ]
    yield json.dumps(rows, indent=1)
    yield "\n".join(",".join(f"{generator.gauss(0, 10 ** (column % 4)):.3f}" for column in range(8)) for _ in range(120))
