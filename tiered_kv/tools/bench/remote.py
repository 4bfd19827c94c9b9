"""The S3 server for `bench checkpoint`, and the baseline: puts and gets by the plain client."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from unittest.mock import patch

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.node.checkpoints.loader import READS_AHEAD
from tiered_kv.node.checkpoints.writer import PACKS_AT_ONCE
from tiered_kv.tiers.objects.open_store import open_store

BUCKET = "bench"
STARTS_WITHIN_S = 30.0


@contextmanager
def bucket(endpoint: str | None, log: Callable[[str], None]) -> Iterator[str | None]:
    """Yields the URL of a bucket, and sets the environment variables with which it can be reached.

    The server is the one at `endpoint`, or a moto server that is stopped at the end. If obstore, or moto where it is needed, is
    not installed, logs this and yields None.
    """
    if find_spec("obstore") is None or (endpoint is None and find_spec("moto") is None):
        log("object storage is not measured: it needs obstore, and either moto or --endpoint")
        yield None
        return
    known = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"} if endpoint is None else {}
    with _server(endpoint) as url, patch.dict(os.environ, {"AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", **known}):
        yield f"s3://{BUCKET}"


@contextmanager
def _server(endpoint: str | None) -> Iterator[str]:
    if endpoint is not None:
        yield endpoint
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _make_bucket(f"http://127.0.0.1:{port}/{BUCKET}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def _make_bucket(url: str) -> None:
    deadline_s = time.monotonic() + STARTS_WITHIN_S
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=STARTS_WITHIN_S).close()
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if time.monotonic() > deadline_s:
                raise TieredKVError(Kind.STORAGE, f"the S3 server did not start: {error}") from error
            time.sleep(0.1)


class Plain:
    """The baseline: calls the cache's object-storage client directly, with as many requests in flight as a checkpoint has."""

    def __init__(self, url: str) -> None:
        import obstore
        import obstore.store

        self._obstore = obstore
        self._store = obstore.store.from_url(url, unsigned_payload=True, client_options={"allow_http": True, "timeout": "120s"})

    def put(self, bodies: Sequence[bytes]) -> None:
        """Write one object per body."""

        def put(number: int) -> None:
            self._obstore.put(self._store, str(number), bodies[number], use_multipart=False)

        with ThreadPoolExecutor(PACKS_AT_ONCE) as threads:
            list(threads.map(put, range(len(bodies))))

    def get(self, count: int, keep: bool = False) -> None:
        """Read `count` whole objects. With `keep` all their bytes stay in memory until the end, as in a restore."""

        def get(number: int) -> memoryview | None:
            content = memoryview(self._obstore.get(self._store, str(number)).bytes())
            return content if keep else None

        with ThreadPoolExecutor(READS_AHEAD) as threads:
            list(threads.map(get, range(count)))


def sizes(url: str) -> list[int]:
    """Returns the sizes in bytes of the objects at a URL."""
    with open_store(url) as store:
        return list(store.sizes().values())


def remove(url: str) -> None:
    """Delete all objects at a URL."""
    with open_store(url) as store:
        store.delete(list(store.sizes()))
