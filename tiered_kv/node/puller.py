"""Pulls blocks from other nodes into the local host tier, in chunks. The next chunk is transferred while one is unpacked."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tiered_kv.clock import Clock
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.peer_transport import FramePieces, Link, Transfer

log = logging.getLogger(__name__)

Admit = Callable[[list[BlockKey], list[FramePieces]], int]
"""Stores the frames of these keys. Returns how many it could store."""

CHUNKS_UNDER_WAY = 3
AVOID_S = 1.0


class Chunk(NamedTuple):
    """Consecutive blocks that are requested from one node together."""

    node: str
    keys: list[BlockKey]


class _PeerFailed(Exception):
    """A request to `node` failed; other nodes may have the blocks. `hung`: the node did not answer at all."""

    def __init__(self, node: str, hung: bool) -> None:
        super().__init__(node)
        self.node = node
        self.hung = hung


class Puller:
    """Fetches blocks from the nodes that the directory names. A second pull of blocks in transfer waits for the first.

    `locate` asks the directory, as `Link.locate`. A node whose request failed gets no further request for `AVOID_S`. A node that hangs
    gets none for `forgotten_s`: by then the directory no longer names it, unless it has reported again.
    """

    def __init__(
        self, link: Link, locate: Callable[[list[BlockKey], float], list[list[str]]], clock: Clock, chunk_bytes: int, forgotten_s: float
    ) -> None:
        self._link = link
        self._locate = locate
        self._clock = clock
        self._chunk_bytes = chunk_bytes
        self._forgotten_s = forgotten_s
        self._under_way: set[BlockKey] = set()
        self._avoided_until_s: dict[str, float] = {}
        self._done = threading.Condition()

    def pull(
        self,
        keys: list[BlockKey],
        nbytes: int,
        wait_s: float,
        admit: Admit,
        present: Callable[[BlockKey], bool],
    ) -> int:
        """Fetch the leading blocks of `keys`, each of `nbytes`, within `wait_s`. Returns how many of them this node has afterwards.

        `admit` stores the frames of one chunk and returns how many it could store. `present` tells whether this node has a block.
        Any failure ends the pull early.
        """
        deadline_s = self._clock.now_s() + wait_s
        with self._done:
            if not self._done.wait_for(lambda: keys[0] not in self._under_way, wait_s):
                return 0
            mine = [key for key in keys if key not in self._under_way and not present(key)]
            self._under_way.update(mine)
        try:
            missing = mine
            while self._has_failed_peer(missing, nbytes, deadline_s, admit) and self._clock.now_s() < deadline_s:
                missing = [key for key in missing if not present(key)]
        except TieredKVError as error:
            log.info("a pull ended early: %s", error)
        finally:
            with self._done:
                self._under_way.difference_update(mine)
                self._done.notify_all()
        count = 0
        while count < len(keys) and present(keys[count]):
            count += 1
        return count

    def _has_failed_peer(self, keys: list[BlockKey], nbytes: int, deadline_s: float, admit: Admit) -> bool:
        """Fetch the keys. Returns whether a node failed. That node is avoided from now on, and a retry can use others."""
        try:
            self._fetch(keys, nbytes, deadline_s, admit)
        except _PeerFailed as error:
            log.info("a peer failed during a pull: %s", error.__cause__)
            with self._done:
                self._avoided_until_s[error.node] = self._clock.now_s() + (self._forgotten_s if error.hung else AVOID_S)
            return True
        return False

    def _fetch(self, keys: list[BlockKey], nbytes: int, deadline_s: float, admit: Admit) -> None:
        if not keys:
            return
        under_way: deque[tuple[Chunk, Transfer]] = deque()
        holders = self._locate(keys, max(deadline_s - self._clock.now_s(), 0))
        chunks = self._chunks(keys, self._reachable(holders), max(1, self._chunk_bytes // nbytes))
        while True:
            while len(under_way) < CHUNKS_UNDER_WAY and (chunk := next(chunks, None)):
                with _blaming(chunk.node):
                    under_way.append((chunk, self._link.request(chunk.node, chunk.keys)))
            left_s = deadline_s - self._clock.now_s()
            if not under_way or left_s <= 0:
                return
            chunk, transfer = under_way.popleft()
            with _blaming(chunk.node):
                for _, later in under_way:
                    later.prefetch()
                frames = transfer.frames(left_s)
                for _, later in under_way:
                    later.prefetch()
            if admit(chunk.keys[: len(frames)], frames) < len(chunk.keys):
                return

    def _reachable(self, holders: list[list[str]]) -> list[list[str]]:
        """Returns the holders of each block without avoided nodes, up to the first block that has no other holder."""
        now_s = self._clock.now_s()
        with self._done:
            self._avoided_until_s = {node: until_s for node, until_s in self._avoided_until_s.items() if until_s > now_s}
            left = [[node for node in nodes if node not in self._avoided_until_s] for nodes in holders]
        return left[: next((count for count, nodes in enumerate(left) if not nodes), len(left))]

    @staticmethod
    def _chunks(keys: list[BlockKey], holders: list[list[str]], most: int) -> Iterator[Chunk]:
        """Yields runs of blocks that one node holds, each as long as possible but at most `most` blocks.

        The first chunks are short, so that unpacking starts while the rest is in transfer.
        """
        start, length = 0, max(1, most // 4)
        while start < len(holders):
            best, end = "", start
            for node in holders[start]:
                stop = start
                while stop < len(holders) and stop - start < length and node in holders[stop]:
                    stop += 1
                if stop > end:
                    best, end = node, stop
            yield Chunk(best, keys[start:end])
            start, length = end, min(most, length * 2)


@contextmanager
def _blaming(node: str) -> Iterator[None]:
    try:
        yield
    except TieredKVError as error:
        raise _PeerFailed(node, bool(error.context.get("hung"))) from error
