"""Writes traces in the format that `read_trace` reads."""

import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import Self

import zstandard

from tiered_kv.errors import Kind, TieredKVError

_OPENERS = {".gz": gzip.open, ".zst": zstandard.open}


class TraceWriter:
    """A context manager that writes a trace file request by request. The extension .gz or .zst compresses it, any other does not.

    Replaces an existing file. Raises (kind `config`, setting `out`) if the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = _OPENERS.get(self.path.suffix, open)(self.path, "wt", encoding="ascii")
        except OSError as error:
            raise self._refusal(error) from error

    def write(self, request: dict) -> None:
        """Add one request with the fields `timestamp`, `input_length`, `output_length`, `hash_ids`."""
        try:
            self._file.write(json.dumps(request, separators=(",", ":")) + "\n")
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Finish the file. A compressed file is incomplete without this. May be called twice."""
        try:
            self._file.close()
        except OSError as error:
            raise self._refusal(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(TieredKVError):  # the first error is the one to report
            self.close()

    def _refusal(self, error: OSError) -> TieredKVError:
        return TieredKVError(Kind.CONFIG, f"--out: cannot write {self.path} ({error.strerror or error})", setting="out")
