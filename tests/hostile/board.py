"""Counts that the processes of a hostile run share: words in a mapped file, so that even a killed process leaves its counts."""

import mmap
import os
import struct
from pathlib import Path
from typing import Self

WORKERS_MAX = 16
COUNTS = ("fetches", "checked_blocks", "wrong_blocks", "stores", "stored_blocks", "exceptions", "overrun_us_max")
_WORD = struct.Struct("<q")
_CONTROL = ("stop", "lossy", "pauses")


class Board:
    """Control words (`stop`: end now; `lossy`: blocks may have a lossy codec's error; `pauses`: how often
    all workers were stopped) and each worker's counts.

    One writer a word: the driver writes the control words, each worker its own counts.
    """

    def __init__(self, path: str | Path) -> None:
        """Maps the file, and creates it if it does not exist."""
        names = [*_CONTROL, *(f"{worker}.{count}" for worker in range(WORKERS_MAX) for count in COUNTS)]
        self._at = {name: number * _WORD.size for number, name in enumerate(names)}
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, len(names) * _WORD.size)
            self._map = mmap.mmap(fd, len(names) * _WORD.size)
        finally:
            os.close(fd)

    def __getitem__(self, name: str) -> int:
        return _WORD.unpack_from(self._map, self._at[name])[0]

    def __setitem__(self, name: str, value: int) -> None:
        _WORD.pack_into(self._map, self._at[name], value)

    def add(self, worker: int, count: str, value: int = 1) -> None:
        """Adds to one of a worker's counts."""
        self[f"{worker}.{count}"] += value

    def at_least(self, worker: int, count: str, value: int) -> None:
        """Raises one of a worker's counts to `value` if it is lower."""
        self[f"{worker}.{count}"] = max(self[f"{worker}.{count}"], value)

    def totals(self) -> dict[str, int]:
        """Returns each count over all workers: the sum, or for maxima the largest."""
        found = {}
        for count in COUNTS:
            values = [self[f"{worker}.{count}"] for worker in range(WORKERS_MAX)]
            found[count] = max(values) if count.endswith("_max") else sum(values)
        return found

    def close(self) -> None:
        """Unmaps the file."""
        self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
