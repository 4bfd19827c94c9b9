"""The client: a worker's access to the cache. It reads from shared memory without a call, and calls its node for everything else.

Axes: L layers, 2 (key, value), H KV heads, N tokens, D head dim. No fault of the cache raises an exception here: if the node does not
answer, a fetch is a miss, and a store is refused. Errors mean that the caller broke the contract (kinds `tokens`, `layout`) or used a
closed client (`closed`).
"""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Union

import torch

from tiered_kv.blocks import PEER, Explained, Fetched, Hint, Match, Reason, Stored, Tier
from tiered_kv.client.access import NodeAccess
from tiered_kv.client.base import ALL_PEERS, question_s
from tiered_kv.client.calls import Names, while_open
from tiered_kv.client.deciding import LOOK_AGAIN_S, DecidingClient
from tiered_kv.client.explaining.finding import OtherNamespace, other_namespaces
from tiered_kv.client.kv_copy import LayerPairs
from tiered_kv.client.load_plan import LoadPlan
from tiered_kv.client.reader import BlockSource, DiskMeter, FoundBlock
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, Namespace, as_token_ids, check_tenant
from tiered_kv.protocol.explanation import KnownNamespace
from tiered_kv.protocol.messages import BlockRun
from tiered_kv.protocol.session import Session

if TYPE_CHECKING:
    import numpy as np

    from tiered_kv.protocol.probes import Probe

READ_AHEAD_BYTES = 4 << 20
"""A pull of at least this many bytes gets a second thread, so that its first blocks are read while later ones arrive."""

TokenIds = Union[Sequence[int], "np.ndarray", torch.Tensor]


class Client(DecidingClient):
    """Fetches and stores the KV of token prefixes, in the blocks of one layout under one namespace.

    Safe to use from several threads. On the same node, a fetch takes about 60 µs plus the copy and calls no other process. A store
    makes two round trips of about 30 µs besides its copy.
    """

    followed: object | None = None
    """The `integrations.modelstate.ModelState` of the last model that this client served; None without a model."""

    @while_open
    def match(self, token_ids: TokenIds) -> Match:
        """Returns how many tokens a fetch could return now, as whole blocks, in total and by tier. Moves no data.

        `token_ids`: one prompt, as a list, array or tensor of whole numbers.
        """
        access, keys = self._keys(token_ids)
        found = access.source.find(keys)
        by_tier = self._tokens_by_tier(found)
        rest = keys[len(found) :]
        if rest and access.source.peers:
            elsewhere = len(self._locate(access, rest))
            if elsewhere:
                by_tier[PEER] = elsewhere * self.layout.block_tokens
        return Match(sum(by_tier.values()), by_tier)

    @while_open
    def fetch(
        self,
        token_ids: TokenIds,
        out: torch.Tensor | None = None,
        *,
        deadline_ms: int | None = None,
        namespace: Namespace | None = None,
        recompute_tokens_per_s: float | None = None,
    ) -> Fetched:
        """Returns the KV of the longest prefix of whole blocks that can be read in time.

        `out`: a tensor (L, 2, H, N, D) of the layout's dtype on any device, with any N. As many whole blocks of the prefix as fit are
        written to its first tokens; the rest of it is undefined. Without `out`, the KV is newly allocated on the CPU.
        `deadline_ms` bounds the wait for other nodes and disks (default: the cluster's setting). Blocks not read by then are misses.
        `namespace`: the namespace to read (default: the client's current one, which another thread may change with `use`).
        `recompute_tokens_per_s`: how fast the model computes a prompt (default: as `note_prefill` recorded it; 0: load everything).
        Blocks of slow tiers and of other nodes are loaded only if that is faster. The others are `declined`.
        """
        begun_s = self._clock.now_s()
        self._check_open()
        access, names = self._present(namespace)
        keys, source = names.keys(as_token_ids(token_ids)), access.source
        if out is not None:
            keys = keys[: self._room_in(out, len(keys))]
        deadline_s = self._clock.now_s() + (access.deadline_s if deadline_ms is None else deadline_ms / 1000)
        wanted, all_found = keys, source.find(keys)
        tiers = source.tiers_of(all_found)
        plan = self._planned(access, names, keys, all_found, tiers, recompute_tokens_per_s, deadline_s)
        keys, first_found = (plan.keys, plan.found) if plan is not None else (keys, all_found)
        found = first_found
        if hidden := source.hidden(found, tiers if plan is None else None):
            found = self._bring_in_time(access, keys, found, hidden, deadline_s, plan)
        local, pulling = len(found), None
        if local < len(keys) and source.peers and not (plan and plan.waits.was_late):
            run = BlockRun(names.root, self.layout.block_bytes, keys[local - 1] if local else None, keys[local:], local)
            pulled, pulling = self._pull_rest(access, names, run, out, deadline_s, plan)
            found = found + pulled
        kv = out
        if kv is None:
            kv = torch.empty(self.layout.kv_shape(len(found) * self.layout.block_tokens), dtype=self.layout.torch_dtype)
        read = self._read_in_time(source, found, kv, deadline_s, self._meter(plan) if Tier.DISK in tiers else None)
        if pulling is not None:
            read = self._read_pulled(source, keys, read, local, pulling, kv, deadline_s, plan)
            found = found if len(read) < local else read
        self._report_damage(access, deadline_s)
        # Includes the block that could not be read, which the node examines; excludes the blocks that this fetch pulled.
        source.touch(found[: min(len(read) + 1, local)])
        where = [*first_found, *found[len(first_found) : local]]  # the tiers before this fetch moved any block
        by_tier = self._tokens_by_tier(where[: len(read)], max(len(read) - local, 0))
        if not self._is_current(access, names):
            read, by_tier = [], {}
        tokens = len(read) * self.layout.block_tokens
        hits = {tier: count // self.layout.block_tokens for tier, count in by_tier.items()}
        self._note_fetch(source, names, len(wanted), hits, begun_s)
        declined = self._note_declined(access, plan, all_found, len(read)) if plan is not None else {}
        self._note_misses(wanted, len(read), deadline_s, bool(declined))
        return Fetched(tokens, kv if kv.shape[-2] == tokens else kv.narrow(-2, 0, tokens), by_tier, sum(declined.values()), declined)

    def _pull_rest(
        self, access: NodeAccess, names: Names, run: BlockRun, out: torch.Tensor | None, deadline_s: float, plan: LoadPlan | None
    ) -> tuple[list[FoundBlock], "Future[list[FoundBlock]] | None"]:
        """Pull the blocks of `run` from other nodes, or begin to. Returns the blocks, or [] and the pull that goes on."""
        if plan is not None and out is None:
            return self._pulled_in_time(access, names, run, plan, deadline_s), None
        if plan is not None or self._reads_ahead(run, out):
            peers = plan.peers if plan else (ALL_PEERS,)
            return [], self._pulls.submit(self._pull, access, names, run, deadline_s, peers)
        return self._pull(access, names, run, deadline_s), None

    def _read_in_time(
        self, source: BlockSource, found: list[FoundBlock], kv: torch.Tensor, deadline_s: float, meter: DiskMeter | None
    ) -> list[FoundBlock]:
        def expired() -> bool:
            return self._clock.now_s() >= deadline_s

        return source.read(found, kv, expired, meter) if meter is not None else source.read(found, kv, expired)

    def _room_in(self, out: torch.Tensor, blocks: int) -> int:
        """Returns how many whole blocks fit into the tensor of a fetch of `blocks`. Raises (kind `layout`) if it cannot be used."""
        room = out.shape[-2] if getattr(out, "ndim", 0) == 5 else blocks * self.layout.block_tokens
        self.layout.check_kv(out, room, "out")
        if 0 in out.stride() and any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
            raise TieredKVError(
                Kind.LAYOUT, "out: must be a tensor that can be written to, got an expanded tensor, whose elements share memory"
            )
        return int(out.shape[-2]) // self.layout.block_tokens

    def _reads_ahead(self, run: BlockRun, out: torch.Tensor | None) -> bool:
        """Returns whether to copy the leading blocks of a pull while later ones arrive."""
        return out is not None and len(run.keys) > 1 and len(run.keys) * run.nbytes >= READ_AHEAD_BYTES

    def _read_pulled(
        self,
        source: BlockSource,
        keys: list[BlockKey],
        read: list[FoundBlock],
        local: int,
        pulling: "Future[list[FoundBlock]]",
        kv: torch.Tensor,
        deadline_s: float,
        plan: LoadPlan | None,
    ) -> list[FoundBlock]:
        """Read blocks as the node pulls them, until the pull has ended or takes too long. Returns `read` and all blocks read here.

        `local`: how many blocks of the prompt this node had before the pull. `read`: the leading ones of them that were read. If one
        of them could not be read, no pulled block is read.
        """
        step, is_broken = self.layout.block_tokens, len(read) < local
        while not is_broken:
            is_last = pulling.done()
            new = pulling.result()[len(read) - local :] if is_last else source.find(keys[len(read) :])
            good = source.read(new, kv[..., len(read) * step :, :], lambda: self._clock.now_s() >= deadline_s) if new else []
            read = read + good
            is_broken = len(good) < len(new)
            if is_last:
                break
            if plan is not None and plan.waits.is_over(self._clock.now_s(), len(read)):
                self._leave(pulling, plan)
                return read
            if not new:
                wait([pulling], LOOK_AGAIN_S)
        if plan is None:
            pulling.result()
        return read

    @while_open
    def store(
        self,
        token_ids: TokenIds,
        kv: torch.Tensor | LayerPairs,
        *,
        start: int = 0,
        hint: Hint | None = None,
        namespace: Namespace | None = None,
    ) -> Stored:
        """Store the whole blocks of `kv`, the KV of `token_ids[start:]`. They are visible to every worker of the node on return.

        `kv`: a tensor (L, 2, H, N, D) on any device, or for each layer a pair (key, value), each (H, N, D), where
        N = len(token_ids) - start. A block that starts before token `start` is left out, as are tokens after the last whole block.
        Waits for room, for at most the setting `store_wait_ms` in all. Blocks that get no room are `refused`. Storing does not count
        as a use of blocks that already exist; fetching them did. `hint`: expectations about the chain's future, at the cost of one
        more small call. If the whole prompt is stored already, a hint can be given with `kv` of no tokens. `namespace`: as for `fetch`.
        """
        begun_s = self._clock.now_s()
        ids = as_token_ids(token_ids)
        self._check_open()
        access, names = self._present(namespace)
        deadline_s = begun_s + access.store_wait_s
        if hint is not None and not isinstance(hint, Hint):
            raise TieredKVError(Kind.CONFIG, f"hint: must be a tiered_kv.Hint or None, got {type(hint).__name__}", setting="hint")
        keys = names.keys(ids)
        kv = access.writer.checked(kv, len(ids), start)
        first = -(-start // self.layout.block_tokens)
        shown = access.source.lookup_all(keys)
        missing = [block for block in range(first, len(keys)) if shown[block] is None]

        def write(session: Session, missing: list[int], wait_s: float) -> tuple[int, int]:
            return access.writer.write(session, names.root, keys, missing, kv, start, wait_s)

        stored = self._store_missing(access, names, missing, deadline_s, write)
        if hint is not None and keys:
            known = (hint.answer_tokens, hint.pinned_s, hint.reuse_within_s, hint.ended)
            self._ask(access, lambda session: session.hint(keys[-1], *known), None, max(deadline_s - self._clock.now_s(), 0.0))
        present = stored.present + sum(slot is not None for slot in shown[first:])
        counts = {"stores": 1, "new_blocks": stored.new, "present_blocks": present, "refused_blocks": stored.refused}
        self._note(access.source, names, counts, store_s=self._clock.now_s() - begun_s)
        return Stored(stored.new, present, stored.refused)

    @while_open
    def explain(self, token_ids: TokenIds, *, also_tenants: Sequence[str] = ()) -> list[Explained]:
        """Returns a record of each block of the prompt: its tier and codec, or the reason why it would be a miss.

        Waits at most QUESTION_S_MAX for the node, which asks the coordinator and other nodes. Counts as no use of any block.
        `also_tenants`: further tenants whose namespaces are searched for the same tokens. Blocks of tenants that are not named here
        are never looked for. docs/explain.md lists the reasons.
        """
        self._check_open()
        for tenant in also_tenants:
            check_tenant(tenant)
        access, names = self._present()
        ids = as_token_ids(token_ids)
        until_s = self._clock.now_s() + question_s(access)
        finding = self._finding(access, names, names.keys(ids), until_s)
        records = finding.records()
        if any(record.why in (Reason.NEVER_STORED, Reason.REFUSED) for record in records):
            others = self._other_namespaces(access, names, ids, also_tenants, until_s)
            records = replace(finding, others=others).records()
        return records

    def _other_namespaces(
        self, access: NodeAccess, names: Names, ids: "np.ndarray", also_tenants: Sequence[str], until_s: float
    ) -> list[OtherNamespace]:
        """Returns the namespaces of this client's tenant, and of `also_tenants`, in which the node has or had these tokens."""
        known: list[KnownNamespace] = []
        for tenant in dict.fromkeys([names.namespace.tenant, *also_tenants]):
            known += self._ask(access, partial(_namespaces_of, tenant), list[KnownNamespace](), question_s(access))
        return other_namespaces(
            known, names.namespace, self.layout, ids, lambda keys: self._explanation(access, names, keys, until_s, False)
        )

    def variant_of(self, namespace: Namespace, probe: "Probe") -> str | None:
        """Returns the variant of a namespace that a model with this probe belongs to; None while the node does not answer. One call."""
        root, access = namespace.plain().root(self.layout), self._holder.take()  # a model's probe is the same in all epochs

        def question(session: Session) -> str | None:
            return session.probe(root, list(probe))

        return self._ask(access, question, None, question_s(access))

    def _keys(self, token_ids: TokenIds) -> tuple[NodeAccess, list[BlockKey]]:
        self._check_open()
        access, names = self._present()
        return access, names.keys(as_token_ids(token_ids))


def _namespaces_of(tenant: str, session: Session) -> list[KnownNamespace]:
    return session.namespaces(tenant)
