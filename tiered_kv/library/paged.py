"""Paged KV: sequences as block tables over the engine's memory, shared between forks and copied when one of them writes.

A full page is a block under the key of its prefix, so that sequences with equal tokens share it without saying so, and later
sequences find it. Only the last page of a sequence, while it is not full, is counted by references (Kwon et al., "Efficient
Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from tiered_kv.client.client import TokenIds
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, as_token_ids
from tiered_kv.layout import KVLayout
from tiered_kv.library.cache import BaseKVCache
from tiered_kv.node.pages import Slab


class Page(NamedTuple):
    """One row of a block table: where the page lies in the slab (bytes), how many tokens are in it, and how many tables name it.

    `shared_by` of a full page counts the sequences of this cache that hold it.
    """

    offset: int
    tokens: int
    shared_by: int


@dataclass
class _Tail:
    """The last page of one or more sequences, not full yet."""

    offset: int
    tables: int = 1


@dataclass
class _Sequence:
    """Tokens so far, the keys of the full pages, and the page behind them."""

    ids: np.ndarray
    keys: list[BlockKey] = field(default_factory=list)
    tail: _Tail | None = None


class PagedKVCache(BaseKVCache):
    """A cache whose sequences grow page by page (a page: `config.block_tokens` tokens) and fork without copying. Thread-safe.

    Pages stay as they are, whatever `use_quantization` and `use_compression` say: sequences write to them.

    Pages that a sequence names stay in memory until it is freed; what no sequence names is an ordinary cached block. An append
    that finds no room for its pages raises (kind `memory`) and changes nothing; where the index has no room for one of them, the message
    says how long the sequence is now.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.config = self.config.with_(use_quantization=False, use_compression=False)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._slab: Slab | None = None

    def create(self, token_ids: TokenIds = ()) -> int:
        """A new sequence that begins with the longest cached prefix of `token_ids`; its number. `length` says how long that is."""
        ids = as_token_ids(token_ids)
        with self._lock:
            keys: list[BlockKey] = []
            if len(ids) and self.layout is not None:
                keys = self.namespace.chain(self.layout).keys(ids)
                keys = keys[: self._pages().hold(keys)]
            tokens = len(keys) * self.layout.block_tokens if keys else 0
            return self._added(_Sequence(ids[:tokens], keys))

    def append(self, sequence: int, token_ids: TokenIds, kv: torch.Tensor) -> None:
        """Put tokens behind a sequence; `kv` (L, 2, H, N, D) is theirs. Costs one copy of it, and of a shared last page's tokens."""
        ids = as_token_ids(token_ids)
        with self._lock:
            held = self._of(sequence)
            if self.layout is None:
                self.layout = self._layout_of(kv)
            self.layout.check_kv(kv, len(ids))
            if len(ids):
                self._append(held, ids, kv.detach())

    def _append(self, held: _Sequence, ids: np.ndarray, kv: torch.Tensor) -> None:
        layout, slab, step = self.layout, self._pages(), self.layout.block_tokens
        whole = np.concatenate([held.ids, ids])
        keys = self.namespace.chain(layout).keys(whole)
        first, at = divmod(len(held.ids), step)
        pages = -(-len(whole) // step) - first
        owns_tail = held.tail is not None and held.tail.tables == 1
        wanted = [*keys[first:], None][:pages]
        offsets = slab.take(wanted[1:] if owns_tail else wanted)
        if offsets is None:
            raise TieredKVError(Kind.MEMORY, f"no room for {len(ids)} tokens: free a sequence, or raise max_tokens", pages=pages)
        if owns_tail:
            offsets.insert(0, held.tail.offset)
        elif held.tail is not None:  # copy on write
            slab.page(offsets[0])[..., :at, :].copy_(slab.page(held.tail.offset)[..., :at, :])
            held.tail.tables -= 1
        held.tail = None
        done = 0
        for number, offset in enumerate(offsets, first):
            count = min(step - at, len(ids) - done)
            slab.page(offset)[..., at : at + count, :].copy_(kv[..., done : done + count, :])
            done, at = done + count, 0
            if number < len(keys):
                self._publish(held, keys, number, offset, offsets[number - first + 1 :])
            else:
                held.tail = _Tail(offset)
            held.ids = whole[: len(held.ids) + count]

    def _publish(self, held: _Sequence, keys: list[BlockKey], number: int, offset: int, later: Sequence[int]) -> None:
        if not self._pages().publish(keys[number], keys[number - 1] if number else None, number, offset):
            self._pages().drop(later)
            held.ids = held.ids[: number * self.layout.block_tokens]
            raise TieredKVError(Kind.MEMORY, f"the index has no room; the sequence ends after {len(held.ids)} tokens", tokens=len(held.ids))
        held.keys.append(keys[number])

    def fork(self, sequence: int) -> int:
        """A sequence with the same tokens that shares all pages; whichever of the two appends first to a page not full copies it."""
        with self._lock:
            held = self._of(sequence)
            if held.keys:
                self._pages().hold(held.keys)
            if held.tail is not None:
                held.tail.tables += 1
            return self._added(_Sequence(held.ids, list(held.keys), held.tail))

    def gather(self, sequence: int) -> torch.Tensor:
        """The KV of a sequence as one new tensor (L, 2, H, N, D) on the CPU."""
        with self._lock:
            held = self._of(sequence)
            if self.layout is None:
                raise TieredKVError(Kind.LAYOUT, "nothing was appended yet, so the shape of KV is not known")
            kv = torch.empty(self.layout.kv_shape(len(held.ids)), dtype=self.layout.torch_dtype)
            full = len(held.keys) * self.layout.block_tokens
            if full and self.client().fetch(held.ids[:full], kv).tokens != full:
                raise TieredKVError(Kind.CORRUPT, f"a page of sequence {sequence} cannot be read")
            if held.tail is not None:
                kv[..., full:, :].copy_(self._pages().page(held.tail.offset)[..., : len(held.ids) - full, :])
            return kv

    def block_table(self, sequence: int) -> list[Page]:
        """The pages of a sequence, in order."""
        with self._lock:
            held = self._of(sequence)
            step = self.layout.block_tokens if self.layout is not None else 0
            sharing = [sum(key in other.keys for other in self._sequences.values()) for key in held.keys]
            offsets = self._pages().offsets(held.keys) if held.keys else []
            pages = [Page(offset, step, count) for offset, count in zip(offsets, sharing, strict=True)]
            if held.tail is not None:
                pages.append(Page(held.tail.offset, len(held.ids) - len(held.keys) * step, held.tail.tables))
            return pages

    def length(self, sequence: int) -> int:
        """How many tokens a sequence has."""
        with self._lock:
            return len(self._of(sequence).ids)

    def tokens(self, sequence: int) -> list[int]:
        """The token ids of a sequence."""
        with self._lock:
            return self._of(sequence).ids.tolist()

    def free(self, sequence: int) -> None:
        """End a sequence. Its full pages stay as cached blocks until their room is needed."""
        with self._lock:
            held = self._of(sequence)
            del self._sequences[sequence]
            if held.keys:
                self._pages().let_go(held.keys)
            if held.tail is not None:
                held.tail.tables -= 1
                if not held.tail.tables:
                    self._pages().drop([held.tail.offset])

    def clear(self) -> None:
        """Free all sequences, and forget everything."""
        with self._lock:
            for sequence in list(self._sequences):
                self.free(sequence)
            if self._slab is not None:
                self._slab.close()
                self._slab = None
            super().clear()

    def _pages(self) -> Slab:
        if self._slab is None:
            layout: KVLayout = self.layout
            self.client()  # which lets the node know the model
            self._slab = Slab(self.engine(layout).node, layout, self.namespace.root(layout))
        return self._slab

    def _of(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise TieredKVError(Kind.TOKENS, f"there is no sequence {sequence!r}; there are {sorted(self._sequences)[:20]}")
        return self._sequences[sequence]

    def _added(self, held: _Sequence) -> int:
        number, self._next_id = self._next_id, self._next_id + 1
        self._sequences[number] = held
        return number
