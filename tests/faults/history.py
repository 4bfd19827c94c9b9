"""What workers did and what they got, written down while things fail, and checked afterwards.

Each worker appends its operations to a file of its own, a line of JSON each, and the line is in the file before the next operation
begins: the history of a killed worker is complete but for its last operation.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Operation:
    """One fetch or store.

    begun_ns, ended_ns: of CLOCK_MONOTONIC, which all processes of a machine share. keys: of the blocks that were fetched or stored,
    the first block of the prompt first, as hexadecimal digits; of a fetch only those that it returned. asked: number of blocks in the
    request. digests: of the bytes of each of these blocks; expected: of the bytes that belong to each key. tiers: tokens of a fetch
    by the tier that had them. refused: blocks of a store that the node did not take. deadline_ms: of a fetch. error: the exception that left the client, "" if none did.
    """

    worker: str
    kind: str
    begun_ns: int
    ended_ns: int
    keys: tuple[str, ...] = ()
    asked: int = 0
    digests: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    tiers: dict[str, int] | None = None
    refused: int = 0
    deadline_ms: int = 0
    error: str = ""

    @property
    def took_ms(self) -> float:
        """How long it took."""
        return (self.ended_ns - self.begun_ns) / 1e6

    @property
    def overrun_ms(self) -> float:
        """By how much a fetch missed its deadline; negative if it kept it."""
        return self.took_ms - self.deadline_ms

    def line(self) -> str:
        """Returns it as a line of a file."""
        return json.dumps(asdict(self)) + "\n"


def read(files: Iterable[Path]) -> list[Operation]:
    """Returns the operations of all files, by their start. A last line that a killed worker did not finish is left out."""
    found = []
    for file in files:
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                fields = json.loads(line)
                found.append(Operation(**fields | {name: tuple(fields[name]) for name in ("keys", "digests", "expected")}))
    return sorted(found, key=lambda each: each.begun_ns)


def faults_of(history: list[Operation]) -> list[str]:
    """Returns a text for each operation that no cache may show: wrong bytes, a block that nobody had stored, or an exception."""
    faults = []
    first_stored_ns: dict[str, int] = {}
    for each in history:
        if each.kind == "store":
            for key in each.keys:
                first_stored_ns[key] = min(first_stored_ns.get(key, each.begun_ns), each.begun_ns)
    for each in history:
        who = f"{each.kind} of {each.worker} at {each.begun_ns / 1e9:.3f} s"
        if each.error:
            faults.append(f"{who} raised: {each.error}")
        if len(each.keys) > each.asked or not len(each.keys) == len(each.digests) == len(each.expected):
            faults.append(f"{who} returned {len(each.digests)} blocks for {len(each.keys)} keys of {each.asked}")
        for key, digest, expected in zip(each.keys, each.digests, each.expected, strict=False):
            if digest != expected:
                faults.append(f"{who}: the bytes of block {key} are {digest}, must be {expected}")
            if each.kind == "fetch" and first_stored_ns.get(key, each.ended_ns) >= each.ended_ns:
                faults.append(f"{who}: block {key} was returned before anybody stored it")
    return faults


def hits(history: Iterable[Operation]) -> Counter[str]:
    """Returns the tokens that fetches returned, by tier."""
    found: Counter[str] = Counter()
    for each in history:
        found.update(each.tiers or {})
    return found


def longest_overrun_ms(history: Iterable[Operation]) -> float:
    """Returns by how much the slowest fetch missed its deadline; negative if all kept it."""
    return max((each.overrun_ms for each in history if each.kind == "fetch"), default=float("-inf"))
