"""S3 servers for the tests: a real one in a process, one with configurable bad answers, and a proxy that injects faults."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from tiered_kv.tiers.objects.open_store import open_store


class Server(NamedTuple):
    """A separate S3 server for one test."""

    process: subprocess.Popen
    url: str

    def stop(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start_server() -> Server:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = Server(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), url)
    for _ in range(300):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"), timeout=10).close()
            return server
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)  # polls for a start, orders nothing
    server.stop()
    raise AssertionError("the S3 server did not start")


class BadServer(ThreadingHTTPServer):
    """Answers each request with `status` and `body`, with `promised` as the announced length. Waits until `answers` is set."""

    daemon_threads = True
    request_queue_size = 128  # of the few that are the default some would wait for a second

    def __init__(self, status: int, body: bytes = b"", promised: int | None = None) -> None:
        super().__init__(("127.0.0.1", 0), BadAnswers)
        self.status, self.body = status, body
        self.promised = len(body) if promised is None else promised
        self.answers = Event()
        self.answers.set()
        self.requests = 0


class BadAnswers(BaseHTTPRequestHandler):
    server: BadServer

    def answer(self) -> None:
        self.server.requests += 1
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.answers.wait(30)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(self.server.promised))
        self.send_header("Content-Range", f"bytes 0-{self.server.promised - 1}/{self.server.promised}")
        self.send_header("ETag", '"e"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(self.server.body)
        self.close_connection = True

    do_GET = do_PUT = do_DELETE = do_POST = answer

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class Request(NamedTuple):
    """One request to a proxy: of all so far its number, and the object (""  for a listing)."""

    number: int
    method: str
    name: str


class Fault(NamedTuple):
    """The answer to send instead. `passed_on`: the server executes the request anyway. `cut`: the number of bytes left off the answer."""

    status: int = 0
    code: str = ""
    passed_on: bool = False
    cut: int = 0
    flip: bool = False
    etag: str = ""
    hangs: bool = False


class Proxy(ThreadingHTTPServer):
    """A proxy for an S3 server: passes requests on, unless `spoil(request)` returns a fault.

    `seen`: all requests; `keys`: of whom; `written`: objects that were put behind it.
    """

    daemon_threads = True
    request_queue_size = 128  # of the few that are the default some would wait for a second

    def __init__(self, server: Server) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.behind = urlsplit(server.url).netloc
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.spoil: Callable[[Request], Fault | None] = lambda _: None
        self.seen: list[Request] = []
        self.keys: set[str] = set()
        self.written: list[str] = []
        self.lock = Lock()
        self.ended = Event()
        self._thread = Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        self.ended.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Passing(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.0"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        signed = self.headers.get("Authorization", "")
        with self.server.lock:
            path = urlsplit(self.path).path
            is_listing = self.command == "GET" and "list-type" in self.path
            request = Request(len(self.server.seen), self.command, "" if is_listing else unquote(path).rpartition("/")[2])
            self.server.seen.append(request)
            self.server.keys.add(signed.partition("Credential=")[2].partition("/")[0])
            fault = self.server.spoil(request) or Fault()
        if fault.hangs:
            self.server.ended.wait(30)
            return
        if fault.status and not fault.passed_on:
            return self.say(fault.status, {}, _said(fault.code))
        connection = http.client.HTTPConnection(self.server.behind, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            content = bytearray(answer.read())
        finally:
            connection.close()
        if request.method == "PUT":
            self.server.written.append(request.name)
        if fault.status:
            return self.say(fault.status, {}, _said(fault.code))
        if fault.flip:
            content[len(content) // 2] ^= 1
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("server", "date", "connection")}
        if fault.etag:
            headers["ETag"] = fault.etag
        self.say(answer.status, headers | {"Content-Length": str(len(content))}, bytes(content[: len(content) - fault.cut]))

    do_GET = do_PUT = do_DELETE = do_POST = do_HEAD = answer

    def say(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        with suppress(OSError):  # it asks no more
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def _said(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>of a test</Message></Error>".encode()


@contextmanager
def environment(**values: str) -> Iterator[pytest.MonkeyPatch]:
    """Sets the usual environment variables, each name with the prefix `AWS_`, and removes all others of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in values.items():
            patch.setenv(f"AWS_{name}", value)
        yield patch


@contextmanager
def served(patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose address is set in the environment."""
    server = start_server()
    try:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        with open_store("s3://bucket/first") as store:  # opens what the library keeps open
            store.sizes()
        yield server
    finally:
        server.stop()
