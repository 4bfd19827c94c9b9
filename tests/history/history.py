"""A history of stores and fetches, and the check of the one rule that a cache must keep: no fetch returns what was not stored.

Workers of a test, simulated or real, write an `Operation` for each store and each fetch. `wrong_blocks` then compares each fetched block
with the stores that began before the fetch ended: one of them must have stored these very bytes under this key, in the same scope
(tenant, model and epoch). A store counts from its beginning, whatever its outcome, because its blocks may be visible before it returns.
A killed worker leaves the beginning of its store in the history: so a store is written before it begins, and a fetch after it ended.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

STORE, FETCH = "store", "fetch"


class Operation(NamedTuple):
    """One store or fetch. `at_s`: when a store began, or when a fetch ended, on a clock that all workers share.

    `blocks`: by key (hex) the digest of each block's bytes. `scope`: what the blocks must not be shared beyond.
    """

    worker: str
    kind: str
    at_s: float
    scope: str
    blocks: dict[str, str]


class WrongBlock(NamedTuple):
    """A fetched block that no store explains."""

    fetch: Operation
    key: str
    why: str

    def __str__(self) -> str:
        return f"{self.fetch.worker} fetched block {self.key[:12]} at {self.fetch.at_s:.6f} s: {self.why}"


def digest_of(data: bytes | memoryview) -> str:
    """Returns the digest of a block's bytes."""
    return xxhash.xxh3_64_hexdigest(data)


def wrong_blocks(history: Iterable[Operation]) -> Iterator[WrongBlock]:
    """Yields the fetched blocks whose bytes no store of that key and scope, begun before the fetch ended, has stored."""
    operations = list(history)
    first_s: dict[tuple[str, str, str], float] = {}  # by scope, key and digest: when the first such store began
    known: dict[str, set[str]] = {}  # by key: the scopes in which it was stored
    for each in operations:
        if each.kind == STORE:
            for key, digest in each.blocks.items():
                stored = (each.scope, key, digest)
                first_s[stored] = min(each.at_s, first_s.get(stored, each.at_s))
                known.setdefault(key, set()).add(each.scope)
    for each in operations:
        if each.kind == FETCH:
            for key, digest in each.blocks.items():
                begun_s = first_s.get((each.scope, key, digest))
                if begun_s is None:
                    scopes = known.get(key, set())
                    reason = "it was never stored" if not scopes else f"it was stored in the scopes {sorted(scopes)} only"
                    yield WrongBlock(each, key, "its bytes were never stored under this key" if each.scope in scopes else reason)
                elif begun_s > each.at_s:
                    yield WrongBlock(each, key, f"the first store of these bytes began later, at {begun_s:.6f} s")


class HistoryFile:
    """A history in a file of JSON lines. Each process of a test appends to a file of its own; a killed one leaves whole lines."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as this object

    def append(self, operation: Operation) -> None:
        """Write one operation. It is in the file when this returns."""
        self._file.write(json.dumps(operation) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_history(paths: Iterable[str | Path]) -> Iterator[Operation]:
    """Yields the operations in files of `HistoryFile`. An incomplete last line, of a killed process, is left out."""
    for path in paths:
        for line in Path(path).read_text().split("\n"):
            fields = _fields(line)
            if fields is not None:
                yield Operation(*fields)


def _fields(line: str) -> list[Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if type(fields) is list and len(fields) == len(Operation._fields) else None
