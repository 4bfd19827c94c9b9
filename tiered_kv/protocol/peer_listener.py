"""Accepts peers' connections: one thread each, authenticated before it is served."""

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from tiered_kv import forking
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.protocol.peer_address import address_text
from tiered_kv.protocol.peer_channel import Channel, Limit, PeerIdentity, answer_greeting

log = logging.getLogger(__name__)

GREET_WITHIN_S = 2.0
CONNECTIONS_MAX = 1024
ACCEPT_AGAIN_S = 0.1
WARN_EVERY_S = 30.0


class PeerListener:
    """Listens on `listener`. `serve(channel)` runs on a thread of its own for each authenticated peer, until it returns or raises.

    A caller that does not prove the cluster's secret within GREET_WITHIN_S is refused, and counted by reason in `refusals`.
    """

    def __init__(self, listener: socket.socket, own: PeerIdentity) -> None:
        host, port = listener.getsockname()[:2]
        self.address = address_text(host, port)
        """The address at which peers reach this process, as "HOST:PORT"."""
        self.refusals: Counter[str] = Counter()
        self._listener = listener
        self._own = own
        self._serve: Callable[[Channel], None] = lambda channel: None
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._closing = False
        self._warn_again_s = float("-inf")
        self._acceptor = threading.Thread(target=self._accept, name="tkv-accept", daemon=True)
        forking.register(self)

    def after_fork(self) -> None:
        """Close the child's copies of the parent's connections."""
        self._closing = True
        for connection in [self._listener, *self._connections]:
            connection.close()
        self._connections, self._lock = {}, threading.Lock()

    def start(self, serve: Callable[[Channel], None]) -> None:
        """Accept connections from now on. Connections that were made earlier have waited in the kernel's queue."""
        self._serve = serve
        self._acceptor.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closing:
                    log.warning("cannot accept a peer's connection: %s", error)
                    time.sleep(ACCEPT_AGAIN_S)
                continue
            with self._lock:
                is_full = self._closing or len(self._connections) >= CONNECTIONS_MAX
                if not is_full:
                    thread = threading.Thread(target=self._run, args=(connection,), name="tkv-peer", daemon=True)
                    self._connections[connection] = thread
            if is_full:
                self._count("busy", f"{CONNECTIONS_MAX} peers are connected already")
                connection.close()
                continue
            thread.start()

    def _run(self, connection: socket.socket) -> None:
        """Run one connection's thread. An error ends that connection only."""
        try:
            channel = answer_greeting(connection, self._own, Limit.within(GREET_WITHIN_S))
        except TieredKVError as error:
            self._count(str(error.context.get("reason")), str(error))
        else:
            self._serve_guarded(channel)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _serve_guarded(self, channel: Channel) -> None:
        """Serve one peer. Boundary of the thread: whatever fails ends this connection, and the peer counts a failed transfer."""
        try:
            self._serve(channel)
        except TieredKVError as error:
            reason = str(error.context.get("reason", error.kind.value))
            if reason in ("closed", "idle"):
                log.debug("a peer's connection ended: %s", error)
            elif error.kind is not Kind.CLOSED:
                self._count(reason, str(error))
        except Exception:
            log.exception("serving a peer failed")

    def _count(self, reason: str, message: str) -> None:
        with self._lock:
            self.refusals[reason] += 1
            now_s = time.monotonic()
            due = now_s >= self._warn_again_s
            if due:
                self._warn_again_s = now_s + WARN_EVERY_S
        if due:
            log.warning("a peer was refused (%s; not logged again for %.0f s): %s", reason, WARN_EVERY_S, message)

    def close(self) -> None:
        """Stop listening, end all connections, and wait for their threads."""
        self._closing = True
        with suppress(OSError):  # raises "not connected", but ends the pending accept all the same
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._acceptor.ident is not None:
            self._acceptor.join()
        with self._lock:
            connections = dict(self._connections)
        for connection in connections:
            with suppress(OSError):  # the peer has ended it already
                connection.shutdown(socket.SHUT_RDWR)
        for thread in connections.values():
            thread.join()
