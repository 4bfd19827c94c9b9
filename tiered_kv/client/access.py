"""A client's access to its node, one life of the node's files after the other.

What a client maps is worth nothing once the node has other files: it would read what nobody renews, and must not store. A
client takes the present access at the start of a call and uses it to the end; meanwhile the next one may take its place.
"""

import threading
import time
import weakref
from collections.abc import Callable

from tiered_kv import forking
from tiered_kv.client.reader import BlockSource
from tiered_kv.client.session_pool import SessionPool
from tiered_kv.client.writer import BlockWriter
from tiered_kv.errors import TieredKVError
from tiered_kv.memory.shared import peek
from tiered_kv.memory.view import NodeView
from tiered_kv.memory.words import BEAT_AGE_NS_MAX
from tiered_kv.protocol.session import Session

LOOK_EVERY_S = 0.25
LOOK_WITHIN_S = 1.0


class NodeAccess:
    """What a client uses of one life of a node's files, and the settings of that node. It ends when nobody uses it any more."""

    def __init__(self, info: dict, view: NodeView, source: BlockSource, writer: BlockWriter, pool: SessionPool) -> None:
        self.view = view
        self.source = source
        self.writer = writer
        self.pool = pool
        self.is_vacant = not view.identity
        self.deadline_s: float = info["fetch_deadline_ms"] / 1000
        self.store_wait_s: float = info["store_wait_ms"] / 1000

    def is_lost(self) -> bool:
        """Whether there may be another node by now: this one has shut down, is silent, or let nobody in. About 0.3 µs."""
        return self.pool.is_cut_off or not self.view.seems_alive(time.monotonic_ns())

    def is_left(self) -> bool:
        """Whether the memory that is mapped is of no use to anybody: the node has shut down, or its files are gone."""
        return not self.is_vacant and not (self.view.live and self.view.is_in_place())


class AccessHolder:
    """The present access of a client; where its node is lost, it looks for the node again.

    `find()` gives what the node says of itself now (`Node.info`), None where there is no node; `knock(info, wait_s)` opens a
    session of it, and `make(info)` an access; `make(None)` one of no node, in which nothing is found. With `in_background` a thread
    of its own looks, so that no call waits for it: to map memory takes 0.15 s a GiB. It also gives memory back whose files are gone,
    which the next node may need. Without, the call that finds the node lost looks once: for nodes in this process, and in order.
    """

    def __init__(
        self,
        present: NodeAccess,
        find: Callable[[], dict | None],
        knock: Callable[[dict, float], Session],
        make: Callable[[dict | None], NodeAccess],
        *,
        in_background: bool,
    ) -> None:
        self.present = present
        self.dress: Callable[[NodeAccess], None] = lambda access: None
        """Called with each new access before it is used."""
        self._find, self._knock, self._make = find, knock, make
        self._in_background = in_background
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._retired: list[tuple[weakref.ref[NodeAccess], SessionPool, BlockSource]] = []
        self._calls = self._retries = 0  # of those that are retired
        forking.register(self)

    def after_fork(self) -> None:
        """A child process has no thread that looks; it starts its own when it needs one."""
        closed = self._stop.is_set()
        self._lock, self._thread, self._stop = threading.Lock(), None, threading.Event()
        if closed:
            self._stop.set()

    def take(self) -> NodeAccess:
        """The access for one call."""
        access = self.present
        if access.is_lost() or (self._retired and not self._in_background):
            self._look()
            return self.present
        return access

    @property
    def calls(self) -> int:
        """Sessions that were lent, over all lives."""
        return self._calls + self.present.pool.calls

    @property
    def retries(self) -> int:
        """Look-ups and reads that met a block being changed, over all lives."""
        return self._retries + self.present.source.retries

    def _look(self) -> None:
        if not self._in_background:
            self.look_once()
            return
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=_run, args=(weakref.ref(self), self._stop), name="tkv-look", daemon=True)
                self._thread.start()

    def look_once(self) -> bool:
        """Use the node that is there now, if one is; whether nothing is left to do: it answers, and former accesses are closed."""
        try:
            if self.present.is_lost():
                self._renew()
            self._close_retired()
        except TieredKVError:  # it went away while it was asked
            return False
        return not self._retired and not self.present.is_lost()

    def _renew(self) -> None:
        info = self._find()
        header = peek(info["directory"]) if info is not None else None
        if header is None or header.age_s(time.monotonic_ns()) * 1e9 >= BEAT_AGE_NS_MAX:
            if self._in_background and self.present.is_left():
                self._put(self._make(None))
            return
        session = self._knock(info, LOOK_WITHIN_S)
        life = session.life
        session.close()
        if life.identity == self.present.view.identity:
            self.present.pool.revive()
            return
        made = self._make(info)
        if made.view.identity != life.identity:
            _close(made.pool, made.source)
            return
        self._put(made)

    def _put(self, made: NodeAccess) -> None:
        """Have later calls use this access."""
        self.dress(made)
        with self._lock:
            if self._stop.is_set():
                _close(made.pool, made.source)
                return
            old, self.present = self.present, made
            self._calls += old.pool.calls
            self._retries += old.source.retries
            self._retired.append((weakref.ref(old), old.pool, old.source))

    def _close_retired(self) -> None:
        """Close what no call uses any more: the last call that took it has let go of it."""
        with self._lock:
            ended = [each for each in self._retired if each[0]() is None]
            self._retired = [each for each in self._retired if each not in ended]
        for _, pool, source in ended:
            _close(pool, source)

    def _ended(self) -> bool:
        """Whether the thread may end; the next call that needs one starts another."""
        done = self.look_once()
        with self._lock:
            if done or self._stop.is_set():
                self._thread = None
                return True
        return False

    def close(self) -> None:
        """Close the present access and all former ones. The thread, if there is one, ends by itself and keeps nothing."""
        with self._lock:
            self._stop.set()
            retired, self._retired = self._retired, []
        _close(self.present.pool, self.present.source)
        for _, pool, source in retired:
            _close(pool, source)


def _run(holder: "weakref.ref[AccessHolder]", stop: threading.Event) -> None:
    """Look again and again; a holder that everybody has forgotten is not kept for it."""
    while True:
        present = holder()
        if present is None or present._ended():
            return
        del present
        if stop.wait(LOOK_EVERY_S):
            return


def _close(pool: SessionPool, source: BlockSource) -> None:
    pool.close()
    source.close()
