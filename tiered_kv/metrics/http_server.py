"""A small HTTP server for metrics, on threads of its own. Callers that hang, or too many callers, delay only each other."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from http import HTTPStatus

from tiered_kv import forking
from tiered_kv.protocol.peer_address import address_text
from tiered_kv.threads import DaemonThreads

log = logging.getLogger(__name__)

Page = Callable[[str], tuple[str, bytes]]
"""A function that takes the request's Accept header, and returns the content type and the body."""

ANSWER_WITHIN_S = 5.0
"""The longest time for one connection: reading the request and sending the answer, once a thread is free for it."""
REQUEST_BYTES_MAX = 8192
THREADS = 16
CONNECTIONS_MAX = 32
FRESH_S = 0.25
"""For how long a body is sent again instead of being made again."""
ACCEPT_AGAIN_S = 0.1


class MetricsServer:
    """Serves `pages`, by path, on a listening socket, from `start` to `close`."""

    def __init__(self, listener: socket.socket, pages: Mapping[str, Page]) -> None:
        host, port = listener.getsockname()[:2]
        self.address = address_text(host, port)
        self._listener = listener
        self._pages = {path: Remembered(page) for path, page in pages.items()}
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._threads = DaemonThreads(THREADS, "tkv-scrape")
        self._acceptor = threading.Thread(target=self._accept, name="tkv-metrics", daemon=True)
        self._closing = False
        forking.register(self)

    def after_fork(self) -> None:
        """Close a child's copies of the sockets. The parent serves."""
        self._closing = True
        for each in (self._listener, *self._connections):
            each.close()
        self._connections, self._lock = set(), threading.Lock()

    def start(self) -> None:
        """Accept connections from now on."""
        self._acceptor.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closing:
                    log.warning("cannot accept a connection for metrics: %s", error)
                    time.sleep(ACCEPT_AGAIN_S)
                continue
            with self._lock:
                is_full = self._closing or len(self._connections) >= CONNECTIONS_MAX
                if not is_full:
                    self._connections.add(connection)
            if is_full:
                connection.close()
            else:
                self._threads.submit(self._serve_guarded, connection)

    def _serve_guarded(self, connection: socket.socket) -> None:
        """Answer one request. Boundary of the thread: whatever fails ends this connection only."""
        deadline_s = time.monotonic() + ANSWER_WITHIN_S
        try:
            self._serve(connection, deadline_s)
        except OSError as error:  # the caller hangs, or has left
            log.debug("a request for metrics ended: %s", error)
        except Exception:
            log.exception("answering a request for metrics failed")
            with suppress(OSError):
                _send(connection, deadline_s, HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", b"see the log of this process\n")
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _serve(self, connection: socket.socket, deadline_s: float) -> None:
        method, path, accept = _request(connection, deadline_s)
        page = self._pages.get(path)
        if method not in ("GET", "HEAD"):
            _send(connection, deadline_s, HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET and HEAD\n")
        elif page is None:
            known = f"known paths: {', '.join(sorted(self._pages))}\n"
            _send(connection, deadline_s, HTTPStatus.NOT_FOUND, "text/plain", known.encode())
        else:
            _send(connection, deadline_s, HTTPStatus.OK, *page(accept), with_body=method == "GET")

    def close(self) -> None:
        """Stop listening and end all connections. Waits a moment for the threads."""
        self._closing = True
        with suppress(OSError):  # raises "not connected", but ends the pending accept all the same
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._acceptor.ident is not None:
            self._acceptor.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._threads.stop(ANSWER_WITHIN_S)
        for connection in connections:
            connection.close()


class Remembered:
    """A page that is made at most every FRESH_S for each Accept header, however often it is asked for. Thread-safe."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._lock = threading.Lock()
        self._last: tuple[str, float, tuple[str, bytes]] | None = None

    def __call__(self, accept: str) -> tuple[str, bytes]:
        """Returns the content type and the body."""
        with self._lock:
            now_s = time.monotonic()
            if self._last is None or self._last[0] != accept or now_s - self._last[1] >= FRESH_S:
                self._last = accept, now_s, self._page(accept)
            return self._last[2]


def _request(connection: socket.socket, deadline_s: float) -> tuple[str, str, str]:
    """Returns method, path and Accept header. Raises `OSError` for a request that is too long, incomplete or too late."""
    data = b""
    while b"\r\n\r\n" not in data and b"\n\n" not in data:
        _allow(connection, deadline_s)
        more = connection.recv(REQUEST_BYTES_MAX)
        data += more
        if not more or len(data) > REQUEST_BYTES_MAX:
            raise ConnectionError("the request is incomplete or too long")
    first, *lines = data.decode("latin-1").splitlines()
    method, path, *_ = [*first.split(" "), "", ""]
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return method, path.partition("?")[0], headers.get("accept", "")


def _send(
    connection: socket.socket, deadline_s: float, status: HTTPStatus, content_type: str, body: bytes, *, with_body: bool = True
) -> None:
    _allow(connection, deadline_s)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    head = "\r\n".join([*lines, "Connection: close", "", ""])
    connection.sendall(head.encode() + (body if with_body else b""))


def _allow(connection: socket.socket, deadline_s: float) -> None:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the request took too long")
    connection.settimeout(left_s)


def healthz(accept: str) -> tuple[str, bytes]:
    """The page `/healthz`: the process answers."""
    return "text/plain; charset=utf-8", b"ok\n"


def discovery(targets: Callable[[], Iterable[tuple[str, Mapping[str, str]]]]) -> Page:
    """Returns the page `/sd`: targets with their labels, as Prometheus' `http_sd_configs` reads them."""

    def page(accept: str) -> tuple[str, bytes]:
        groups = [{"targets": [target], "labels": dict(labels)} for target, labels in targets()]
        return "application/json", json.dumps(groups).encode()

    return page
