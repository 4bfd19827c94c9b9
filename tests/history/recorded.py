"""A client whose stores and fetches are written into a history, for tests with real processes."""

import time
from typing import Any

import torch

from tests.history.history import FETCH, LOSSY, STORE, HistoryWriter, Operation, digest_of
from tiered_kv.client.client import Client
from tiered_kv.keys import as_token_ids


class RecordedClient:
    """Stands in for `client`: the same calls, with a line in the history for each store and each fetch.

    `worker`: the name of the worker in the history. The scope of an operation is the client's namespace at its beginning.
    """

    def __init__(self, client: Client, history: HistoryWriter, worker: str) -> None:
        self.client = client
        self._history = history
        self._worker = worker

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    def store(self, token_ids: Any, kv: torch.Tensor, *, start: int = 0, **options: Any) -> Any:
        """As `Client.store`, for `kv` in one tensor."""
        t = self.client.layout.block_tokens
        first = -(-start // t)
        digests = [_digest(kv[..., block * t - start : (block + 1) * t - start, :]) for block in range(first, (start + kv.shape[-2]) // t)]
        self._note(STORE, self._keys(token_ids)[first:], digests, self.scope())
        return self.client.store(token_ids, kv, start=start, **options)

    def fetch(self, token_ids: Any, *arguments: Any, lossy: bool = False, **options: Any) -> Any:
        """As `Client.fetch`. `lossy`: whether the blocks may carry a lossy codec's error, so that their bytes are not compared."""
        keys, scope = self._keys(token_ids), self.scope()
        fetched = self.client.fetch(token_ids, *arguments, **options)
        self.note_fetched(keys, fetched, scope, lossy=lossy)
        return fetched

    def note_fetched(self, keys: list[str], fetched: Any, scope: str, *, lossy: bool) -> None:
        """Write a fetch of `client` that has ended just now."""
        t = self.client.layout.block_tokens
        blocks = range(fetched.tokens // t)
        self._note(FETCH, keys, [LOSSY if lossy else _digest(fetched.kv[..., block * t : (block + 1) * t, :]) for block in blocks], scope)

    def scope(self) -> str:
        """Returns the scope of a call that begins now."""
        return repr(self.client.namespace)

    def _keys(self, token_ids: Any) -> list[str]:
        return [key.hex() for key in self.client.namespace.chain(self.client.layout).keys(as_token_ids(token_ids))]

    def _note(self, kind: str, keys: list[str], digests: list[str], scope: str) -> None:
        self._history.append(Operation(self._worker, kind, time.monotonic(), scope, dict(zip(keys, digests, strict=False))))


def _digest(block: torch.Tensor) -> str:
    return digest_of(block.contiguous().view(torch.uint8).numpy())
