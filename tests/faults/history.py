"""The history of a run with faults: what workers did and got, written down during the run and checked afterwards.

Each worker appends its operations to its own file, one line of JSON each. The line is in the file before the next operation
begins. So the history of a killed worker lacks at most its last operation.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Operation:
    """One operation: the beginning of a store (`storing`), its end (`store`), or a fetch, written when it has ended.

    A killed worker leaves the beginning of its last store, because its blocks may be visible before it returns.

    begun_ns, ended_ns: of CLOCK_MONOTONIC, which all processes of a machine share. document: the document's number in
    `tests.hostile.content`. keys: of the blocks to store or fetched, in the order of the prompt, as hexadecimal digits. asked:
    number of blocks in the request. digests: of the bytes of each block in `keys`. tiers: number of fetched tokens by tier.
    refused: number of blocks of a store that the node refused. deadline_ms: the deadline of a fetch. error: the exception that
    the client raised, else "".
    """

    worker: str
    kind: str
    begun_ns: int
    ended_ns: int
    document: int = -1
    keys: tuple[str, ...] = ()
    asked: int = 0
    digests: tuple[str, ...] = ()
    tiers: dict[str, int] | None = None
    refused: int = 0
    deadline_ms: int = 0
    error: str = ""

    @property
    def took_ms(self) -> float:
        """The duration of the operation in ms."""
        return (self.ended_ns - self.begun_ns) / 1e6

    @property
    def overrun_ms(self) -> float:
        """The ms by which a fetch ended after its deadline; negative if it ended before."""
        return self.took_ms - self.deadline_ms

    def line(self) -> str:
        """Returns the operation as a line of the history file."""
        return json.dumps(asdict(self)) + "\n"


def read(files: Iterable[Path]) -> list[Operation]:
    """Returns the operations of all files, ordered by their start. Leaves out a last line that a killed worker did not finish."""
    found = []
    for file in files:
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                fields = json.loads(line)
                found.append(Operation(**fields | {name: tuple(fields[name]) for name in ("keys", "digests")}))
    return sorted(found, key=lambda each: each.begun_ns)


def faults_of(history: list[Operation]) -> list[str]:
    """Returns a text for each wrong operation: one that got bytes never stored under their key before, or that raised an exception."""
    stored_ns: dict[tuple[str, str], int] = {}  # by key and digest: when the first store of them began
    for each in history:
        if each.kind == "storing":
            for stored in zip(each.keys, each.digests, strict=True):
                stored_ns[stored] = min(each.begun_ns, stored_ns.get(stored, each.begun_ns))
    faults = [f"{each.kind} of {each.worker} at {each.begun_ns / 1e9:.3f} s raised: {each.error}" for each in history if each.error]
    for each in history:
        if each.kind == "fetch":
            wrong = [key for key, digest in zip(each.keys, each.digests) if stored_ns.get((key, digest), each.ended_ns) >= each.ended_ns]
            faults += [f"{each.worker} fetched block {key} at {each.begun_ns / 1e9:.3f} s: not what was stored before" for key in wrong]
    return faults


def hits(history: Iterable[Operation]) -> Counter[str]:
    """Returns the tokens that fetches returned, by tier."""
    found: Counter[str] = Counter()
    for each in history:
        found.update(each.tiers or {})
    return found


def longest_overrun_ms(history: Iterable[Operation]) -> float:
    """Returns the greatest `overrun_ms` of all fetches; negative if all ended before their deadlines."""
    return max((each.overrun_ms for each in history if each.kind == "fetch"), default=float("-inf"))
