"""Paged KV: sequences as block tables over the node's memory, shared between forks and copied on write.

A full page is a block under the key of its prefix. So sequences with equal tokens share this block automatically, and later
sequences find it. Only a sequence's last page has a reference count here, as long as it is not full (Kwon et al., "Efficient Memory
Management for Large Language Model Serving with PagedAttention", SOSP 2023).
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
from tiered_kv.node.pages import PageAllocator


class Page(NamedTuple):
    """One row of a block table.

    offset: the page's position in the arena, in bytes. tokens: the number of tokens in it. shared_by: the number of sequences of
    this cache that use the page.
    """

    offset: int
    tokens: int
    shared_by: int


@dataclass
class _LastPage:
    """The last page of one or more sequences, which is not full yet. `tables`: the number of sequences that use it."""

    offset: int
    tables: int = 1


@dataclass
class _Sequence:
    """One sequence. ids: its token ids so far. keys: the keys of its full pages. last: its last page if that page is not full."""

    ids: np.ndarray
    keys: list[BlockKey] = field(default_factory=list)
    last: _LastPage | None = None


class PagedKVCache(BaseKVCache):
    """A cache whose sequences grow page by page (a page: `config.block_tokens` tokens) and fork without copying. Thread-safe.

    Pages are never compressed, because sequences write to them. `use_quantization` and `use_compression` are ignored.

    The pages of a sequence stay in memory until the sequence is freed. A full page that no sequence uses is an ordinary cached
    block. An append without room for its pages raises (kind `memory`) and changes nothing. If the index has no slot for one of
    the pages, the sequence is cut before that page, and the error text has its new length.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.config = self.config.with_(use_quantization=False, use_compression=False)
        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._slab: PageAllocator | None = None

    def create(self, token_ids: TokenIds = ()) -> int:
        """Create a sequence that starts with the longest cached prefix of `token_ids`. Returns the number of the sequence.

        `length` returns how many tokens were cached.
        """
        ids = as_token_ids(token_ids)
        with self._lock:
            keys: list[BlockKey] = []
            if len(ids) and self.layout is not None:
                keys = self.namespace.chain(self.layout).keys(ids)
                keys = keys[: self._pages().hold(keys)]
            tokens = len(keys) * self.layout.block_tokens if keys else 0
            return self._added(_Sequence(ids[:tokens], keys))

    def append(self, sequence: int, token_ids: TokenIds, kv: torch.Tensor) -> None:
        """Append tokens and their KV, `kv` (L, 2, H, N, D), to a sequence.

        Cost: one copy of `kv`, and one of the last page's tokens if other sequences share that page.
        """
        ids = as_token_ids(token_ids)
        with self._lock:
            held = self._of(sequence)
            if self.layout is None:
                self.layout = self._layout_of(kv)
            self.layout.check_kv(kv, len(ids))
            if len(ids):
                self._append(held, ids, kv.detach())

    def _append(self, held: _Sequence, ids: np.ndarray, kv: torch.Tensor) -> None:
        layout, allocator, step = self.layout, self._pages(), self.layout.block_tokens
        whole = np.concatenate([held.ids, ids])
        keys = self.namespace.chain(layout).keys(whole)
        first, at = divmod(len(held.ids), step)
        pages = -(-len(whole) // step) - first
        owns_last = held.last is not None and held.last.tables == 1
        wanted = [*keys[first:], None][:pages]
        offsets = allocator.take(wanted[1:] if owns_last else wanted)
        if offsets is None:
            raise TieredKVError(Kind.MEMORY, f"no room for {len(ids)} tokens: free a sequence, or raise max_tokens", pages=pages)
        if owns_last:
            offsets.insert(0, held.last.offset)
        elif held.last is not None:  # copy on write
            allocator.page(offsets[0])[..., :at, :].copy_(allocator.page(held.last.offset)[..., :at, :])
            held.last.tables -= 1
        held.last = None
        done = 0
        for number, offset in enumerate(offsets, first):
            count = min(step - at, len(ids) - done)
            allocator.page(offset)[..., at : at + count, :].copy_(kv[..., done : done + count, :])
            done, at = done + count, 0
            if number < len(keys):
                self._publish(held, keys, number, offset, offsets[number - first + 1 :])
            else:
                held.last = _LastPage(offset)
            held.ids = whole[: len(held.ids) + count]

    def _publish(self, held: _Sequence, keys: list[BlockKey], number: int, offset: int, later: Sequence[int]) -> None:
        if not self._pages().publish(keys[number], keys[number - 1] if number else None, number, offset):
            self._pages().drop(later)
            held.ids = held.ids[: number * self.layout.block_tokens]
            raise TieredKVError(
                Kind.MEMORY, f"append: the node's index is full; the sequence now ends after {len(held.ids)} tokens", tokens=len(held.ids)
            )
        held.keys.append(keys[number])

    def fork(self, sequence: int) -> int:
        """Create a sequence with the same tokens, which shares all pages with `sequence`. Returns the number of the new sequence.

        If the last page is not full, it is copied when one of the two sequences appends first.
        """
        with self._lock:
            held = self._of(sequence)
            if held.keys:
                self._pages().hold(held.keys)
            if held.last is not None:
                held.last.tables += 1
            return self._added(_Sequence(held.ids, list(held.keys), held.last))

    def gather(self, sequence: int) -> torch.Tensor:
        """Returns the KV of a sequence as one new tensor (L, 2, H, N, D) on the CPU."""
        with self._lock:
            held = self._of(sequence)
            if self.layout is None:
                raise TieredKVError(Kind.LAYOUT, "gather: the shape of KV must be known, but nothing was appended to this cache yet")
            kv = torch.empty(self.layout.kv_shape(len(held.ids)), dtype=self.layout.torch_dtype)
            full = len(held.keys) * self.layout.block_tokens
            if full and self.client().fetch(held.ids[:full], kv).tokens != full:
                raise TieredKVError(Kind.CORRUPT, f"gather: a page of sequence {sequence} cannot be read")
            if held.last is not None:
                kv[..., full:, :].copy_(self._pages().page(held.last.offset)[..., : len(held.ids) - full, :])
            return kv

    def block_table(self, sequence: int) -> list[Page]:
        """Returns the pages of a sequence, in order."""
        with self._lock:
            held = self._of(sequence)
            step = self.layout.block_tokens if self.layout is not None else 0
            sharing = [sum(key in other.keys for other in self._sequences.values()) for key in held.keys]
            offsets = self._pages().offsets(held.keys) if held.keys else []
            pages = [Page(offset, step, count) for offset, count in zip(offsets, sharing, strict=True)]
            if held.last is not None:
                pages.append(Page(held.last.offset, len(held.ids) - len(held.keys) * step, held.last.tables))
            return pages

    def length(self, sequence: int) -> int:
        """Returns the number of tokens of a sequence."""
        with self._lock:
            return len(self._of(sequence).ids)

    def tokens(self, sequence: int) -> list[int]:
        """Returns the token ids of a sequence."""
        with self._lock:
            return self._of(sequence).ids.tolist()

    def free(self, sequence: int) -> None:
        """End a sequence. Its full pages become ordinary cached blocks, which may be evicted."""
        with self._lock:
            held = self._of(sequence)
            del self._sequences[sequence]
            if held.keys:
                self._pages().let_go(held.keys)
            if held.last is not None:
                held.last.tables -= 1
                if not held.last.tables:
                    self._pages().drop([held.last.offset])

    def clear(self) -> None:
        """Free all sequences, and drop all blocks, entries and statistics."""
        with self._lock:
            for sequence in list(self._sequences):
                self.free(sequence)
            if self._slab is not None:
                self._slab.close()
                self._slab = None
            super().clear()

    def _pages(self) -> PageAllocator:
        if self._slab is None:
            layout: KVLayout = self.layout
            self.client()  # registers the model with the node
            self._slab = PageAllocator(self.engine(layout).node, layout, self.namespace.root(layout))
        return self._slab

    def _of(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            known = f"the first numbers are {sorted(self._sequences)[:20]}" if self._sequences else "this cache has none"
            raise TieredKVError(Kind.TOKENS, f"there is no sequence {sequence!r}; {known}")
        return self._sequences[sequence]

    def _added(self, held: _Sequence) -> int:
        number, self._next_id = self._next_id, self._next_id + 1
        self._sequences[number] = held
        return number
