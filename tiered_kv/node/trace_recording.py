"""One node's part of a recording of requests. The process that reads the recording may disappear without ending it."""

from collections.abc import Mapping
from typing import NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.trace_recorder import ObservedHistory, Recorder, TraceLine
from tiered_kv.store.movement import Block

UNREAD_S = 60.0
"""A recording that has not been read for so long ends by itself."""


class Recorded(NamedTuple):
    """The requests since the last reading, as lines of a trace. `lost`: how many requests of the whole recording are missing."""

    requests: list[TraceLine]
    lost: int


class Recording:
    """Starts and stops the recorder of a node's history. Not thread-safe: the engine's lock guards it."""

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
        """Start to record, or continue a recording with the same salt. Returns for how many seconds it has been running.

        Raises (kind `cluster`) if a recording with another salt is running.
        """
        if self.is_on and salt != self._salt:
            message = f"record: another recording of this cluster is running; if it is not read, it ends by itself after {UNREAD_S:.0f} s"
            raise TieredKVError(Kind.CLUSTER, message)
        if not self.is_on:
            self._history.recorder = Recorder(salt, self._block_tokens, self._chain_to, start_s=now_s)
            self._salt, self._begun_s = salt, now_s
        self._read_s = now_s
        return now_s - self._begun_s

    def stop(self) -> None:
        """Stop recording. Requests that were not read are dropped."""
        self._history.recorder = None

    def take(self, now_s: float, everything: bool) -> Recorded:
        """Returns finished requests (with `everything`, all requests), each once. Raises (kind `closed`) if no recording is running."""
        recorder = self._history.recorder
        if recorder is None:
            raise TieredKVError(Kind.CLOSED, "this node is not recording; start the recording again if the node was restarted since")
        self._read_s = now_s
        return Recorded(recorder.take(now_s, everything), recorder.lost)

    def beat(self, now_s: float) -> None:
        """Stop if the recording has not been read for `UNREAD_S`."""
        if self.is_on and now_s - self._read_s > UNREAD_S:
            self.stop()

    def _chain_to(self, key: BlockKey) -> list[BlockKey]:
        """Returns the block and its ancestors, the chain's first block first; [] if one of them is not known."""
        chain: dict[BlockKey, None] = {}
        while key in self._blocks and key not in chain:
            chain[key] = None
            block = self._blocks[key]
            if block.parent is None:
                return list(chain)[::-1] if block.root is not None else []
            key = block.parent
        return []
