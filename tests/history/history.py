"""A history of stores and fetches, and the check of the one rule that a cache must keep: no fetch returns what was not stored.

Workers of a test, simulated or real, write an `Operation` for each store and each fetch. `wrong_blocks` then compares each fetched block
with the stores that began before the fetch ended: one of them must have stored these very bytes under this key, in the same scope
(tenant, model and epoch). A store counts from its beginning, whatever its outcome, because its blocks may be visible before it returns.
So a store is written before it begins, which a killed worker cannot prevent, and a fetch after it ended.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

STORE, FETCH = "store", "fetch"
LOSSY = ""
"""In place of the digest of a fetched block that may carry a lossy codec's error: its bytes are not compared."""


class Operation(NamedTuple):
    """One store or fetch. `at_s`: when a store began, or when a fetch ended, on a clock that all workers share.

    `blocks`: by key (hex) the digest of each block's bytes. `scope`: the limits within which blocks may be shared.
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


def digest_of(data: Any) -> str:
    """Returns the digest of a block's bytes, in any object with the buffer protocol."""
    return xxhash.xxh3_64_hexdigest(data)


def wrong_blocks(history: Iterable[Operation]) -> Iterator[WrongBlock]:
    """Yields the fetched blocks whose bytes no store of that key and scope, begun before the fetch ended, has stored.

    Iterates over the history twice. Takes memory for the stored blocks only.
    """
    begun_s: dict[str, dict[tuple[str, str], float]] = {}  # by key, then scope and digest: when the first such store began
    for each in history:
        if each.kind == STORE:
            for key, digest in each.blocks.items():
                stores = begun_s.setdefault(key, {})
                for stored in ((each.scope, digest), (each.scope, LOSSY)):
                    stores[stored] = min(each.at_s, stores.get(stored, each.at_s))
    for each in history:
        if each.kind == FETCH:
            for key, digest in each.blocks.items():
                why = _why_wrong(begun_s.get(key, {}), each, digest)
                if why is not None:
                    yield WrongBlock(each, key, why)


def _why_wrong(stores: dict[tuple[str, str], float], fetch: Operation, digest: str) -> str | None:
    """Returns the reason why the stores of its key do not explain a fetched block; None if they do."""
    first_s = stores.get((fetch.scope, digest))
    if first_s is not None:
        return None if first_s <= fetch.at_s else f"the first store of these bytes began later, at {first_s:.6f} s"
    scopes = sorted({scope for scope, _ in stores})
    if not scopes:
        return "no block was ever stored under this key"
    if fetch.scope not in scopes:
        return f"it was stored in the scopes {', '.join(scopes)}, and fetched in {fetch.scope}"
    return "its bytes were never stored under this key"


class HistoryWriter:
    """Writes the history of one process to a file of its own, a JSON line for each operation. A killed process leaves whole lines."""

    def __init__(self, path: str | Path) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open as long as this object

    def append(self, operation: Operation) -> None:
        """Write one operation. It is in the file when this returns."""
        self._file.write(json.dumps(operation, separators=(",", ":")) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HistoryFiles:
    """The history in all files of `HistoryWriter` in a folder. May be iterated over several times."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def __iter__(self) -> Iterator[Operation]:
        """Yields all operations. Leaves out an incomplete last line of a killed process."""
        for path in sorted(self._folder.glob("*.jsonl")):
            with path.open() as file:
                for line in file:
                    fields = _fields(line)
                    if fields is not None:
                        yield Operation(*fields)


def _fields(line: str) -> list[Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if type(fields) is list and len(fields) == len(Operation._fields) else None
