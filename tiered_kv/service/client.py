"""The client: what a worker holds. Reads from shared memory without a call; asks its node for all else.

Axes: L layers, 2 (key, value), H KV heads, N tokens, D head dim. No fault of the cache leaves this class as an
exception: a node that does not answer is a miss, and a store a refusal. Errors are for callers that broke the
contract (kinds `tokens`, `layout`) or use a closed client (`closed`).
"""

import logging
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, NamedTuple, Union

import torch

from tiered_kv import forking
from tiered_kv.blocks import PEER, Explained, Fetched, Hint, Match, Stored, Tier
from tiered_kv.clock import Clock, SystemClock
from tiered_kv.codecs import codec_by_id
from tiered_kv.errors import Kind, TieredKVError
from tiered_kv.keys import BlockKey, Namespace, as_token_ids
from tiered_kv.layout import KVLayout
from tiered_kv.service.access import AccessHolder, NodeAccess
from tiered_kv.service.pool import SessionPool
from tiered_kv.service.reading import BlockSource, Found
from tiered_kv.service.savings import Savings
from tiered_kv.service.session import Session
from tiered_kv.service.writing import BlockWriter, LayerPairs

if TYPE_CHECKING:
    import numpy as np

    from tiered_kv.service.probes import Probe

log = logging.getLogger(__name__)

WARN_EVERY_S = 30.0
QUESTION_S_MAX = 1.0
"""How long `match`, `explain`, `stats` and hints wait for an answer at most; less where the setting `fetch_deadline_ms` is less."""
EPOCH_BITS = 63
LABELS = {tier.value: tier.label for tier in Tier}

TokenIds = Union[Sequence[int], "np.ndarray", torch.Tensor]


def _while_open(method: Callable) -> Callable:
    """For a method that another thread's `close` may take the memory away from: it then says so, as later calls do."""

    @wraps(method)
    def guarded(self: "Client", *arguments, **options):
        try:
            return method(self, *arguments, **options)
        except (ValueError, AttributeError):  # a released view; an arena that is None
            self._check_open()
            raise

    return guarded


class Names(NamedTuple):
    """What a client works under at one moment; every call reads it once, so that a change meets later calls only."""

    namespace: Namespace
    root: BlockKey
    keys: Callable[["np.ndarray"], list[BlockKey]]


class Client:
    """Fetches and stores the KV of token prefixes, in the blocks of one layout under one namespace.

    Safe to use from several threads. Cost on the same node: some 60 µs a fetch plus the copy, no call to any process;
    a store makes two round trips of some 30 µs beside its copy.
    """

    def __init__(
        self,
        layout: KVLayout,
        namespace: Namespace,
        holder: AccessHolder,
        introduce: Callable[[Session, Namespace], None] = lambda session, namespace: None,
        *,
        clock: Clock | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.followed: object | None = None
        """What follows the state of the model that the client serves (`integrations.modelstate`); of several the last one."""
        self._timed: Callable[[str, Callable], Callable] = lambda _, function: function
        self._names = self._names_of(namespace)
        self._introduce = introduce
        self._holder = holder
        self._clock = clock or SystemClock()
        self._on_close = on_close
        self._counts: Counter[str] = Counter()
        self._savings = Savings()
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._closed = False
        self._warn_again_s = float("-inf")
        forking.register(self)

    def after_fork(self) -> None:
        """In a child process: a thread of the parent may have held the lock."""
        self._lock, self._turn = threading.Lock(), threading.Lock()

    @property
    def _source(self) -> BlockSource:
        """Where the present life of the node's files is read."""
        return self._holder.present.source

    @property
    def _writer(self) -> BlockWriter:
        """What packs blocks into the present life of the node's files."""
        return self._holder.present.writer

    @property
    def _pool(self) -> SessionPool:
        """The sessions with the node's present life."""
        return self._holder.present.pool

    def greet(self, wait_s: float, must_answer: bool = False) -> None:
        """Connect to the node now; raises what its settings have against this model, and if it `must_answer` that it does not."""
        try:
            self._pool.check(wait_s)
        except TieredKVError as error:
            if error.kind is not Kind.TRANSPORT or must_answer:
                raise
            self._degraded("greeting", error)

    @_while_open
    def match(self, token_ids: TokenIds) -> Match:
        """The longest prefix of whole blocks that could be fetched now, and from where; moves no data.

        `token_ids`: one prompt, a list, array or tensor of whole numbers.
        """
        keys, access = self._keys(token_ids), self._holder.take()
        found = access.source.find(keys)
        by_tier = self._tokens_by_tier(found)
        rest = keys[len(found) :]
        if rest and access.source.peers:
            wait_s = _question_s(access)
            elsewhere = len(self._ask(access, lambda session: session.locate(rest, wait_s), [], wait_s))
            if elsewhere:
                by_tier[PEER] = elsewhere * self.layout.block_tokens
        return Match(sum(by_tier.values()), by_tier)

    @_while_open
    def fetch(
        self, token_ids: TokenIds, out: torch.Tensor | None = None, *, deadline_ms: int | None = None, namespace: Namespace | None = None
    ) -> Fetched:
        """The KV of the longest prefix of whole blocks that could be had in time.

        `out`: a tensor (L, 2, H, N, D) of the layout's dtype on any device, N as you like; as many whole blocks of the prefix
        as fit are written to its first tokens, the rest of it is undefined. Without it the KV is newly allocated on the CPU.
        `deadline_ms` bounds the waiting for other nodes and disks (default: the cluster's setting); blocks past it are misses.
        `namespace`: whose KV is meant (default: the one of the client at this moment, which another thread may change by `use`).
        """
        begun_s = self._clock.now_s()
        names, access = self._names_for(namespace), self._holder.take()
        keys, source = self._keys(token_ids, names), access.source
        if out is not None:
            room = out.shape[-2] if getattr(out, "ndim", 0) == 5 else len(keys) * self.layout.block_tokens
            self.layout.check_kv(out, room, "out")
            if any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True)):
                raise TieredKVError(Kind.LAYOUT, "out is an expanded tensor, whose elements share memory; nothing can be written to it")
            keys = keys[: out.shape[-2] // self.layout.block_tokens]
        deadline_s = self._clock.now_s() + (access.deadline_s if deadline_ms is None else deadline_ms / 1000)
        found = first_found = source.find(keys)
        if hidden := source.hidden(found):
            found = self._bring(access, keys, hidden, deadline_s)
        local = len(found)
        if local < len(keys) and source.peers:
            found = found + self._pull(access, names.root, keys, local, deadline_s)
        kv = out
        if kv is None:
            kv = torch.empty(self.layout.kv_shape(len(found) * self.layout.block_tokens), dtype=self.layout.torch_dtype)
        read = source.read(found, kv, lambda: self._clock.now_s() >= deadline_s)
        if doubted := source.doubted():
            self._ask(access, lambda session: session.doubt(doubted), None, max(deadline_s - self._clock.now_s(), 0.0))
        # Also the one that could not be read, its node will find out why; but not what was stored here just now.
        source.touch(found[: min(len(read) + 1, local)])
        where = [*first_found, *found[len(first_found) : local]]  # before anything was brought here for this fetch
        by_tier = self._tokens_by_tier(where[: len(read)])
        if len(read) > local:
            by_tier[PEER] = (len(read) - local) * self.layout.block_tokens
        tokens = len(read) * self.layout.block_tokens
        self._count(fetches=1, asked_blocks=len(keys), hit_blocks=len(read))
        saved_s = self._savings.fetched(tokens, self._clock.now_s() - begun_s)
        source.tally(len(keys), len(read), tokens, int(saved_s * 1e6))
        return Fetched(tokens, kv[..., :tokens, :], by_tier)

    @_while_open
    def store(
        self,
        token_ids: TokenIds,
        kv: torch.Tensor | LayerPairs,
        *,
        start: int = 0,
        hint: Hint | None = None,
        namespace: Namespace | None = None,
    ) -> Stored:
        """Keep the whole blocks of `kv`, the KV of `token_ids[start:]`; visible to every worker of the node on return.

        `kv`: a tensor (L, 2, H, N, D) on any device, or for each layer its pair (key, value), each (H, N, D), where
        N = len(token_ids) - start. A block that began before `start` is left out, as is what follows the last whole
        one. Waits for room no longer than the setting `store_wait_ms`, however often it asks; what found none is `refused`.
        A store is no use of blocks that were there before: the fetch was. `hint`: what is known of the chain's future, also
        with `kv` of no tokens where all of it is there; costs one more small call. `namespace`: as for `fetch`.
        """
        begun_s = self._clock.now_s()
        ids = as_token_ids(token_ids)
        self._check_open()
        access = self._holder.take()
        deadline_s = begun_s + access.store_wait_s
        if not isinstance(hint, Hint | None):
            raise TieredKVError(Kind.CONFIG, f"hint: a tiered_kv.Hint is needed, got {type(hint).__name__}", setting="hint")
        names = self._names_for(namespace)
        keys = names.keys(ids)
        kv = access.writer.checked(kv, len(ids), start)
        first = -(-start // self.layout.block_tokens)
        shown = access.source.lookup_all(keys)
        missing = [block for block in range(first, len(keys)) if shown[block] is None]
        new = present = 0
        try:
            while missing:
                wait_s = max(deadline_s - self._clock.now_s(), 0.0)
                with access.pool.session(wait_s) as session:
                    taken, added = access.writer.write(session, names.root, keys, missing, kv, start, wait_s)
                new, present = new + added, present + taken - added
                missing = missing[taken:]
                if not taken or self._clock.now_s() >= deadline_s:
                    break
        except TieredKVError as error:
            self._degraded("store", error)
        if hint is not None and keys:
            known = (hint.answer_tokens, hint.pinned_s, hint.reuse_within_s, hint.ended)
            self._ask(access, lambda session: session.hint(keys[-1], *known), None, max(deadline_s - self._clock.now_s(), 0.0))
        present += sum(slot is not None for slot in shown[first:])
        self._count(stores=1, new_blocks=new, present_blocks=present, refused_blocks=len(missing))
        return Stored(new, present, len(missing))

    @_while_open
    def explain(self, token_ids: TokenIds) -> list[Explained]:
        """One record for each block of the prompt: its tier and codec, or the reason why it would be a miss."""
        keys, access = self._keys(token_ids), self._holder.take()
        slots = access.source.lookup_all(keys)
        rest = [key for key, slot in zip(keys, slots, strict=True) if slot is None]
        elsewhere: dict[BlockKey, list[str]] = {}
        if rest and access.source.peers:
            wait_s = _question_s(access)
            elsewhere = dict(zip(rest, self._ask(access, lambda session: session.locate(rest, wait_s), [], wait_s), strict=False))
        records, broken = [], False
        for block, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            behind = "behind a block that is missing" if broken else ""
            if slot is not None:
                tier, codec = Tier(slot.tier).label, codec_by_id(slot.codec).name
                records.append(Explained(block, key.hex(), tier, codec, slot.stored_bytes, behind or "hit"))
            elif key in elsewhere:
                records.append(Explained(block, key.hex(), PEER, None, 0, behind or f"held by {', '.join(elsewhere[key])}"))
            else:
                broken = True
                records.append(Explained(block, key.hex(), None, None, 0, access.source.reason_of_miss))
        return records

    def note_prefill(self, tokens: int, seconds: float) -> None:
        """The worker's model has computed `tokens` of a prompt, of which nothing was fetched, in `seconds`.

        From these the prefill rate is averaged, and with it `prefill_seconds_saved` of later fetches: their tokens at that
        rate, less the time the fetch took. `CachedModel` calls it; who fetches by themselves should. A few tokens (below
        64) tell no rate and are left out. No call to any process.
        """
        self._savings.note_prefill(tokens, seconds)

    def stats(self) -> dict:
        """Counts of this client, and the figures of its node (None while that does not answer).

        `prefill_tokens_saved`: tokens that fetches delivered; `prefill_seconds_saved`: see `note_prefill`, 0 as long as
        `prefill_tokens_per_s` is None.
        """
        self._check_open()
        access = self._holder.take()
        return {"client": self.own_stats(), "node": self._ask(access, lambda session: session.stats(), None, _question_s(access))}

    def own_stats(self) -> dict:
        """The counts of this client alone; no call."""
        with self._lock:
            own = dict(self._counts)
        own |= self._savings.stats()
        return own | {"node_calls": self._holder.calls, "retries": self._holder.retries}

    @property
    def namespace(self) -> Namespace:
        """What later calls work under."""
        return self._names.namespace

    def use(self, namespace: Namespace) -> None:
        """Work under another namespace, of the same layout, from the next call on; calls under way finish under the one before.

        Raises what the node's settings have against its model, and then changes nothing. Cost: a call of some 50 µs.
        """
        self._check_open()
        with self._turn:
            access = self._holder.take()
            try:
                with access.pool.session(_question_s(access)) as session:
                    self._introduce(session, namespace)
            except TieredKVError as error:
                if error.kind is not Kind.TRANSPORT:
                    raise
                self._degraded("change of namespace", error)  # the next session introduces it
            self._names = self._names_of(namespace)

    def new_epoch(self, epoch: int | None = None) -> int:
        """Move to another epoch of the namespace, after a change of the model that cannot be seen; returns its number.

        `epoch`: a number of the caller's, such as the training step: workers that give the same one share. Without it a random one,
        which nobody else has. What was stored before is not met again, unless that number comes back.
        """
        number = secrets.randbits(EPOCH_BITS) if epoch is None else epoch
        self.use(replace(self.namespace, epoch=number))
        return number

    def variant_of(self, namespace: Namespace, probe: "Probe") -> str | None:
        """Which variant of a namespace a model with this probe belongs to; None while the node does not answer. One call."""
        root, access = namespace.root(self.layout), self._holder.take()
        return self._ask(access, lambda session: session.probe(root, list(probe)), None, _question_s(access))

    def measure(self, timed: Callable[[str, Callable], Callable]) -> None:
        """From now on run each stage's function as `timed(stage, function)` gives it (`service.profile`); once, before any use."""

        def dress(access: NodeAccess) -> None:
            access.writer.write = timed("store", access.writer.write)
            access.source.measure(timed)

        self._timed = timed
        self._names = self._names_of(self.namespace)
        self._holder.dress = dress
        dress(self._holder.present)

    @property
    def node_calls(self) -> int:
        """How often this client has asked its node for anything; fetches of local blocks leave it as it is."""
        return self._holder.calls

    def close(self) -> None:
        """Give the node's memory and the sessions back. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._holder.close()
            self._on_close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _names_of(self, namespace: Namespace) -> Names:
        chain = namespace.chain(self.layout)
        return Names(namespace, chain.root, self._timed("hash", chain.keys))

    def _names_for(self, namespace: Namespace | None) -> Names:
        present = self._names
        return present if namespace is None or namespace is present.namespace else self._names_of(namespace)

    def _keys(self, token_ids: TokenIds, names: Names | None = None) -> list[BlockKey]:
        self._check_open()
        return (names or self._names).keys(as_token_ids(token_ids))

    def _bring(self, access: NodeAccess, keys: list[BlockKey], hidden: list[BlockKey], deadline_s: float) -> list[Found]:
        """What can be found after the node was asked for blocks that only it can read."""
        wait_s = deadline_s - self._clock.now_s()
        if wait_s > 0:
            self._ask(access, lambda session: session.bring(hidden, wait_s), None, wait_s)
        return access.source.find(keys)

    def _pull(self, access: NodeAccess, root: BlockKey, keys: list[BlockKey], local: int, deadline_s: float) -> list[Found]:
        wait_s = deadline_s - self._clock.now_s()
        if wait_s <= 0:
            return []
        tail, rest = keys[local - 1] if local else None, keys[local:]
        asked = (root, self.layout.block_bytes, tail, rest, local, wait_s)
        count = self._ask(access, lambda session: session.pull(*asked), None, wait_s)
        return access.source.find(rest[:count])  # all of them where there was no answer in time: some may be here by now

    def _ask(self, access: NodeAccess, question: Callable, otherwise: object, wait_s: float):
        """The node's answer within `wait_s`, or `otherwise` where it has none."""
        try:
            with access.pool.session(wait_s) as session:
                return question(session)
        except TieredKVError as error:
            self._degraded("question", error)
            return otherwise

    def _degraded(self, what: str, error: TieredKVError) -> None:
        if error.kind is Kind.CLOSED:
            raise error
        self._count(degraded=1)
        now_s = self._clock.now_s()
        if now_s >= self._warn_again_s:
            self._warn_again_s = now_s + WARN_EVERY_S
            log.warning("a %s went without the node (further ones are not logged for %.0f s): %s", what, WARN_EVERY_S, error)

    def _tokens_by_tier(self, found: Sequence[Found]) -> dict[str, int]:
        blocks: dict[int, int] = {}
        for each in found:
            tier = each.slot.tier
            blocks[tier] = blocks.get(tier, 0) + 1
        return {LABELS[tier]: count * self.layout.block_tokens for tier, count in blocks.items()}

    def _count(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def _check_open(self) -> None:
        if self._closed:
            raise TieredKVError(Kind.CLOSED, "the client is closed")


def _question_s(access: NodeAccess) -> float:
    """How long a question whose answer is no block may take."""
    return min(access.deadline_s, QUESTION_S_MAX)
