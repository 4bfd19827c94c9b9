"""A client's pool of sessions with one life of a node's files. A session serves one thread at a time and is then reused.

After a refused connection, the pool does not connect again for a while. After a call without an answer, it waits for the node's next
heartbeat.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiered_kv import forking
from tiered_kv.clock import Clock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.memory.view import NodeView
from tiered_kv.protocol.session import Session

RETRY_AFTER_S = 0.5
CONNECT_GRACE_S = 0.015
"""How long after a call's deadline its session may be opened. With its own `GRACE_S`, the call ends within 50 ms of its deadline."""


class SessionPool:
    """Lends sessions. A session whose use fails is closed, which frees the extents that it has reserved.

    `connect(wait_s)` opens a session. Its node must be the one whose files `view` maps. `greet` runs first on each new session. After
    a failed connection, the pool raises without trying again for RETRY_AFTER_S. After a call that the node did not answer in time, it
    raises until the node's heartbeat, which `view` shows, has moved. A child process opens its own sessions.
    """

    def __init__(
        self, connect: Callable[[float], Session], view: NodeView, clock: Clock, greet: Callable[[Session], None] = lambda _: None
    ) -> None:
        self._connect = connect
        self._view = view
        self._clock = clock
        self._greet = greet
        self._idle: list[Session] = []
        self._lock = threading.Lock()
        self._retry_at_s = float("-inf")
        self._silent_since_ns: int | None = None  # the heartbeat at the time of a call without an answer
        self._closed = False
        self.is_cut_off = False
        """Whether the last attempt to connect failed, because the node has ended or has new files."""
        self.calls = 0
        """The number of sessions lent so far. Every call that leaves this process uses a lent session."""
        forking.register(self)

    def after_fork(self) -> None:
        """Empty the pool in a forked child process: the sessions belong to the parent."""
        self._lock = threading.Lock()
        self._idle = []

    @contextmanager
    def session(self, wait_s: float) -> Iterator[Session]:
        """A context that lends a session to one thread. Its calls end within `wait_s`.

        Raises (kind `transport`) while the node does not answer.
        """
        session = self._take(wait_s)
        try:
            yield session
        except BaseException as error:
            session.close()
            if isinstance(error, TieredKVError) and error.kind is Kind.TRANSPORT:
                self._note(error)
                self._close_idle()  # they belong to the same node
            raise
        self._give_back(session)

    def check(self, wait_s: float) -> None:
        """Connect once, so that an error is raised now and not in a later call. Keeps no session and counts no call."""
        self._opened(wait_s).close()

    def revive(self) -> None:
        """Allow the next call to connect, because the node answers again."""
        self.is_cut_off = False
        self._retry_at_s = float("-inf")
        self._silent_since_ns = None

    def _take(self, wait_s: float) -> Session:
        with self._lock:
            if self._closed:
                raise TieredKVError(Kind.CLOSED, "the client is closed")
            if self._silent_since_ns is not None:
                if self._view.heartbeat_ns == self._silent_since_ns:
                    raise TieredKVError(Kind.TRANSPORT, "the node left a call without an answer and has not sent a heartbeat since")
                self._silent_since_ns = None
            session, ended = self._kept()
            if session is None and self._clock.now_s() < self._retry_at_s:
                raise TieredKVError(Kind.TRANSPORT, f"the last connection to the node failed less than {RETRY_AFTER_S} s ago")
            self.calls += 1
        for each in ended:
            each.close()
        if session is None:
            return self._opened_in_time(wait_s)
        session.allow(wait_s)
        return session

    def _opened_in_time(self, wait_s: float) -> Session:
        """Open a session for a call. If that took longer than the call may take, keep the session for later calls and raise.

        Connecting, greeting and the call may each end a little after their deadline. Together they would end much too late. A call
        without any time, such as a store that does not wait for room, gets CONNECT_GRACE_S to connect.
        """
        until_s = self._clock.now_s() + wait_s + CONNECT_GRACE_S
        session = self._opened(wait_s)
        if self._clock.now_s() > until_s:
            self._give_back(session)
            raise TieredKVError(Kind.TRANSPORT, f"connecting to the node took all of the call's {wait_s:.3f} s")
        return session

    def _kept(self) -> tuple[Session | None, list[Session]]:
        """Returns an idle session that was opened since the node last started (or None), and the older idle sessions, to be closed."""
        present = (self._view.identity, self._view.generation)  # as a `Life`
        ended: list[Session] = []
        while self._idle:
            session = self._idle.pop()
            if session.life == present:
                return session, ended
            ended.append(session)
        return None, ended

    def _opened(self, wait_s: float) -> Session:
        until_s = self._clock.now_s() + wait_s
        try:
            session = self._connect(wait_s)
            try:
                session.allow(until_s - self._clock.now_s())
                if session.life.identity != self._view.identity:
                    raise TieredKVError(
                        Kind.TRANSPORT, f"the node at {self._view.directory} has new files; this client still maps the old ones"
                    )
                self._greet(session)
            except BaseException:
                session.close()
                raise
        except TieredKVError as error:
            self._note(error)
            if not error.context.get("timed_out"):
                self._retry_at_s = self._clock.now_s() + RETRY_AFTER_S
                self.is_cut_off = error.kind is Kind.TRANSPORT
            raise
        self.is_cut_off = False
        return session

    def _note(self, error: TieredKVError) -> None:
        if error.context.get("timed_out"):
            self._silent_since_ns = self._view.heartbeat_ns

    def _give_back(self, session: Session) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(session)
                return
        session.close()

    def close(self) -> None:
        """Close the idle sessions now, and the lent ones when they are returned."""
        with self._lock:
            self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()
