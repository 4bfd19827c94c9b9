"""Pulls blocks from other nodes into the local host tier.

From a peer with streams one request brings a whole run of blocks, each of which is visible while the next ones arrive. From other
peers blocks are requested in chunks. The next chunk is transferred while one is unpacked.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tiered_kv.clock import Clock
from tiered_kv.errors import TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.protocol.peer_transport import Link, Receiver, Transfer

log = logging.getLogger(__name__)

CHUNKS_UNDER_WAY = 3
CHUNK_BYTES = 16 << 20
"""The bytes of one request to a peer that has no streams."""
AVOID_S = 1.0
PATIENCE_S_MAX = 1.0
"""If another node has the next block too, a stream may pause for half of the time left, but at most for this long."""
PATIENCE_S_MIN = 0.05


class Chunk(NamedTuple):
    """Consecutive blocks that are requested from one node together."""

    node: str
    keys: list[BlockKey]


class _PeerFailed(Exception):
    """A request to `node` failed, and other nodes may have the blocks.

    `may_retry`: the same node can be asked again, because the next request takes another link to it. `avoid_s`: how long no pull
    sends the node a request.
    """

    def __init__(self, node: str, avoid_s: float = 0.0, may_retry: bool = False) -> None:
        super().__init__(node)
        self.node = node
        self.avoid_s = avoid_s
        self.may_retry = may_retry


class Puller:
    """Fetches blocks from the nodes that the directory names. A pull of blocks that another pull is fetching waits for the other pull.

    If a node fails, the blocks that are still missing are requested from other nodes that hold them, in the time left.

    `locate` asks the directory, as `Link.locate`. A node whose request failed gets no further request for `AVOID_S`. A node that hangs
    gets none for `forgotten_s`: by then the directory no longer names it, unless it has reported again. `on_transfer` is called with the
    duration in seconds of each transfer that brought blocks.
    """

    def __init__(
        self,
        link: Link,
        locate: Callable[[list[BlockKey], float], list[list[str]]],
        clock: Clock,
        forgotten_s: float,
        on_transfer: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._on_transfer = on_transfer
        self._link = link
        self._locate = locate
        self._clock = clock
        self._forgotten_s = forgotten_s
        self._under_way: set[BlockKey] = set()
        self._avoided_until_s: dict[str, float] = {}
        self._done = threading.Condition()

    def pull(self, keys: list[BlockKey], nbytes: int, wait_s: float, receiver: Receiver, present: Callable[[BlockKey], bool]) -> int:
        """Fetch the leading blocks of `keys`, each of `nbytes`, within `wait_s`. Returns how many of them this node has afterwards.

        `receiver` stores the blocks. `present` returns whether this node has a block. A failure that no other node can make good ends
        the pull early.
        """
        deadline_s = self._clock.now_s() + wait_s
        tried: set[BlockKey] = set()
        while wanted := [key for key in keys if not present(key)]:
            mine = self._claim(wanted, tried, deadline_s, present)
            if not mine:
                break
            tried.update(mine)
            try:
                self._pull_mine(mine, nbytes, deadline_s, receiver, present)
            except TieredKVError as error:
                log.info("a pull ended early: %s", error)
            finally:
                with self._done:
                    self._under_way.difference_update(mine)
                    self._done.notify_all()
        return next((count for count, key in enumerate(keys) if not present(key)), len(keys))

    def avoided(self) -> frozenset[str]:
        """Returns the nodes that get no request now, because one to them has failed."""
        now_s = self._clock.now_s()
        with self._done:
            return frozenset(node for node, until_s in self._avoided_until_s.items() if until_s > now_s)

    def _claim(
        self, wanted: list[BlockKey], tried: set[BlockKey], deadline_s: float, present: Callable[[BlockKey], bool]
    ) -> list[BlockKey]:
        """Wait until no other pull is fetching the first missing block. Returns the blocks that this pull shall fetch now.

        Returns [] at the deadline, or if this pull has tried to fetch the first missing block already.
        """

        def first_is_free() -> bool:
            return next((key not in self._under_way for key in wanted if not present(key)), True)

        with self._done:
            if not self._done.wait_for(first_is_free, max(deadline_s - self._clock.now_s(), 0)):
                return []
            missing = [key for key in wanted if not present(key)]
            if not missing or missing[0] in tried:
                return []
            mine = [key for key in missing if key not in self._under_way]
            self._under_way.update(mine)
            return mine

    def _pull_mine(
        self, mine: list[BlockKey], nbytes: int, deadline_s: float, receiver: Receiver, present: Callable[[BlockKey], bool]
    ) -> None:
        """Fetch blocks that no other pull is fetching. If a node fails, request the rest again without that node."""
        missing, excluded = mine, set[str]()
        while missing and self._clock.now_s() < deadline_s:
            try:
                self._fetch(missing, nbytes, deadline_s, receiver, excluded)
            except _PeerFailed as error:
                log.info("a peer failed during a pull: %s", error.__cause__ or error)
                if not error.may_retry:
                    excluded.add(error.node)
                if error.avoid_s:
                    with self._done:
                        self._avoided_until_s[error.node] = self._clock.now_s() + error.avoid_s
            else:
                return
            missing = [key for key in missing if not present(key)]

    def _fetch(self, keys: list[BlockKey], nbytes: int, deadline_s: float, receiver: Receiver, excluded: Collection[str]) -> None:
        under_way: deque[tuple[Chunk, Transfer]] = deque()
        holders = self._reachable(self._locate(keys, max(deadline_s - self._clock.now_s(), 0)), excluded)
        chunks = self._chunks(keys, holders, max(1, CHUNK_BYTES // nbytes))
        fetched = 0

        def prefetch() -> None:
            for _, later in under_way:
                later.prefetch()

        while True:
            while len(under_way) < CHUNKS_UNDER_WAY and (chunk := next(chunks, None)):
                with self._blaming(chunk.node):
                    under_way.append((chunk, self._link.request(chunk.node, chunk.keys)))
            left_s = deadline_s - self._clock.now_s()
            if not under_way or left_s <= 0:
                return
            chunk, transfer = under_way.popleft()
            has_others = len(holders[fetched]) > 1
            patience_s = max(min(left_s / 2, PATIENCE_S_MAX), PATIENCE_S_MIN) if has_others else left_s
            begun_s = self._clock.now_s()
            with self._blaming(chunk.node):
                count = transfer.deliver(receiver, left_s, patience_s, prefetch)
            if count:
                self._on_transfer(self._clock.now_s() - begun_s)
            fetched += count
            if count < len(chunk.keys):
                if len(holders[fetched]) > 1:
                    raise _PeerFailed(chunk.node)  # it has dropped the next block, and others may still have it
                return

    def _reachable(self, holders: list[list[str]], excluded: Collection[str]) -> list[list[str]]:
        """Returns the holders of each leading block, without avoided and excluded nodes. Ends at the first block with no holder left."""
        now_s = self._clock.now_s()
        with self._done:
            self._avoided_until_s = {node: until_s for node, until_s in self._avoided_until_s.items() if until_s > now_s}
            left = [[node for node in nodes if node not in self._avoided_until_s and node not in excluded] for nodes in holders]
        return left[: next((count for count, nodes in enumerate(left) if not nodes), len(left))]

    def _chunks(self, keys: list[BlockKey], holders: list[list[str]], most: int) -> Iterator[Chunk]:
        """Yields runs of blocks that one node holds, each as long as possible. Without streams a run has at most `most` blocks.

        Then the first chunks are short, so that unpacking starts while the rest is in transfer.
        """
        start, length = 0, max(1, most // 4)
        while start < len(holders):
            best, end = "", start
            for node in holders[start]:
                limit = len(holders) if self._link.streams_from(node) else min(start + length, len(holders))
                stop = start
                while stop < limit and node in holders[stop]:
                    stop += 1
                if stop > end:
                    best, end = node, stop
            yield Chunk(best, keys[start:end])
            start, length = end, min(most, length * 2)

    @contextmanager
    def _blaming(self, node: str) -> Iterator[None]:
        """Raise an error of a transfer as `_PeerFailed`. An error of this node itself, such as no room, is raised unchanged."""
        try:
            yield
        except TieredKVError as error:
            if error.context.get("own_fault"):
                raise
            avoid_s = self._forgotten_s if error.context.get("hung") else AVOID_S
            may_retry = bool(error.context.get("other_way"))
            raise _PeerFailed(node, 0.0 if may_retry else avoid_s, may_retry) from error
