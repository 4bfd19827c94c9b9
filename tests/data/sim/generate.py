"""Makes the traces of this folder: `python generate.py` writes them beside itself, the same bytes' worth each time.

Synthetic and seeded; only `random.random()` is used, whose sequence no Python version changes.
"""

import heapq
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import zstandard

BLOCK_TOKENS = 64


class Chance:
    """Draws from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def upto(self, count: int) -> int:
        return int(self._random() * count)

    def exponential(self, mean: float) -> float:
        return -mean * math.log(1 - self._random())

    def skewed(self, count: int) -> int:
        """0 is the most likely."""
        return int(count ** self._random()) - 1

    def happens(self, probability: float) -> bool:
        return self._random() < probability


class Ids:
    """One id for each prefix."""

    def __init__(self) -> None:
        self._ids: dict[tuple, int] = {}

    def of(self, contents: list) -> list[int]:
        found, parent = [], None
        for content in contents:
            parent = self._ids.setdefault((parent, content), len(self._ids))
            found.append(parent)
        return found


def chat(seed: int, sessions: int) -> Iterator[dict]:
    """Conversations behind one of three system prompts; each turn repeats the last and its answer, and adds a question."""
    chance, ids = Chance(seed), Ids()
    waiting, starts_ms = [], 0.0
    for session in range(sessions):
        starts_ms += chance.exponential(1500)
        prompt = chance.skewed(4)
        heapq.heappush(waiting, (starts_ms, session, [f"system {prompt}", *(f"system {prompt}.{at}" for at in range(4 + prompt))]))
    while waiting:
        time_ms, session, contents = heapq.heappop(waiting)
        question, answer = 20 + int(chance.exponential(180)), 1 + int(chance.exponential(150))
        contents = contents + [(session, time_ms, at) for at in range(-(-question // BLOCK_TOKENS))]
        tokens = (len(contents) - 1) * BLOCK_TOKENS + 1 + question % BLOCK_TOKENS
        yield {"timestamp": round(time_ms), "input_length": tokens, "output_length": answer, "hash_ids": ids.of(contents)}
        if chance.happens(0.72):
            contents = contents[:-1] + [(session, time_ms, "answer", at) for at in range(1 + answer // BLOCK_TOKENS)]
            heapq.heappush(waiting, (time_ms + 3000 + chance.exponential(40_000), session, contents))


def documents(seed: int, requests: int) -> Iterator[dict]:
    """Questions about documents behind a system prompt; which documents are popular drifts, and a batch job scans all."""
    chance, ids = Chance(seed), Ids()
    time_ms, scanned = 0.0, 0
    for request in range(requests):
        time_ms += chance.exponential(250)
        if scans := (request // 500) % 3 == 2 and chance.happens(0.4):
            scanned += 1
        document = scanned % 400 if scans else (chance.skewed(400) + request // 30) % 400
        length = 3 + document * 7 % 12
        contents = [f"system {at}" for at in range(3)] + [(document, at) for at in range(length)] + [request]
        tokens = (len(contents) - 1) * BLOCK_TOKENS + 1 + chance.upto(BLOCK_TOKENS - 1)
        yield {"timestamp": round(time_ms), "input_length": tokens, "output_length": 1 + chance.upto(400), "hash_ids": ids.of(contents)}


TRACES = {"chat": lambda: chat(11, 700), "documents": lambda: documents(12, 2_500)}

if __name__ == "__main__":
    for name, make in TRACES.items():
        text = "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in make())
        path = Path(__file__).parent / f"{name}-b{BLOCK_TOKENS}.jsonl.zst"
        path.write_bytes(zstandard.ZstdCompressor(19).compress(text.encode()))
