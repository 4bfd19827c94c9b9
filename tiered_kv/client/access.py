"""A client's access to its node, renewed whenever the node gets new files.

A client maps the files of its node. Once the node has new files, the mapped ones are obsolete: they are never updated again, and the
client must not store into them. Each call takes the present access when it starts, and uses that access until it ends, even if
another one replaces it meanwhile.
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
from tiered_kv.keys import BlockKey
from tiered_kv.memory.shared import peek
from tiered_kv.memory.view import NodeView
from tiered_kv.memory.words import BEAT_AGE_NS_MAX
from tiered_kv.protocol.messages import NodeInfo
from tiered_kv.protocol.session import Life, Session

LOOK_EVERY_S = 0.25
LOOK_WITHIN_S = 1.0


class NodeAccess:
    """A client's view, reader, writer and sessions for one life of a node's files, and the node's settings.

    It is closed once no call uses it any more.
    """

    def __init__(self, info: NodeInfo, view: NodeView, source: BlockSource, writer: BlockWriter, pool: SessionPool) -> None:
        self.view = view
        self.source = source
        self.writer = writer
        self.pool = pool
        self.introduced: dict[BlockKey, Life] = {}
        """The roots that this client has introduced to the node, each with the node's life at that time."""
        self.salts: dict[str, str] = {}
        """The tenants' salts that the node has sent."""
        self.is_vacant = not view.identity
        self.deadline_s: float = info["fetch_deadline_ms"] / 1000
        self.store_wait_s: float = info["store_wait_ms"] / 1000

    def is_lost(self) -> bool:
        """Returns whether the node may have been replaced: it has shut down, is silent, or refused a connection. Takes about 0.3 µs."""
        return self.pool.is_cut_off or not self.view.seems_alive(time.monotonic_ns())

    def is_left(self) -> bool:
        """Returns whether the mapped memory is obsolete: the node has shut down, or its files were removed."""
        return not self.is_vacant and not (self.view.live and self.view.is_in_place())


class AccessHolder:
    """Holds the present access of a client. When the node is lost, it looks for the node again and replaces the access.

    `find()` returns the present info of the node, None if there is no node. `open_session(info, wait_s)` opens a session with it.
    `make(info)` builds an access; `make(None)` builds one without a node: every look-up in it is a miss. With `in_background` a
    thread does this work, so that no call waits for it: mapping memory takes 0.15 s a GiB. The thread also unmaps memory whose files
    were removed, because the next node may need that memory. Without `in_background`, the call that notices the loss looks for the
    node once. That is for nodes in this process, where the order of events must be deterministic.
    """

    def __init__(
        self,
        present: NodeAccess,
        find: Callable[[], NodeInfo | None],
        open_session: Callable[[NodeInfo, float], Session],
        make: Callable[[NodeInfo | None], NodeAccess],
        *,
        in_background: bool,
    ) -> None:
        self.present = present
        self.prepare: Callable[[NodeAccess], None] = lambda access: None
        """Called with each new access before its first use."""
        self._find, self._open_session, self._make = find, open_session, make
        self._in_background = in_background
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._retired: list[tuple[weakref.ref[NodeAccess], SessionPool, BlockSource]] = []
        self._calls = self._retries = 0  # sums of the retired accesses
        forking.register(self)

    def after_fork(self) -> None:
        """Forget the thread in a forked child process: threads are not copied to it. The child starts its own when it needs one."""
        closed = self._stop.is_set()
        self._lock, self._thread, self._stop = threading.Lock(), None, threading.Event()
        if closed:
            self._stop.set()

    def take(self) -> NodeAccess:
        """Returns the access to use for one call."""
        access = self.present
        if access.is_lost() or (self._retired and not self._in_background):
            self._look()
            return self.present
        return access

    @property
    def calls(self) -> int:
        """The number of sessions lent to calls so far, over all lives of the node."""
        return self._calls + self.present.pool.calls

    @property
    def retries(self) -> int:
        """The number of look-ups and reads during which the block changed, over all lives of the node."""
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
        """Switch to the present node if there is one, and close unused former accesses.

        Returns True if nothing is left to do: the node answers, and all former accesses are closed.
        """
        try:
            if self.present.is_lost():
                self._renew()
            self._close_retired()
            return not self._retired and not self.present.is_lost()
        except TieredKVError:  # the node ended, or `close` unmapped its memory, meanwhile
            return False

    def _renew(self) -> None:
        info = self._find()
        header = peek(info["directory"]) if info is not None else None
        if info is None or header is None or header.age_s(time.monotonic_ns()) * 1e9 >= BEAT_AGE_NS_MAX:
            if self._in_background and self.present.is_left():
                self._switch_to(self._make(None))
            return
        session = self._open_session(info, LOOK_WITHIN_S)
        life = session.life
        session.close()
        if life.identity == self.present.view.identity:
            self.present.pool.revive()
            return
        made = self._make(info)
        if made.view.identity != life.identity:
            _close(made.pool, made.source)
            return
        self._switch_to(made)

    def _switch_to(self, made: NodeAccess) -> None:
        """Make later calls use this access, and retire the present one."""
        self.prepare(made)
        with self._lock:
            if self._stop.is_set():
                _close(made.pool, made.source)
                return
            old, self.present = self.present, made
            self._calls += old.pool.calls
            self._retries += old.source.retries
            self._retired.append((weakref.ref(old), old.pool, old.source))

    def _close_retired(self) -> None:
        """Close the retired accesses that no call uses any more, as their weak references show."""
        with self._lock:
            ended = [each for each in self._retired if each[0]() is None]
            self._retired = [each for each in self._retired if each not in ended]
        for _, pool, source in ended:
            _close(pool, source)

    def _ended(self) -> bool:
        """Look for the node once. Returns whether the thread may end. A later call that needs a thread starts another."""
        done = self.look_once()
        with self._lock:
            if done or self._stop.is_set():
                self._thread = None
                return True
        return False

    def close(self) -> None:
        """Close the present access and all former ones. The thread, if there is one, ends soon and keeps no access alive."""
        with self._lock:
            self._stop.set()
            retired, self._retired = self._retired, []
        _close(self.present.pool, self.present.source)
        for _, pool, source in retired:
            _close(pool, source)


def _run(holder: "weakref.ref[AccessHolder]", stop: threading.Event) -> None:
    """Look for the node every LOOK_EVERY_S. Between two looks only a weak reference is kept, so that an unused holder can be freed."""
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
