"""A client's sessions: one a thread that needs one now, kept for the next; none for a while after the node did not answer."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiered_kv.clock import Clock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.service.session import Session

RETRY_AFTER_S = 0.5


class SessionPool:
    """Lends sessions. One that was lent for something that failed is closed, and with it ends all that it had reserved.

    After a failed connect no other is tried for RETRY_AFTER_S.
    """

    def __init__(self, connect: Callable[[], Session], clock: Clock) -> None:
        self._connect = connect
        self._clock = clock
        self._idle: list[Session] = []
        self._lock = threading.Lock()
        self._retry_at_s = float("-inf")
        self._closed = False
        self.calls = 0
        """Sessions lent so far: every call that left this process went through one."""

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session for the calls of one thread; raises (kind `transport`) while the node does not answer."""
        session = self._take()
        try:
            yield session
        except BaseException as error:
            session.close()
            if isinstance(error, TieredKVError) and error.kind is Kind.TRANSPORT:
                self._close_idle()  # they are of the same node
            raise
        self._give_back(session)

    def check(self) -> None:
        """Connect once, so that what is wrong is said now; raises as connecting does. Keeps no session and counts no call."""
        self._connect().close()

    def _take(self) -> Session:
        with self._lock:
            if self._closed:
                raise TieredKVError(Kind.CLOSED, "the client is closed")
            self.calls += 1
            if self._idle:
                return self._idle.pop()
            if self._clock.now_s() < self._retry_at_s:
                raise TieredKVError(Kind.TRANSPORT, "the node did not answer a moment ago")
        try:
            return self._connect()
        except TieredKVError:
            self._retry_at_s = self._clock.now_s() + RETRY_AFTER_S
            raise

    def _give_back(self, session: Session) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(session)
                return
        session.close()

    def close(self) -> None:
        """Close the idle sessions now, those lent out when they come back."""
        with self._lock:
            self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for session in idle:
            session.close()
