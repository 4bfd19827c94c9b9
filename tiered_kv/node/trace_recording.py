"""One node's part of a recording: begun, read and ended by whoever records, who may go away without a word."""

from collections.abc import Mapping
from typing import NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.trace_recorder import ObservedHistory, Recorder
from tiered_kv.store.movement import Block

UNREAD_S = 60.0
"""A recording of which nobody has read for so long ends by itself."""


class Recorded(NamedTuple):
    """Requests since the last time, as lines of a trace, and how many are missing since the recording began."""

    requests: list[dict]
    lost: int


class Recording:
    """Starts and stops the recorder behind a node's history. Not thread-safe: the engine's lock guards it."""

    def __init__(self, history: ObservedHistory, blocks: Mapping[BlockKey, Block], block_tokens: int) -> None:
        self._history = history
        self._blocks = blocks
        self._block_tokens = block_tokens
        self._salt = b""
        self._begun_s = self._read_s = 0.0

    @property
    def is_on(self) -> bool:
        """Whether requests are being recorded."""
        return self._history.recorder is not None

    def start(self, salt: bytes, now_s: float) -> float:
        """Record from now on, or go on if it is under way with the same salt; for how many seconds it has been.

        Raises (kind `cluster`) if somebody else records.
        """
        if self.is_on and salt != self._salt:
            message = f"somebody records this cluster already; what nobody reads any more ends by itself after {UNREAD_S:.0f} s"
            raise TieredKVError(Kind.CLUSTER, message)
        if not self.is_on:
            self._history.recorder = Recorder(salt, self._block_tokens, self._chain_to, start_s=now_s)
            self._salt, self._begun_s = salt, now_s
        self._read_s = now_s
        return now_s - self._begun_s

    def stop(self) -> None:
        """Record no more; what was not read is gone."""
        self._history.recorder = None

    def take(self, now_s: float, everything: bool) -> Recorded:
        """Requests that are over (or all), each given once. Raises (kind `closed`) while nothing is recorded."""
        recorder = self._history.recorder
        if recorder is None:
            raise TieredKVError(Kind.CLOSED, "this node does not record, or was started anew since it was told to")
        self._read_s = now_s
        return Recorded(recorder.take(now_s, everything), recorder.lost)

    def beat(self, now_s: float) -> None:
        """Stop if nobody reads any more."""
        if self.is_on and now_s - self._read_s > UNREAD_S:
            self.stop()

    def _chain_to(self, key: BlockKey) -> list[BlockKey]:
        """The block and all before it, root first; none where one of them is not known."""
        chain: dict[BlockKey, None] = {}
        while key in self._blocks and key not in chain:
            chain[key] = None
            block = self._blocks[key]
            if block.parent is None:
                return list(chain)[::-1] if block.root is not None else []
            key = block.parent
        return []
