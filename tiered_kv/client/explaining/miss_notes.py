"""A client's notes of the blocks that its last fetches did not read although a node may have had them, and why."""

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tiered_kv import forking
from tiered_kv.blocks import Reason
from tiered_kv.keys import BlockKey

NOTES_MAX = 4096


class MissNote(NamedTuple):
    """The reason why a fetch did not read a block, and when, on the client's clock."""

    why: Reason
    at_s: float


class MissNotes:
    """The notes of the last NOTES_MAX blocks. Thread-safe. Falsy while it is empty."""

    def __init__(self) -> None:
        self._notes: dict[BlockKey, MissNote] = {}
        self._lock = threading.Lock()
        forking.register(self)

    def after_fork(self) -> None:
        """Renew the lock in a forked child process: a thread of the parent may have held it."""
        self._lock = threading.Lock()

    def note(self, keys: Iterable[BlockKey], why: Reason, now_s: float) -> None:
        """Note that a fetch did not read these blocks, for this reason: `Reason.DEADLINE` or `Reason.DECLINED`."""
        with self._lock:
            for key in keys:
                self._notes.pop(key, None)
                self._notes[key] = MissNote(why, now_s)
            while len(self._notes) > NOTES_MAX:
                del self._notes[next(iter(self._notes))]

    def settle(self, read: Sequence[BlockKey]) -> None:
        """Forget the notes of blocks that a fetch has read."""
        with self._lock:
            for key in read:
                self._notes.pop(key, None)

    def of(self, key: BlockKey) -> MissNote | None:
        """Returns the note of a block, None if it has none."""
        return self._notes.get(key)

    def __len__(self) -> int:
        return len(self._notes)
