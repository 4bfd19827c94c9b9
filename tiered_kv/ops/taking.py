"""Taking a checkpoint: what the nodes hold at one moment each, as packs that are not there yet, and a manifest written last."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event
from typing import Any, NamedTuple

from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey
from tiered_kv.ops.manifest import Manifest, Model, Row
from tiered_kv.ops.merging import Block, assigned, closed, merged
from tiered_kv.ops.nodes import Ask, answers, good
from tiered_kv.ops.repository import Known, Lease, Place, Repository, reusable
from tiered_kv.service.facts import ModelFacts
from tiered_kv.service.saving import PACK_BYTES, Snapshot, Written

log = logging.getLogger(__name__)

RENEW_S = 60.0


class Wanted(NamedTuple):
    """Which blocks go into a checkpoint: in which tiers (values of `Tier`; None: all but objects), of which models, hit how often."""

    tiers: tuple[int, ...] | None = None
    models: Callable[[Model], bool] = lambda _: True
    min_hits: int = 0


EVERYTHING = Wanted()


class Going(NamedTuple):
    """How the writing goes: blocks and bytes of frames, of how many that have to be written."""

    blocks: int
    all_blocks: int
    nbytes: int
    all_bytes: int


class Taken(NamedTuple):
    """A checkpoint that was written: its blocks and their bytes; what of that is new; its packs, those that are new, and all bytes written.

    `left`: blocks that left the cache before they could be written. `orphans`: those that no one could have hit, for a block
    before them is in no node; both are not in it.
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


class Taking:
    """The parts that taking a checkpoint needs, for one or several of them."""

    def __init__(
        self,
        ask: Ask,
        nodes: Sequence[str],
        repository: Repository,
        *,
        origin: str,
        max_rate: float | None = None,
        pack_bytes: int = PACK_BYTES,
        progress: Callable[[Going], None] = lambda _: None,
        say: Callable[[str], None] = log.info,
        stopped: Event | None = None,
        poll_s: float = 0.1,
    ) -> None:
        self._ask = ask
        self._nodes = list(nodes)
        self._repository = repository
        self._origin = origin
        self._rate = max_rate
        self._pack_bytes = pack_bytes
        self._progress = progress
        self._say = say
        self._stopped = stopped or Event()
        self._poll_s = poll_s

    def take(self, wanted: Wanted = EVERYTHING, name: str | None = None, models: Sequence[Model] = (), extra: dict | None = None) -> Taken:
        """Write a checkpoint (under a name of its own, or `name`) of what the nodes hold. `models`: what is known of models beforehand.

        Raises (kind `storage`) when a node or the store fails, or `stopped` is set: there is no such checkpoint then, the packs that
        were complete stay, and the next one goes on from there.
        """
        with self._repository.lease("checkpoint", say=self._say) as lease:
            try:
                snapshots = answers(self._ask, self._nodes, "snapshot", wanted.tiers, wanted.min_hits)
                described = _models(snapshots, models)
                whole = merged(snapshots, {model.root for model in described if wanted.models(model)})
                known = self._reused(whole.blocks)
                new = [block for block in whole.blocks if (block.best.key, block.best.root) not in known.places]
                written = self._written(assigned(new), new, lease)
            finally:
                self._ask(self._nodes, "stop_saving")
            return self._published(whole.blocks, whole.orphans, known, written, described, name, extra or {})

    def _reused(self, blocks: Sequence[Block]) -> Known:
        """What need not be written again."""
        return reusable(self._repository.known(), [(block.best.key, block.best.root) for block in blocks])

    def _written(self, shares: dict[str, list[BlockKey]], new: Sequence[Block], lease: Lease) -> dict[str, Written]:
        """Have each node write its share, and wait for all."""
        all_bytes = sum(block.best.stored_bytes for block in new)
        rate = self._rate and self._rate / max(len(shares), 1)
        url = self._repository.store.url
        for node, keys in shares.items():
            answers(self._ask, [node], "save", url, keys, rate, self._pack_bytes)
        renew_s = time.monotonic() + RENEW_S
        state: dict[str, Written] = {}
        while not all(node in state and state[node].is_done for node in shares):
            if self._stopped.wait(self._poll_s):
                raise TieredKVError(Kind.STORAGE, "the checkpoint was stopped; what was written stays, the next one goes on from there")
            for node in shares:
                told = state[node].packs if node in state else []
                answer = answers(self._ask, [node], "written", len(told))[node]
                state[node] = answer._replace(packs=told + answer.packs)
                if answer.error is not None:
                    good({node: answer.error})
            if time.monotonic() > renew_s:
                lease.renew()
                renew_s = time.monotonic() + RENEW_S
            done = state.values()
            self._progress(Going(sum(each.blocks for each in done), len(new), sum(each.nbytes for each in done), all_bytes))
        return state

    def _published(
        self,
        blocks: Sequence[Block],
        orphans: int,
        known: Known,
        written: dict[str, Written],
        models: Sequence[Model],
        name: str | None,
        extra: dict[str, Any],
    ) -> Taken:
        """Put the manifest of what lies in packs now."""
        packs: dict[str, int] = {}
        places = dict(known.places)
        new_packs = {info.name: info.nbytes for each in written.values() for info in each.packs}
        for each in written.values():
            for info in each.packs:
                for entry in info.entries:
                    places[entry.key, entry.root] = Place(info.name, entry.offset, entry.stored_bytes, entry.raw_bytes, entry.codec)
        left = {block.best.key for block in blocks if (block.best.key, block.best.root) not in places}
        kept = closed(blocks, left)
        rows = []
        for block in kept:
            pack, *where = places[block.best.key, block.best.root]
            number = packs.setdefault(pack, len(packs))
            best = block.best
            rows.append(Row(best.key, best.parent, best.root, block.depth, number, *where, best.tier, block.hits))
        sizes = known.sizes | new_packs
        roots = {row.root for row in rows}
        described = tuple(model for model in models if model.root in roots)
        named = tuple((pack, sizes[pack]) for pack in packs)
        manifest = Manifest(named, described, tuple(rows), self._repository.now_s(), self._origin, extra)
        self._repository.confirm(list(packs))
        written_bytes = sum(new_packs.values())
        new_rows = sum((block.best.key, block.best.root) not in known.places for block in kept)
        new_bytes = sum(each.nbytes for each in written.values())
        given = self._repository.publish(manifest, name)
        nbytes = sum(row.stored_bytes for row in rows)
        counts = (len(rows), nbytes, new_rows, new_bytes, len(packs), len(new_packs), written_bytes)
        return Taken(given, *counts, len(blocks) - len(kept), orphans)


def _models(snapshots: Mapping[str, Snapshot], known: Sequence[Model]) -> list[Model]:
    """What is known of the models below every root: from who asks, from workers, or no more than the root."""
    models = {seen.root: Model(seen.root) for snapshot in snapshots.values() for seen in snapshot.blocks}
    for snapshot in snapshots.values():
        for root, message in snapshot.models.items():
            facts = ModelFacts.of_message(message)
            models[root] = Model(root, facts.layout, "", facts.namespace)
    return list((models | {model.root: model for model in known}).values())
