"""Writes checkpoints: the nodes write the blocks of their snapshots to packs. The manifest is written last.

A block that is already in a pack is not written again, unless too little of that pack is still needed (`repository.reusable`).
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any, NamedTuple

from tiered_kv.checkpoint.call_nodes import CallNodes, call_all, error_of
from tiered_kv.checkpoint.leases import Lease
from tiered_kv.checkpoint.manifest import Manifest, Model
from tiered_kv.checkpoint.manifest_rows import Row
from tiered_kv.checkpoint.merge import MergedBlock, MergedSnapshots, assign_writers, merge, without_descendants
from tiered_kv.checkpoint.repository import BlockId, PackEntry, Repository, entries_in, reusable
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.node.checkpoints.steps import (
    PACK_BYTES,
    Snapshot,
    SnapshotRequest,
    StopWritingRequest,
    WriteRequest,
    WriteStatus,
    WriteStatusRequest,
)
from tiered_kv.protocol.model_info import ModelInfo
from tiered_kv.tiers.objects.credentials import credentials

log = logging.getLogger(__name__)

RENEW_S = 60.0


class CheckpointFilter(NamedTuple):
    """The filter for the blocks of a checkpoint.

    tiers: the values of `Tier` to include; None means all except objects. models: returns whether to include the blocks of a model.
    min_hits: the least number of uses of a block. may_be_empty: whether to write a checkpoint if no block matches, instead of raising.
    """

    tiers: tuple[int, ...] | None = None
    models: Callable[[Model], bool] = lambda _: True
    min_hits: int = 0
    may_be_empty: bool = True


EVERYTHING = CheckpointFilter()


class WriteProgress(NamedTuple):
    """The progress of writing.

    blocks, nbytes: blocks written so far, and the bytes of their frames. all_blocks, all_bytes: the same for all blocks to be
    written.
    """

    blocks: int
    all_blocks: int
    nbytes: int
    all_bytes: int


class CheckpointResult(NamedTuple):
    """The counts of a written checkpoint.

    blocks, nbytes: all its blocks, and the bytes of their frames. new_blocks, new_bytes: the same of the blocks in new packs.
    packs, new_packs: all its packs, and those written now. written_bytes: bytes of the new packs. Two kinds of blocks are not in the
    checkpoint. left: blocks that were evicted before they could be written. orphans: blocks that could never be hits, because no
    node has one of their ancestors.
    """

    name: str
    blocks: int
    nbytes: int
    new_blocks: int
    new_bytes: int
    packs: int
    new_packs: int
    written_bytes: int
    left: int
    orphans: int


class CheckpointJob:
    """Writes one or more checkpoints of a cluster's nodes.

    max_rate: the limit in bytes per second for all nodes together, or None. origin: the name of the cluster, stored in the
    manifest. progress: called after each poll of the nodes. stopped: an event that the caller sets to end the writing. poll_s:
    seconds between two polls.
    """

    def __init__(
        self,
        call: CallNodes,
        nodes: Sequence[str],
        repository: Repository,
        *,
        origin: str,
        max_rate: float | None = None,
        pack_bytes: int = PACK_BYTES,
        progress: Callable[[WriteProgress], None] = lambda _: None,
        log: Callable[[str], None] = log.info,
        stopped: Event | None = None,
        poll_s: float = 0.1,
    ) -> None:
        self._call = call
        self._nodes = list(nodes)
        self._repository = repository
        self._origin = origin
        self._rate = max_rate
        self._pack_bytes = pack_bytes
        self._progress = progress
        self._log = log
        self._stopped = stopped or Event()
        self._poll_s = poll_s

    def take(
        self,
        wanted: CheckpointFilter = EVERYTHING,
        name: str | None = None,
        models: Sequence[Model] = (),
        extra: dict[str, Any] | None = None,
    ) -> CheckpointResult:
        """Write a checkpoint of the nodes' blocks under `name`, or under a generated name. Returns its counts.

        `models`: descriptions of models that the nodes may not have. Raises (kind `storage`) if a node or the object store fails, or
        if `stopped` is set. In that case no checkpoint is published. Complete packs are kept, and the next checkpoint reuses them.
        """
        with self._repository.lease("checkpoint", log=self._log) as lease:
            known = self._repository.known()  # read before the snapshots are taken, because nodes drop a snapshot after a while
            lease.renew_if_half_gone()
            ticket = uuid.uuid4().hex
            try:
                snapshots = call_all(self._call, self._nodes, SnapshotRequest(wanted.tiers, wanted.min_hits, ticket))
                described = _models(snapshots, models)
                whole = merge(snapshots, {model.root for model in described if wanted.models(model)})
                if not whole.blocks and not wanted.may_be_empty:
                    raise TieredKVError(Kind.STORAGE, "there is nothing to write: no node has a block that matches the given filter")
                kept = reusable(
                    known, [block_id for block in whole.blocks if _is_as_good(known.entries.get(block_id := _id_of(block)), block)]
                )
                new = [block for block in whole.blocks if (block.best.key, block.best.root) not in kept]
                written = self._write_packs(assign_writers(new), new, lease, ticket)
            finally:
                self._call(self._nodes, StopWritingRequest(ticket))  # with the ticket, this stops no other process's checkpoint
            return self._publish(whole, ExistingPacks(kept, known.packs), written, described, name, extra or {}, lease)

    def _write_packs(
        self, shares: dict[str, list[BlockKey]], new: Sequence[MergedBlock], lease: Lease, ticket: str
    ) -> dict[str, WriteStatus]:
        """Make each node write its share of the new blocks, and wait until all are written. Returns the final status of each node."""
        all_bytes = sum(block.best.stored_bytes for block in new)
        rate = self._rate and self._rate / max(len(shares), 1)
        url = self._repository.store.url
        mine = credentials(url)
        for node, keys in shares.items():
            call_all(self._call, [node], WriteRequest(url, keys, rate, self._pack_bytes, mine, ticket))
        renew_s = time.monotonic() + RENEW_S
        state: dict[str, WriteStatus] = {}
        while not all(node in state and state[node].is_done for node in shares):
            if self._stopped.wait(self._poll_s):
                raise TieredKVError(Kind.STORAGE, "the checkpoint was stopped; the next one continues from what was written")
            for node in shares:
                if node in state and state[node].is_done:
                    continue
                known = state[node].packs if node in state else []
                answer = call_all(self._call, [node], WriteStatusRequest(len(known), ticket))[node]
                state[node] = answer._replace(packs=known + answer.packs)
                if answer.error is not None:
                    raise error_of(node, answer.error) from answer.error
            if time.monotonic() > renew_s:
                lease.renew()
                renew_s = time.monotonic() + RENEW_S
            done = state.values()
            self._progress(WriteProgress(sum(each.blocks for each in done), len(new), sum(each.nbytes for each in done), all_bytes))
        return state

    def _publish(
        self,
        whole: MergedSnapshots,
        existing: "ExistingPacks",
        written: dict[str, WriteStatus],
        models: Sequence[Model],
        name: str | None,
        extra: dict[str, Any],
        lease: Lease,
    ) -> CheckpointResult:
        """Write the manifest, with the blocks in existing packs and those in new packs. Returns the counts of the checkpoint."""
        new_packs = {info.name: info for each in written.values() for info in each.packs}
        entries = dict(existing.entries)
        for info in new_packs.values():
            entries |= entries_in(info.name, info.entries)
        blocks = without_descendants(
            whole.blocks, {block.best.key for block in whole.blocks if (block.best.key, block.best.root) not in entries}
        )
        numbers: dict[str, int] = {}
        rows = tuple(_row(block, entries[block.best.key, block.best.root], numbers) for block in blocks)
        sizes = existing.packs | {info.name: info.nbytes for info in new_packs.values()}
        packs = tuple((pack, sizes[pack]) for pack in numbers)
        roots = {row.root for row in rows}
        described = tuple(model for model in models if model.root in roots)
        self._repository.confirm(packs)
        manifest = Manifest(packs, described, rows, self._repository.now_s(), self._origin, extra)
        new = [row for row in rows if (row.key, row.root) not in existing.entries]
        return CheckpointResult(
            name=self._repository.publish(manifest, name, lease),
            blocks=len(rows),
            nbytes=sum(row.stored_bytes for row in rows),
            new_blocks=len(new),
            new_bytes=sum(row.stored_bytes for row in new),
            packs=len(packs),
            new_packs=len(new_packs),
            written_bytes=sum(info.nbytes for info in new_packs.values()),
            left=len(whole.blocks) - len(blocks),
            orphans=whole.orphans,
        )


def _id_of(block: MergedBlock) -> BlockId:
    return block.best.key, block.best.root


def _is_as_good(entry: PackEntry | None, block: MergedBlock) -> bool:
    """Returns whether the checkpoint may use the block's existing frame `entry` in a pack instead of the node's copy `block.best`.

    Returns False if the frame has a lossy codec other than the copy's codec: a cluster with settings of lower quality wrote
    that frame. Returns True if `entry` is None: then there is no frame to replace.
    """
    if entry is None or entry.codec == block.best.codec:
        return True
    from tiered_kv.codecs import is_lossy  # imports torch, which most checkpoints do not need

    return not is_lossy(entry.codec)


class ExistingPacks(NamedTuple):
    """The blocks that are not written again: their entries in existing packs, and the size of each existing pack in bytes."""

    entries: dict[BlockId, PackEntry]
    packs: dict[str, int]


def _row(block: MergedBlock, entry: PackEntry, numbers: dict[str, int]) -> Row:
    """Returns the manifest row of a block. `numbers`: the packs' numbers by name; if the pack has none, the next one is added."""
    best, pack = block.best, numbers.setdefault(entry.pack, len(numbers))
    where = entry.offset, entry.stored_bytes, entry.raw_bytes, entry.codec
    return Row(best.key, best.parent, best.root, block.depth, pack, *where, best.tier, block.hits)


def _models(snapshots: Mapping[str, Snapshot], known: Sequence[Model]) -> list[Model]:
    """Returns the model of each root in the snapshots.

    A model's description is taken from `known` (the caller's), else from workers. A model without either has only its root.
    """
    models = {entry.root: Model(entry.root) for snapshot in snapshots.values() for entry in snapshot.blocks}
    for snapshot in snapshots.values():
        for root, message in snapshot.models.items():
            info = ModelInfo.of_message(message)
            models[root] = Model(root, info.layout, "", info.namespace)
    return list((models | {model.root: model for model in known}).values())
