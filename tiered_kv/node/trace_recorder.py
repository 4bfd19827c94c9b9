"""Records a node's requests as a trace, in the format that `tiered-kv simulate` reads (Mooncake's).

A request is put together from what the node hears anyway: a use of leading blocks, the blocks stored behind them, and
how long the answer was if the worker said so. Costs nothing while nobody records.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from tiered_kv.keys import BlockKey
from tiered_kv.policy import History, Key

PENDING_S = 5.0
"""How long a request may go on: from its fetch to the store of what it computed."""

REQUESTS_MAX = 100_000
"""Requests kept for whoever reads them; after that the oldest are lost, and counted."""


@dataclass
class _Request:
    time_s: float
    keys: list[BlockKey]
    answer_tokens: int = 0


class Recorder:
    """Requests of one node, in order. Not thread-safe. Keys leave it as numbers of 53 bits that only `salt` could explain.

    Lengths are those of whole blocks; what follows the last whole block is not known here.
    """

    def __init__(self, salt: bytes, block_tokens: int, chain_to: Callable[[BlockKey], list[BlockKey]], *, start_s: float = 0.0) -> None:
        """`chain_to`: the block and all before it, the chain's first block first; empty where not all of them are known.

        `start_s`: from when on times count.
        """
        self._start_s = start_s
        self._salt = salt
        self._chain_to = chain_to
        self._block_tokens = block_tokens
        self._open: OrderedDict[BlockKey, _Request] = OrderedDict()  # by the deepest block, the oldest first
        self._done: list[_Request] = []
        self.lost = 0
        """Requests that are missing: nobody took them in time, or a part of their chain was not known."""

    def seen(self, keys: Sequence[BlockKey], parent: BlockKey | None, now_s: float) -> None:
        """A run of a chain was used, or stored, behind `parent`."""
        self._close_before(now_s - PENDING_S)
        request = self._open.pop(parent, None) if parent is not None else None
        again = self._open.pop(keys[-1], None)
        if again:
            self._finish(again)
        chain = self._chain_to(keys[-1])
        if not chain:  # ids of half a chain would say that its first block may stand behind nothing
            self.lost += 1
            if request:
                self._finish(request)
            return
        request = request or _Request(now_s, [])
        request.keys = chain
        self._open[keys[-1]] = request

    def answered(self, tail: BlockKey, tokens: int) -> None:
        """The request whose deepest block is `tail` was answered with so many tokens."""
        if tail in self._open:
            self._open[tail].answer_tokens = tokens

    def take(self, now_s: float, everything: bool = False) -> list[dict]:
        """Records of the requests that are over (or of all), as lines of a trace: plain numbers, ready for JSON. Each is given once."""
        self._close_before(float("inf") if everything else now_s - PENDING_S)
        done, self._done = self._done, []
        return [self._line(request) for request in sorted(done, key=lambda request: request.time_s)]

    def check(self) -> None:
        """Assert that open requests are filed under their last block."""
        assert all(request.keys[-1] == tail for tail, request in self._open.items())

    def _close_before(self, time_s: float) -> None:
        while self._open and next(iter(self._open.values())).time_s < time_s:
            self._finish(self._open.popitem(last=False)[1])

    def _finish(self, request: _Request) -> None:
        self._done.append(request)
        if len(self._done) > REQUESTS_MAX:
            self.lost += len(self._done) - REQUESTS_MAX
            del self._done[: len(self._done) - REQUESTS_MAX]

    def _line(self, request: _Request) -> dict:
        return {
            "timestamp": max(round((request.time_s - self._start_s) * 1000), 0),
            "input_length": len(request.keys) * self._block_tokens,
            "output_length": request.answer_tokens,
            "hash_ids": [self._number(key) for key in request.keys],
        }

    def _number(self, key: BlockKey) -> int:
        return int.from_bytes(blake2b(key, digest_size=8, key=self._salt).digest()) >> 11


class ObservedHistory:
    """A node's history, of whose uses and answers a recorder hears too while there is one; all else goes straight to it."""

    def __init__(self, history: History) -> None:
        self._history = history
        self.recorder: Recorder | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._history, name)

    def seen(self, keys: Sequence[Key], parent: Key | None, now_s: float) -> None:
        """As `History.seen`."""
        self._history.seen(keys, parent, now_s)
        if self.recorder:
            self.recorder.seen(keys, parent, now_s)

    def hint(self, tail: Key, now_s: float, *, answer_tokens: int | None = None, **foretold: Any) -> None:
        """As `History.hint`."""
        self._history.hint(tail, now_s, answer_tokens=answer_tokens, **foretold)
        if self.recorder and answer_tokens is not None:
            self.recorder.answered(tail, answer_tokens)

    def check(self) -> None:
        """As `History.check`, and of the recorder."""
        self._history.check()
        if self.recorder:
            self.recorder.check()
