"""Records a node's requests as a trace, in the format that `tiered-kv simulate` reads (Mooncake's).

The recorder assembles a request from events that the node gets anyway: a use of leading blocks, a store of their descendants, and the
length of the answer if the worker reported it. While no recording runs, it costs nothing.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypedDict, cast

from tiered_kv.keys import BlockKey
from tiered_kv.policy import History, Key

PENDING_S = 5.0
"""The longest time of a request: from its fetch to the store of the blocks that it computed."""

REQUESTS_MAX = 100_000
"""The most requests that are kept until they are read. If there are more, the oldest are dropped and counted in `lost`."""


@dataclass
class _RecordedRequest:
    time_s: float
    keys: list[BlockKey]
    answer_tokens: int = 0


class TraceLine(TypedDict):
    """One request of a trace. `timestamp`: ms since the recording started. Lengths are tokens; `hash_ids` has a number for each block."""

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


class Recorder:
    """Records the requests of one node, in order. Not thread-safe.

    Keys leave the recorder as 53-bit numbers, hashed with `salt`. Without the salt, nobody can find the keys of the numbers. Input
    lengths count whole blocks only: the tokens after the last whole block are not known here.
    """

    def __init__(self, salt: bytes, block_tokens: int, chain_to: Callable[[BlockKey], list[BlockKey]], *, start_s: float = 0.0) -> None:
        """`chain_to` returns a block and its ancestors, the chain's first block first; empty if one of them is not known.

        `start_s`: the time that the trace's timestamps count from.
        """
        self._start_s = start_s
        self._salt = salt
        self._chain_to = chain_to
        self._block_tokens = block_tokens
        self._open: OrderedDict[BlockKey, _RecordedRequest] = OrderedDict()  # by the deepest block, the oldest request first
        self._done: list[_RecordedRequest] = []
        self.lost = 0
        """The number of requests missing from the trace, because they were not read in time or part of their chain was not known."""

    def seen(self, keys: Sequence[BlockKey], parent: BlockKey | None, now_s: float) -> None:
        """Record that consecutive blocks of a chain were used or stored. `parent`: the parent of the first of them."""
        self._close_before(now_s - PENDING_S)
        request = self._open.pop(parent, None) if parent is not None else None
        again = self._open.pop(keys[-1], None)
        if again:
            self._finish(again)
        chain = self._chain_to(keys[-1])
        if not chain:  # with half a chain, the trace would show its first block as one without a parent
            self.lost += 1
            if request:
                self._finish(request)
            return
        request = request or _RecordedRequest(now_s, [])
        request.keys = chain
        self._open[keys[-1]] = request

    def answered(self, last_block: BlockKey, tokens: int) -> None:
        """Record that the request whose deepest block is `last_block` got an answer of `tokens` tokens."""
        if last_block in self._open:
            self._open[last_block].answer_tokens = tokens

    def take(self, now_s: float, everything: bool = False) -> list[TraceLine]:
        """Returns finished requests (with `everything`, all requests) as lines of a trace, ready for JSON. Each is returned once."""
        self._close_before(float("inf") if everything else now_s - PENDING_S)
        done, self._done = self._done, []
        return [self._line(request) for request in sorted(done, key=lambda request: request.time_s)]

    def check(self) -> None:
        """Assert that each open request is filed under its last block."""
        assert all(request.keys[-1] == last_block for last_block, request in self._open.items())

    def _close_before(self, time_s: float) -> None:
        while self._open and next(iter(self._open.values())).time_s < time_s:
            self._finish(self._open.popitem(last=False)[1])

    def _finish(self, request: _RecordedRequest) -> None:
        self._done.append(request)
        if len(self._done) > REQUESTS_MAX:
            self.lost += len(self._done) - REQUESTS_MAX
            del self._done[: len(self._done) - REQUESTS_MAX]

    def _line(self, request: _RecordedRequest) -> TraceLine:
        return {
            "timestamp": max(round((request.time_s - self._start_s) * 1000), 0),
            "input_length": len(request.keys) * self._block_tokens,
            "output_length": request.answer_tokens,
            "hash_ids": [self._number(key) for key in request.keys],
        }

    def _number(self, key: BlockKey) -> int:
        return int.from_bytes(blake2b(key, digest_size=8, key=self._salt).digest()) >> 11


class ObservedHistory(History):
    """Wraps a node's history. While there is a `recorder`, it gets all uses and answer lengths too.

    A node's keys are always block keys.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self.recorder: Recorder | None = None

    def seen(self, keys: Sequence[Key], parent: Key | None, now_s: float) -> None:
        """As `History.seen`."""
        self._history.seen(keys, parent, now_s)
        if self.recorder:
            self.recorder.seen(cast("Sequence[BlockKey]", keys), cast("BlockKey | None", parent), now_s)

    def uses(self, key: Key) -> int:
        """As `History.uses`."""
        return self._history.uses(key)

    def chance(self, key: Key, ahead: float) -> float:
        """As `History.chance`."""
        return self._history.chance(key, ahead)

    def hint(
        self, last_block: Key, now_s: float, *, answer_tokens: int | None = None, reuse_within_s: float | None = None, ended: bool = False
    ) -> None:
        """As `History.hint`."""
        self._history.hint(last_block, now_s, answer_tokens=answer_tokens, reuse_within_s=reuse_within_s, ended=ended)
        if self.recorder and answer_tokens is not None:
            self.recorder.answered(cast("BlockKey", last_block), answer_tokens)

    def check(self) -> None:
        """As `History.check`; checks the recorder too."""
        self._history.check()
        if self.recorder:
            self.recorder.check()
