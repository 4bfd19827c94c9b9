"""KV events for routers: which blocks the cache on this machine has, under vLLM's own hashes.

A block is announced when a worker has stored it. Each call of `Events.take` checks whether a few of the announced blocks are still in
the cache. So a removal is announced seconds to minutes late.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from vllm.distributed.kv_events import BlockRemoved, BlockStored

KNOWN_MAX = 1 << 16
"""The number of announced blocks that are checked for removal. The removal of older blocks is not announced."""
LOOKS = 64
"""The number of blocks that a call of `Events.take` checks. vLLM calls it after each step."""
MEDIUM = "CPU"


class OfferedBlock(NamedTuple):
    """A block that the workers are to store: its scope, and the fields of its event except the hash."""

    scope: bytes
    parent: bytes | None
    tokens: list[int]
    lora_id: int | None
    lora_name: str | None


class Events:
    """The events of one engine.

    `is_here(scope, hash)` returns whether a block is in the cache now. `external` converts a hash to the form that routers expect.
    """

    def __init__(self, block_tokens: int, is_here: Callable[[bytes, bytes], bool], external: Callable[[Any], Any]) -> None:
        self._block_tokens, self._is_here, self._external = block_tokens, is_here, external
        self._offered: OrderedDict[bytes, OfferedBlock] = OrderedDict()
        self._known: OrderedDict[bytes, bytes] = OrderedDict()
        self._ready: list[Any] = []

    def offered(self, request: Any, scope: bytes, start: int, end: int) -> None:
        """Remember a request's blocks `start` to `end` (exclusive), which the workers are to store."""
        size, hashes, lora = self._block_tokens, request.block_hashes, request.lora_request
        adapter = (lora.lora_int_id, lora.lora_name) if lora else (None, None)
        for number in range(start, end):
            tokens = list(request.all_token_ids[number * size : (number + 1) * size])
            parent = bytes(hashes[number - 1]) if number else None
            self._offered[bytes(hashes[number])] = OfferedBlock(scope, parent, tokens, *adapter)
        while len(self._offered) > KNOWN_MAX:
            self._offered.popitem(last=False)

    def stored(self, hashes: Sequence[bytes]) -> None:
        """Announce blocks that the workers have stored."""
        for each in hashes:
            offered = self._offered.pop(each, None)
            if offered is None or each in self._known:
                continue
            self._known[each] = offered.scope
            parent = None if offered.parent is None else self._external(offered.parent)
            self._ready.append(
                BlockStored(
                    block_hashes=[self._external(each)],
                    parent_block_hash=parent,
                    token_ids=offered.tokens,
                    block_size=self._block_tokens,
                    lora_id=offered.lora_id,
                    medium=MEDIUM,
                    lora_name=offered.lora_name,
                )
            )
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    def take(self) -> Iterable[Any]:
        """Check some announced blocks. Returns the events since the last call, with a removal for each checked block that is gone."""
        for _ in range(min(LOOKS, len(self._known))):
            each, scope = self._known.popitem(last=False)
            if self._is_here(scope, each):
                self._known[each] = scope  # now last: the other blocks are checked first
            else:
                self._ready.append(BlockRemoved(block_hashes=[self._external(each)], medium=MEDIUM))
        ready, self._ready = self._ready, []
        return ready
