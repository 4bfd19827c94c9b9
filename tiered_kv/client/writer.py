"""Stores a worker's blocks: reserves extents, packs the blocks, commits them. No block is visible before its commit."""

from collections.abc import Callable, Sequence

import torch

from tiered_kv.client.kv_copy import LayerPairs, runs_of
from tiered_kv.client.profile import Timed
from tiered_kv.client.reader import BlockSource
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.layout import KVLayout, Layout
from tiered_kv.protocol.messages import PackedBlock
from tiered_kv.protocol.session import Session


class BlockWriter:
    """Packs KV of one layout into the extents that a session reserves."""

    def __init__(self, layout: Layout, source: BlockSource) -> None:
        self._layout = layout
        self._source = source

    def measure(self, timed: Timed) -> None:
        """As `Client.measure`, for stores."""
        vars(self)["write"] = timed("store", self.write)

    def checked(self, kv: torch.Tensor | LayerPairs, tokens: int, start: int) -> torch.Tensor | LayerPairs:
        """Returns `kv` if it is the KV of tokens [start, tokens) in the layout. Raises (kinds `tokens`, `layout`) otherwise."""
        if not isinstance(start, int) or not 0 <= start <= tokens:
            raise TieredKVError(
                Kind.TOKENS, f"start: must be a whole number from 0 to {tokens}, the tokens of the prompt, got {start!r}", setting="start"
            )
        if isinstance(kv, Sequence):
            self._check_pairs(kv, tokens - start)
        else:
            self._layout.check_kv(kv, tokens - start)
        return kv

    def _check_pairs(self, pairs: LayerPairs, tokens: int) -> None:
        layout = self._layout
        if not isinstance(layout, KVLayout):
            raise TieredKVError(Kind.LAYOUT, "kv: must be one tensor, because the client's layout is opaque; got pairs of layers")
        if len(pairs) != layout.layers or any(not isinstance(pair, Sequence) or len(pair) != 2 for pair in pairs):
            raise TieredKVError(
                Kind.LAYOUT, f"kv: must be a (key, value) pair for each of {layout.layers} layers, got {len(pairs)} entries"
            )
        for layer, pair in enumerate(pairs):
            for name, heads in zip(("key", "value"), pair, strict=True):
                # One layer's half of (L, 2, H, N, D); the layout's error names what is wrong with it.
                layout.check_part(heads, (layout.kv_heads, tokens, layout.head_dim), f"kv: the {name} of layer {layer}")

    def write(
        self,
        session: Session,
        root: BlockKey,
        keys: list[BlockKey],
        missing: list[int],
        kv: torch.Tensor | LayerPairs,
        start: int,
        wait_s: float,
    ) -> tuple[int, int]:
        """Store as many of the `missing` blocks below `root`, in order, as get room within `wait_s`.

        `missing`: indices into `keys`. `kv`: the KV of the prompt's tokens from `start` on. Returns how many blocks were stored, and
        how many of these are new.
        """
        parent = keys[missing[0] - 1] if missing[0] else None

        def pack(taken: list[int], offsets: list[int]) -> list[PackedBlock]:
            self._pack(taken, offsets, kv, start)
            return [(keys[block], keys[block - 1] if block else None, offset, block) for block, offset in zip(taken, offsets, strict=True)]

        return self.write_packed(session, root, keys, missing, parent, wait_s, pack)

    def write_packed(
        self,
        session: Session,
        root: BlockKey,
        keys: list[BlockKey],
        missing: list[int],
        parent: BlockKey | None,
        wait_s: float,
        pack: Callable[[list[int], list[int]], list[PackedBlock]],
    ) -> tuple[int, int]:
        """As `write`, with a function that packs blocks. `parent`: the parent's key of the first missing block.

        `pack(taken, offsets)` packs the blocks `taken` at these offsets of the arena. It returns (key, parent, offset, depth) of each.
        """
        nbytes = self._layout.block_bytes
        if not self._source.live:  # no worker reads these files any more
            raise TieredKVError(Kind.TRANSPORT, "the node has closed the files that are mapped here")
        generation = self._source.generation
        offsets = session.reserve(nbytes, [keys[block] for block in missing], parent, wait_s)
        taken = missing[: len(offsets)]
        if not taken:
            return 0, 0
        with self._source.guard([(offset, nbytes) for offset in offsets], generation) as ours:
            if not ours:  # the node was restarted after it reserved them
                raise TieredKVError(Kind.TRANSPORT, "the node was restarted during a store")
            blocks = pack(taken, offsets)
            if self._source.verifies:
                blocks = [(*block[:4], self._source.digest(offset, nbytes)) for block, offset in zip(blocks, offsets, strict=True)]
            added = session.commit(root, nbytes, blocks)
        return len(added), sum(added)

    def _pack(self, taken: list[int], offsets: list[int], kv: torch.Tensor | LayerPairs, start: int) -> None:
        t = self._layout.block_tokens
        begin = 0
        while begin < len(taken):
            end = begin + 1
            while end < len(taken) and taken[end] == taken[end - 1] + 1:
                end += 1
            skip = taken[begin] * t - start  # tokens of kv that precede this block
            for run in runs_of(offsets[begin:end]):
                if isinstance(kv, torch.Tensor):
                    self._source.arena.pack(run, kv[..., skip:, :] if skip else kv)
                else:
                    self._source.arena.pack_layers(run, [(key[:, skip:], value[:, skip:]) for key, value in kv])
            begin = end
