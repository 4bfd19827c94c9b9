"""Object storage over the network: S3, Google Cloud Storage and Azure, through obstore (see design note 009 for why).

Credentials are found as usual for these services: environment variables, AWS profiles, the identity of the machine or pod
(docs/object-storage.md). For other S3 servers set `AWS_ENDPOINT_URL`, and `AWS_ALLOW_HTTP=true` for one without TLS.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from tiered_kv.codecs.base import Buffer, byte_view
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.tiers.objects.credentials import METADATA, access, machine_answers, what_to_set
from tiered_kv.tiers.objects.store import OBJECTS, ObjectStore, role_of

_RETRIES = 4
_CODE = re.compile(r"<Code>(\w+)</Code>")
_LATE = re.compile(r"\bkind: Timeout\b|\bTimedOut\b")


class RemoteStore(ObjectStore):
    """Objects below a URL `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.

    Every call ends within its deadline. One request may take half of the deadline. In the other half, further requests
    are started with growing pauses if the server does not answer, or answers 5xx. `read_deadline_s` applies to `get_range`,
    `write_deadline_s` to all other calls. Opening makes no request. `environ`: credentials to use instead of this process's.
    Raises (kind `config`) if obstore is not installed or does not understand the URL.
    """

    def __init__(
        self,
        url: str,
        *,
        read_deadline_s: float,
        write_deadline_s: float,
        setting: str = OBJECTS,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.url, self.setting = url.partition("?")[0], setting
        self._obstore = _library(setting)
        self._access = access(url, environ)
        self._must_ask_machine = self._access.is_machines
        self._reading = self._connected(url, read_deadline_s)
        self._writing = self._connected(url, write_deadline_s)

    def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        whole = b"".join(byte_view(buffer) for buffer in buffers)
        with self._naming(f"put {name}"):
            self._obstore.put(self._open(self._writing), name, whole, use_multipart=False)

    def get(self, name: str) -> memoryview:
        with self._naming(f"get {name}", object=name):
            found = self._obstore.get(self._open(self._writing), name)
            self.check_size(name, found.meta["size"])
            return memoryview(found.bytes())

    def get_range(self, name: str, offset: int, nbytes: int) -> memoryview:
        with self._naming(f"get {name} at byte {offset}", object=name):
            found = memoryview(self._obstore.get_range(self._open(self._reading), name, start=offset, length=nbytes))
        if len(found) != nbytes:
            raise self.short(name, offset, nbytes, len(found))
        return found

    def sizes(self) -> dict[str, int]:
        with self._naming("list"):
            listed = self._obstore.list_with_delimiter(self._open(self._writing))["objects"]
        return {each["path"]: each["size"] for each in sorted(listed, key=lambda each: each["path"])}

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                with self._naming(f"delete {name}"):
                    self._obstore.delete(self._open(self._writing), name)
            except TieredKVError as error:
                if not error.context.get("missing"):
                    raise

    def close(self) -> None:
        """Drop the connections; obstore closes them."""
        self._reading = self._writing = None

    def _connected(self, url: str, deadline_s: float) -> Any:
        half = timedelta(seconds=deadline_s / 2)
        pauses = {"init_backoff": half / 40, "max_backoff": half / 4}
        options: dict[str, Any] = {
            "client_options": {"timeout": half, "connect_timeout": min(half, timedelta(seconds=5)), "allow_http": self._access.allows_http},
            "retry_config": {"max_retries": _RETRIES, "retry_timeout": half, "backoff": pauses},
        }
        if url.startswith("s3") and not {"AWS_UNSIGNED_PAYLOAD", "aws_unsigned_payload"} & {*os.environ, *self._access.config}:
            options["unsigned_payload"] = True  # hashing takes 3/4 of a put's CPU time; frames have checksums of their own
        try:
            return self._obstore.store.from_url(url, config=self._access.config, credential_provider=self._access.provider, **options)
        except (ValueError, TypeError, self._obstore.exceptions.BaseError) as error:
            message = f"{role_of(self.setting)}: {self.url} cannot be used: {_reason(error)}"
            raise TieredKVError(Kind.CONFIG, message, setting=self.setting) from error

    def _open(self, store: Any) -> Any:
        if store is None:
            raise TieredKVError(Kind.CLOSED, f"the object store {self.url} is closed")
        return store

    @contextmanager
    def _naming(self, doing: str, **context: object) -> Iterator[None]:
        """Turn errors of obstore into errors of this store."""
        if self._must_ask_machine:  # obstore would try until the request's deadline
            if not machine_answers():
                raise self.failed(doing, what_to_set(self.url), **context)
            self._must_ask_machine = False
        try:
            yield
        except FileNotFoundError as error:
            raise self.failed(doing, "there is no such object, or no such bucket", missing=True, **context) from error
        except (OSError, ValueError, self._obstore.exceptions.BaseError) as error:
            reason = _reason(error)
            if self._access.is_machines and METADATA in reason:
                reason = f"{what_to_set(self.url)} ({reason})"
            raise self.failed(doing, reason, **context) from error


def _reason(error: Exception) -> str:
    """Returns the first line of obstore's message, and the server's error code, such as NoSuchBucket."""
    said = str(error).strip()
    code = _CODE.search(said)
    before = "there is no such bucket: " if code and code[1] == "NoSuchBucket" else ""
    late = ", no answer in time" if _LATE.search(said) else ""
    return before + said.partition("\n")[0].partition(": <")[0] + late + (f" ({code[1]})" if code else "")


def _library(setting: str) -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        message = f"{role_of(setting)}: object storage needs the library obstore; pip install 'tiered-kv[objects]'"
        raise TieredKVError(Kind.CONFIG, message, setting=setting) from error
    return obstore
